#include "console/exit_view.h"

#include "console/address.h"
#include "console/describe.h"
#include "console/names.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "vmx_facts.h"

enum { INSTRUCTION_BYTES = 15 };

#define INTERRUPTION_VALID (1u << 31)
#define EPT_LINEAR_VALID (1u << 7) /* SDM Vol. 3C, table 28-7 */
#define ACCESS_RIGHTS_L (1u << 13)

/* The last exit as it was: the VMCS may be another one, or another's, when it is shown again. */
static struct {
	bool known;
	uint32_t reason, interruption, error_code, vectoring;
	uint64_t qualification, length, linear, physical, rip;
	uint64_t before[GENERAL_REGISTERS], after[GENERAL_REGISTERS];
	uint64_t rflags_before, rflags;
	uint8_t code[INSTRUCTION_BYTES];
	unsigned int code_bytes;
} last;

/* Exits that come between instructions, or of an access that any instruction may make. */
static const uint32_t not_of_an_instruction[] = {
	EXIT_REASON_EXTERNAL_INTERRUPT,
	EXIT_REASON_TRIPLE_FAULT,
	EXIT_REASON_INIT_SIGNAL,
	EXIT_REASON_SIPI,
	EXIT_REASON_IO_SMI,
	EXIT_REASON_OTHER_SMI,
	EXIT_REASON_INTERRUPT_WINDOW,
	EXIT_REASON_NMI_WINDOW,
	EXIT_REASON_ENTRY_FAILURE_GUEST_STATE,
	EXIT_REASON_ENTRY_FAILURE_MSR_LOADING,
	EXIT_REASON_MONITOR_TRAP_FLAG,
	EXIT_REASON_ENTRY_FAILURE_MACHINE_CHECK,
	EXIT_REASON_TPR_BELOW_THRESHOLD,
	EXIT_REASON_VIRTUALIZED_EOI,
	EXIT_REASON_EPT_VIOLATION,
	EXIT_REASON_EPT_MISCONFIGURATION,
	EXIT_REASON_PREEMPTION_TIMER,
	EXIT_REASON_APIC_WRITE,
	EXIT_REASON_PML_FULL,
	EXIT_REASON_SPP,
	EXIT_REASON_BUS_LOCK,
	EXIT_REASON_INSTRUCTION_TIMEOUT,
};

/* INT3, INTO, INT1 and the like are instructions; #PF, NMI and the like are not. */
static bool is_software_event(uint32_t information)
{
	uint32_t type = information >> 8 & 7;
	return type >= INTERRUPTION_TYPE_SOFTWARE_INTERRUPT && type <= INTERRUPTION_TYPE_SOFTWARE_EXCEPTION;
}

uint64_t exit_instruction_length(void)
{
	uint64_t reason = field_or_0(VMCS_EXIT_REASON) & 0xffff;
	if (reason == EXIT_REASON_EXCEPTION_OR_NMI &&
	    !is_software_event((uint32_t)field_or_0(VMCS_EXIT_INTERRUPTION_INFORMATION)))
		return 0;
	for (size_t i = 0; i < sizeof(not_of_an_instruction) / sizeof(not_of_an_instruction[0]); i++)
		if (reason == not_of_an_instruction[i])
			return 0;
	return field_or_0(VMCS_EXIT_INSTRUCTION_LENGTH);
}

/* The instruction at the exit's RIP, if the exit says how long it is. */
static void remember_code(void)
{
	struct address address = {GUEST_LINEAR, last.rip};
	last.code_bytes = 0;
	if (last.length == 0 || last.length > INSTRUCTION_BYTES)
		return;
	if (!(field_or_0(VMCS_GUEST_CS_ACCESS_RIGHTS) & ACCESS_RIGHTS_L))
		address.at = (uint32_t)(field_or_0(VMCS_GUEST_CS_BASE) + last.rip);
	if (address_read(address, last.code, (unsigned int)last.length, true))
		last.code_bytes = (unsigned int)last.length;
}

void exit_remember(const uint64_t before[GENERAL_REGISTERS], uint64_t rflags_before)
{
	last.known = true;
	last.reason = (uint32_t)field_or_0(VMCS_EXIT_REASON);
	last.interruption = (uint32_t)field_or_0(VMCS_EXIT_INTERRUPTION_INFORMATION);
	last.error_code = (uint32_t)field_or_0(VMCS_EXIT_INTERRUPTION_ERROR_CODE);
	last.vectoring = (uint32_t)field_or_0(VMCS_IDT_VECTORING_INFORMATION);
	last.qualification = field_or_0(VMCS_EXIT_QUALIFICATION);
	last.length = exit_instruction_length();
	last.linear = field_or_0(VMCS_GUEST_LINEAR_ADDRESS);
	last.physical = field_or_0(VMCS_GUEST_PHYSICAL_ADDRESS);
	last.rip = field_or_0(VMCS_GUEST_RIP);
	last.rflags = field_or_0(VMCS_GUEST_RFLAGS);
	last.rflags_before = rflags_before;
	memcpy(last.before, before, sizeof(last.before));
	memcpy(last.after, l2_registers, sizeof(last.after));
	remember_code();
}

static bool is(uint32_t reason)
{
	return (last.reason & 0xffff) == reason;
}

static bool first_part;

/* What is to be told stands one behind the other; "-" where there is nothing. */
static void next_part(void)
{
	say("%s", first_part ? "" : "; ");
	first_part = false;
}

static void say_event(void)
{
	next_part();
	describe_interruption(last.interruption);
	if (last.interruption & 1u << 11)
		say(" %#x", last.error_code);
}

static void say_addresses(void)
{
	if (!is(EXIT_REASON_EPT_VIOLATION) && !is(EXIT_REASON_EPT_MISCONFIGURATION))
		return;
	next_part();
	say("GPA %#lx", last.physical);
	if (is(EXIT_REASON_EPT_VIOLATION) && last.qualification & EPT_LINEAR_VALID)
		say("; linear %#lx", last.linear);
}

/* What the registers say where there is no qualification for it. */
static void say_operands(void)
{
	uint32_t eax = (uint32_t)last.after[GPR_RAX], ecx = (uint32_t)last.after[GPR_RCX];
	uint64_t edx = (uint32_t)last.after[GPR_RDX];
	if (is(EXIT_REASON_RDMSR)) {
		next_part();
		say("read of ");
		describe_msr(ecx);
	} else if (is(EXIT_REASON_WRMSR)) {
		next_part();
		say("write of %#lx to ", edx << 32 | eax);
		describe_msr(ecx);
	} else if (is(EXIT_REASON_CPUID)) {
		next_part();
		say("leaf %#x, subleaf %#x", eax, ecx);
	}
}

/* Of WRMSR and WBINVD it says no more than the reason does, if it is 0. */
static void say_qualification(bool event)
{
	int vector = is(EXIT_REASON_EXCEPTION_OR_NMI) && event ? (uint8_t)last.interruption : NO_VECTOR;
	bool plain = is(EXIT_REASON_WRMSR) || is(EXIT_REASON_WBINVD);
	if (!describe_has_qualification(last.reason, last.qualification, vector) ||
	    (plain && !last.qualification))
		return;
	next_part();
	describe_qualification(last.reason, last.qualification, vector);
}

static void say_what(void)
{
	bool event = last.interruption & INTERRUPTION_VALID;
	say("exit: ");
	describe_reason(last.reason);
	say(" (%u): ", last.reason & 0xffff);
	first_part = true;
	if (event)
		say_event();
	say_qualification(event);
	say_addresses();
	say_operands();
	if (last.vectoring & INTERRUPTION_VALID) {
		next_part();
		say("while delivering ");
		describe_interruption(last.vectoring);
	}
	say("%s\n", first_part ? "-" : "");
}

static void say_change(const char *name, uint64_t before, uint64_t after, bool *any)
{
	if (before == after)
		return;
	say("%s%s %#lx -> %#lx", *any ? ", " : "  changed: ", name, before, after);
	*any = true;
}

static void say_where(void)
{
	bool any = false;
	say("  rip %#lx", last.rip);
	if (last.length)
		say(", instruction length %lu", last.length);
	if (last.code_bytes)
		say(":");
	for (unsigned int i = 0; i < last.code_bytes; i++)
		say(" %02x", last.code[i]);
	say("\n");
	for (unsigned int i = 0; i < GENERAL_REGISTERS; i++)
		say_change(name_of(&register_names, i), last.before[i], last.after[i], &any);
	say_change("rflags", last.rflags_before, last.rflags, &any);
	if (any)
		say("\n");
}

void exit_show(void)
{
	if (!last.known) {
		say("there was no exit yet\n");
		return;
	}
	say_what();
	say_where();
}
