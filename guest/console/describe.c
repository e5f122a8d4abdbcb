#include "console/describe.h"

#include <stddef.h>

#include "console/names.h"
#include "console/text.h"
#include "vmx_facts.h"

/* Vol. 3C, table 25-18: the rest of the exit-reason field are flags. */
#define BASIC_REASON 0xffffu

static bool bit(uint64_t raw, unsigned int number)
{
	return raw >> number & 1;
}

static uint64_t bits(uint64_t raw, unsigned int high, unsigned int low)
{
	return raw >> low & ((1ull << (high - low + 1)) - 1);
}

static void note(bool holds, const char *text)
{
	if (holds)
		say(", %s", text);
}

static void say_register(uint64_t index)
{
	say("%s", name_of(&register_names, index));
}

/* --- reasons ----------------------------------------------------------------------------------------------- */

void describe_reason(uint32_t reason)
{
	const char *name = name_of(&exit_reason_names, reason & BASIC_REASON);
	uint32_t unnamed = reason & ~BASIC_REASON;
	const char *before = " (";
	if (name)
		say("%s", name);
	else
		say("reason %u", reason & BASIC_REASON);
	for (size_t i = 0; i < exit_reason_flags.count; i++) {
		const struct name *flag = &exit_reason_flags.list[i];
		if (!(reason & flag->value))
			continue;
		say("%s%s", before, flag->text);
		before = ", ";
		unnamed &= ~(uint32_t)flag->value;
	}
	if (unnamed) {
		say("%sunassigned bits %#x", before, unnamed);
		before = ", ";
	}
	if (*before == ',')
		say(")");
}

/* --- qualifications: instructions (SDM Vol. 3C, 28.2.1) ------------------------------------------------------ */

/* Table 28-5. */
static void say_io(uint64_t raw)
{
	uint64_t size = bits(raw, 2, 0) + 1;
	say("%s%s%s port %#lx, %lu byte%s", bit(raw, 5) ? "REP " : "", bit(raw, 3) ? "IN" : "OUT",
	    bit(raw, 4) ? "S" : "", bits(raw, 31, 16), size, plural(size));
}

/* Table 28-3. */
static void say_control_register(uint64_t raw)
{
	enum { MOV_TO_CR, MOV_FROM_CR, CLTS, LMSW };
	switch (bits(raw, 5, 4)) {
	case MOV_TO_CR:
		say("MOV to CR%lu from ", bits(raw, 3, 0));
		say_register(bits(raw, 11, 8));
		break;
	case MOV_FROM_CR:
		say("MOV from CR%lu to ", bits(raw, 3, 0));
		say_register(bits(raw, 11, 8));
		break;
	case CLTS:
		say("CLTS");
		break;
	default:
		say("LMSW %#lx", bits(raw, 31, 16));
		note(bit(raw, 6), "memory operand");
	}
}

/* Table 28-4. */
static void say_debug_register(uint64_t raw)
{
	say(bit(raw, 4) ? "MOV from DR%lu to " : "MOV to DR%lu from ", bits(raw, 2, 0));
	say_register(bits(raw, 11, 8));
}

static void say_displacement(uint64_t raw)
{
	if (raw >> 63)
		say("displacement -%#lx", -raw);
	else
		say("displacement %#lx", raw);
}

static void say_linear_address(uint64_t raw)
{
	say("linear address %#lx", raw);
}

static void say_mwait(uint64_t raw)
{
	say(bit(raw, 0) ? "monitoring armed" : "monitoring not armed");
}

static void say_wrmsr(uint64_t raw)
{
	say(raw == 1 ? "WRMSRNS" : "WRMSR");
}

static void say_wbinvd(uint64_t raw)
{
	say(raw == 1 ? "WBNOINVD" : "WBINVD");
}

static void say_msr(uint64_t raw)
{
	say("MSR %#lx", raw);
}

static void say_pasid(uint64_t raw)
{
	say("PASID %#lx", bits(raw, 19, 0));
}

/* --- qualifications: memory ---------------------------------------------------------------------------------- */

/* Table 28-7. */
static void say_ept_violation(uint64_t raw)
{
	static const char *const kinds[] = {"read", "write", "fetch"};
	const char *before = "";
	for (unsigned int i = 0; i < 3; i++) {
		if (!bit(raw, i))
			continue;
		say("%s%s", before, kinds[i]);
		before = "+";
	}
	say("%s%s, EPT allows %c%c%c", *before ? "" : "no access",
	    bit(raw, 7) && !bit(raw, 8) ? " of a paging structure" : "", bit(raw, 3) ? 'r' : '-',
	    bit(raw, 4) ? 'w' : '-', bit(raw, 5) ? 'x' : '-');
	note(!bit(raw, 7), "no linear address");
	note(bit(raw, 13), "shadow stack");
	note(bit(raw, 15), "guest-paging verification");
	note(bit(raw, 12), "NMI unblocking by IRET");
	note(bit(raw, 16), "asynchronous");
}

/* Table 28-6: of the linear ones only the offset is defined. */
static void say_apic_access(uint64_t raw)
{
	enum { LINEAR_ASYNCHRONOUS = 4 };
	uint64_t type = bits(raw, 15, 12), offset = bits(raw, 11, 0);
	const char *text = name_of(&apic_access_types, type);
	if (!text)
		say("unknown access type %lu at offset %#lx", type, offset);
	else if (type <= LINEAR_ASYNCHRONOUS)
		say("%s at offset %#lx", text, offset);
	else
		say("%s", text);
}

static void say_apic_write(uint64_t raw)
{
	say("offset %#lx", bits(raw, 11, 0));
}

static void say_pml_full(uint64_t raw)
{
	say("log full");
	note(bit(raw, 12), "NMI unblocking by IRET");
	note(bit(raw, 16), "asynchronous");
}

static void say_spp(uint64_t raw)
{
	say(bit(raw, 11) ? "SPP miss" : "SPP misconfiguration");
	note(bit(raw, 12), "NMI unblocking by IRET");
	note(bit(raw, 16), "asynchronous");
}

/* --- qualifications: events ---------------------------------------------------------------------------------- */

/* Table 28-1. */
static void say_debug_exception(uint64_t raw)
{
	static const struct {
		unsigned int number;
		const char *name;
	} causes[] = {{0, "B0"},   {1, "B1"},  {2, "B2"},  {3, "B3"},
		      {11, "BLD"}, {13, "BD"}, {14, "BS"}, {16, "RTM"}};
	const char *before = "";
	for (unsigned int i = 0; i < sizeof(causes) / sizeof(causes[0]); i++) {
		if (!bit(raw, causes[i].number))
			continue;
		say("%s%s", before, causes[i].name);
		before = " ";
	}
	if (!*before)
		say("no cause");
}

static void say_vector_number(uint64_t raw)
{
	say("vector %#lx", bits(raw, 7, 0));
}

static void say_msr_load_failure(uint64_t raw)
{
	say("entry %lu of the MSR-load area", raw);
}

static void say_instruction_timeout(uint64_t raw)
{
	say(bit(raw, 0) ? "context invalid" : "context valid");
	note(bit(raw, 12), "NMI unblocking by IRET");
}

/* Table 28-2. */
static void say_task_switch(uint64_t raw)
{
	static const char *const sources[] = {"CALL", "IRET", "JMP", "a task gate in the IDT"};
	say("to TSS %#lx by %s", bits(raw, 15, 0), sources[bits(raw, 31, 30)]);
}

/* 27.8 */
static void say_entry_failure(uint64_t raw)
{
	switch (raw) {
	case 0:
		say("no cause given");
		break;
	case 2:
		say("problem loading the PDPTEs");
		break;
	case 3:
		say("NMI injected while blocking by STI");
		break;
	case 4:
		say("invalid VMCS link pointer");
		break;
	default:
		say("unknown cause %#lx", raw);
	}
}

static void say_exception(uint64_t raw, int vector)
{
	if (vector == VECTOR_DB)
		say_debug_exception(raw);
	else if (vector == VECTOR_PF)
		say_linear_address(raw);
	else
		say("%#lx", raw);
}

/* --- qualifications: which reason has which -------------------------------------------------------------------- */

static const struct {
	uint32_t reason;
	void (*say)(uint64_t raw);
} qualifications[] = {
	{EXIT_REASON_SIPI, say_vector_number},
	{EXIT_REASON_TASK_SWITCH, say_task_switch},
	{EXIT_REASON_INVLPG, say_linear_address},
	{EXIT_REASON_CONTROL_REGISTER_ACCESS, say_control_register},
	{EXIT_REASON_MOV_DR, say_debug_register},
	{EXIT_REASON_IO_INSTRUCTION, say_io},
	{EXIT_REASON_WRMSR, say_wrmsr},
	{EXIT_REASON_ENTRY_FAILURE_GUEST_STATE, say_entry_failure},
	{EXIT_REASON_ENTRY_FAILURE_MSR_LOADING, say_msr_load_failure},
	{EXIT_REASON_MWAIT, say_mwait},
	{EXIT_REASON_APIC_ACCESS, say_apic_access},
	{EXIT_REASON_VIRTUALIZED_EOI, say_vector_number},
	{EXIT_REASON_EPT_VIOLATION, say_ept_violation},
	{EXIT_REASON_WBINVD, say_wbinvd},
	{EXIT_REASON_APIC_WRITE, say_apic_write},
	{EXIT_REASON_PML_FULL, say_pml_full},
	{EXIT_REASON_SPP, say_spp},
	{EXIT_REASON_INSTRUCTION_TIMEOUT, say_instruction_timeout},
	{EXIT_REASON_GDTR_IDTR_ACCESS, say_displacement},
	{EXIT_REASON_LDTR_TR_ACCESS, say_displacement},
	{EXIT_REASON_VMCLEAR, say_displacement},
	{EXIT_REASON_VMPTRLD, say_displacement},
	{EXIT_REASON_VMPTRST, say_displacement},
	{EXIT_REASON_VMREAD, say_displacement},
	{EXIT_REASON_VMWRITE, say_displacement},
	{EXIT_REASON_VMXON, say_displacement},
	{EXIT_REASON_XSAVES, say_displacement},
	{EXIT_REASON_XRSTORS, say_displacement},
	{EXIT_REASON_INVEPT, say_displacement},
	{EXIT_REASON_INVPCID, say_displacement},
	{EXIT_REASON_INVVPID, say_displacement},
	{EXIT_REASON_RDMSRLIST, say_msr},
	{EXIT_REASON_WRMSRLIST, say_msr},
	{EXIT_REASON_URDMSR, say_msr},
	{EXIT_REASON_UWRMSR, say_msr},
	{EXIT_REASON_RDMSR_IMMEDIATE, say_msr},
	{EXIT_REASON_WRMSRNS_IMMEDIATE, say_msr},
	{EXIT_REASON_ENQCMD_PASID_TRANSLATION_FAILURE, say_pasid},
	{EXIT_REASON_ENQCMDS_PASID_TRANSLATION_FAILURE, say_pasid},
};

static bool is_exception(uint32_t reason, int vector)
{
	return (reason & BASIC_REASON) == EXIT_REASON_EXCEPTION_OR_NMI &&
	       (vector == VECTOR_DB || vector == VECTOR_PF);
}

/* What says it; NULL for a reason without a qualification, or that is not known here. */
static void (*decoder_of(uint32_t reason))(uint64_t)
{
	for (size_t i = 0; i < sizeof(qualifications) / sizeof(qualifications[0]); i++)
		if (qualifications[i].reason == (reason & BASIC_REASON))
			return qualifications[i].say;
	return NULL;
}

bool describe_has_qualification(uint32_t reason, uint64_t raw, int vector)
{
	return raw || is_exception(reason, vector) || decoder_of(reason);
}

void describe_qualification(uint32_t reason, uint64_t raw, int vector)
{
	void (*decoder)(uint64_t) = decoder_of(reason);
	if (decoder)
		decoder(raw);
	else if (describe_has_qualification(reason, raw, vector))
		say_exception(raw, is_exception(reason, vector) ? vector : NO_VECTOR);
	else
		say("-");
}

/* --- events (tables 25-17, 25-19, 25-20) ----------------------------------------------------------------------- */

static void say_event_name(uint8_t vector, uint64_t type)
{
	const char *name = name_of(&vector_names, vector);
	switch (type) {
	case INTERRUPTION_TYPE_NMI:
	case INTERRUPTION_TYPE_OTHER_EVENT:
		say("(%u) ", vector);
		return;
	case INTERRUPTION_TYPE_HARDWARE_EXCEPTION:
	case INTERRUPTION_TYPE_PRIVILEGED_SOFTWARE_EXCEPTION:
	case INTERRUPTION_TYPE_SOFTWARE_EXCEPTION:
		if (name) {
			say("%s (%u), ", name, vector);
			return;
		}
	}
	say("vector %#x, ", vector);
}

void describe_interruption(uint32_t information)
{
	uint64_t type = bits(information, 10, 8);
	if (!bit(information, 31)) {
		say("none");
		return;
	}
	say_event_name((uint8_t)information, type);
	say("%s", name_of(&interruption_types, type));
	note(bit(information, 11), "error code");
	note(bit(information, 12), "NMI unblocking by IRET");
}

void describe_msr(uint32_t msr)
{
	const char *name = name_of(&msr_names, msr);
	if (name)
		say("%s (%#x)", name, msr);
	else
		say("MSR %#x", msr);
}
