/* VMX operation, the VMCS, capabilities and MSRs. */
#include <stdint.h>

#include "console/command.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "cpu/registers.h"
#include "lib/memory.h"
#include "monitor/capability_report.h"
#include "monitor/l1_state.h"
#include "prompt_facts.h"
#include "protocol.h"
#include "vmx/instructions.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

#define REVISION_MASK 0x7fffffffu

/* --- capabilities ------------------------------------------------------------------------------------------ */

static void say_value(const struct names *names, uint64_t number, uint64_t value)
{
	const char *name = name_of(names, number);
	say("%s%s%#lx%s = %#lx\n", name ? name : "", name ? " (" : "", number, name ? ")" : "", value);
}

/* What a control may be: allowed 0-settings in the low half of the MSR, 1-settings in the high half. */
static void say_control(const struct name *control, uint64_t allowed, bool is_64_bit)
{
	uint64_t bit = 1ull << control->value;
	bool may_be_1 = is_64_bit ? allowed & bit : allowed >> 32 & bit;
	bool must_be_1 = !is_64_bit && allowed & bit;
	say("  %2lu  %-36s  %s\n", control->value, control->text,
	    must_be_1  ? "1"
	    : may_be_1 ? "0 or 1"
		       : "0");
}

static void say_control_set(const struct control_set *set)
{
	bool is_64_bit = (set->field >> 13 & 3) == 1; /* SDM Vol. 3C, table 25-21 */
	uint64_t basic = 0, allowed;
	uint32_t msr = set->msr;
	vmx_capability(MSR_IA32_VMX_BASIC, &basic);
	if (set->true_msr && basic >> 55 & 1)
		msr = set->true_msr;
	if (!vmx_capability(msr, &allowed)) {
		say("this processor has no %s (%#x)\n", name_of(&msr_names, msr), msr);
		return;
	}
	say_value(&msr_names, msr, allowed);
	for (size_t i = 0; i < set->bits.count; i++)
		say_control(&set->bits.list[i], allowed, is_64_bit);
}

static bool run_caps(unsigned int count, char *words[])
{
	if (count) {
		const struct name *set = name_find(&control_set_names, words[1]);
		for (unsigned int i = 0; set && i < CONTROL_SETS_COUNT; i++)
			if (control_sets[i].field == set->value)
				say_control_set(&control_sets[i]);
		return set;
	}
	report_capabilities();
	for (const uint32_t *msr = vmx_capability_msrs; *msr; msr++) {
		uint64_t value;
		if (vmx_capability(*msr, &value))
			say_value(&msr_names, *msr, value);
	}
	return true;
}

/* --- MSRs -------------------------------------------------------------------------------------------------- */

static bool msr_operand(const char *word, uint64_t *msr)
{
	if (!name_or_number(&msr_names, word, msr))
		return false;
	if (*msr <= UINT32_MAX)
		return true;
	say("an MSR's address has 32 bits\n");
	return false;
}

static void say_msr(vmx_outcome outcome, uint64_t msr, uint64_t value)
{
	if (outcome == VMX_SUCCEED) {
		say_value(&msr_names, msr, value);
		return;
	}
	outcome_say(outcome);
	say("\n");
}

static bool run_rdmsr(unsigned int count, char *words[])
{
	uint64_t msr, value = 0;
	vmx_outcome outcome;
	(void)count;
	if (!msr_operand(words[1], &msr))
		return false;
	outcome = try_rdmsr((uint32_t)msr, &value);
	say_msr(outcome, msr, value);
	return true;
}

static bool run_wrmsr(unsigned int count, char *words[])
{
	uint64_t msr, value;
	(void)count;
	if (!msr_operand(words[1], &msr) || !number_operand(words[2], &value))
		return false;
	say_msr(try_wrmsr((uint32_t)msr, value), msr, value);
	return true;
}

/* --- regions ----------------------------------------------------------------------------------------------- */

/* The operand, or the harness's own place for such a region, with the processor's revision identifier in it. */
static bool region_operand(unsigned int count, char *words[], uint64_t own, uint64_t *region)
{
	uint64_t basic = 0;
	uint32_t revision, *word = at_physical(own);
	if (count)
		return number_operand(words[1], region);
	*region = own;
	vmx_capability(MSR_IA32_VMX_BASIC, &basic);
	revision = (uint32_t)basic & REVISION_MASK;
	say("%s %#lx: ", words[0], own);
	if (*word != revision) {
		*word = revision;
		say("revision identifier %#x written, ", revision);
	}
	return true;
}

static bool on_region(unsigned int count, char *words[], uint64_t own, vmx_outcome (*instruction)(uint64_t))
{
	uint64_t region;
	if (!region_operand(count, words, own, &region))
		return false;
	outcome_report(instruction(region));
	return true;
}

static bool run_vmxon(unsigned int count, char *words[])
{
	return on_region(count, words, VMXON_REGION, l1_vmxon);
}

static bool run_vmclear(unsigned int count, char *words[])
{
	return on_region(count, words, VMCS_REGION, l1_vmclear);
}

static bool run_vmptrld(unsigned int count, char *words[])
{
	return on_region(count, words, VMCS_REGION, l1_vmptrld);
}

static bool run_vmxoff(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	outcome_report(l1_vmxoff());
	return true;
}

static bool run_vmptrst(unsigned int count, char *words[])
{
	uint64_t pointer;
	vmx_outcome outcome = vmx_vmptrst(&pointer);
	(void)count;
	(void)words;
	if (outcome == VMX_SUCCEED)
		say("%#lx: ", pointer);
	outcome_report(outcome);
	return true;
}

static bool run_state(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	state_say();
	return true;
}

/* --- fields ------------------------------------------------------------------------------------------------ */

static bool field_operand(const char *word, uint64_t *field)
{
	if (!name_or_number(&field_names, word, field))
		return false;
	if (*field <= UINT32_MAX)
		return true;
	say("a field's encoding has 32 bits\n");
	return false;
}

/* The bits of a set of controls, by name. */
static void say_controls(uint64_t field, uint64_t value)
{
	for (unsigned int i = 0; i < CONTROL_SETS_COUNT; i++) {
		const struct control_set *set = &control_sets[i];
		if (set->field != field)
			continue;
		for (size_t b = 0; b < set->bits.count; b++)
			if (value >> set->bits.list[b].value & 1)
				say("  %s\n", set->bits.list[b].text);
	}
}

static bool run_vmread(unsigned int count, char *words[])
{
	for (unsigned int i = 1; i <= count; i++) {
		uint64_t field, value;
		if (!field_operand(words[i], &field))
			return false;
		if (!field_read((uint32_t)field, &value))
			continue;
		say_value(&field_names, field, value);
		say_controls(field, value);
	}
	return true;
}

static bool run_vmwrite(unsigned int count, char *words[])
{
	uint64_t field, value;
	(void)count;
	if (!field_operand(words[1], &field) || !number_operand(words[2], &value))
		return false;
	if (field_write((uint32_t)field, value) && field_read((uint32_t)field, &value))
		say_value(&field_names, field, value);
	return true;
}

/* Fields that this processor does not have are left out. */
static bool run_vmcs(unsigned int count, char *words[])
{
	const char *part = count ? words[1] : "";
	size_t length = strlen(part), shown = 0;
	uint64_t value;
	if (!field_read(VMCS_VM_INSTRUCTION_ERROR, &value))
		return true;
	for (size_t i = 0; i < field_names.count; i++) {
		const struct name *field = &field_names.list[i];
		if (length && !name_contains(field->text, part, length))
			continue;
		/* To read a field that is not there changes the VM-instruction error: it was read before. */
		if (field->value != VMCS_VM_INSTRUCTION_ERROR &&
		    vmx_vmread(field->value, &value) != VMX_SUCCEED)
			continue;
		say("  0x%04lx  %-44s  %#lx\n", field->value, field->text, value);
		shown++;
	}
	if (!shown)
		say("no field of this VMCS has '%s' in its name\n", part);
	return true;
}

/* --- the host-state area ----------------------------------------------------------------------------------- */

extern const uint8_t monitor_tss[], monitor_gdt[], monitor_idt[], monitor_exit_stack_top[], vmx_exit_entry[];

struct host_field {
	uint32_t field;
	uint64_t value;
};

static bool write_host_fields(const struct host_field *fields, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!field_write(fields[i].field, fields[i].value))
			return false;
	return true;
}

/* What brings an exit back here: SDM Vol. 3C, 25.5. As vmxlab.image.host_state has it. */
static bool run_host(unsigned int count, char *words[])
{
	const struct host_field fields[] = {
		{VMCS_HOST_CR0, read_cr0()},
		{VMCS_HOST_CR3, read_cr3()},
		{VMCS_HOST_CR4, read_cr4()},
		{VMCS_HOST_ES_SELECTOR, SELECTOR_DATA},
		{VMCS_HOST_CS_SELECTOR, SELECTOR_CODE},
		{VMCS_HOST_SS_SELECTOR, SELECTOR_DATA},
		{VMCS_HOST_DS_SELECTOR, SELECTOR_DATA},
		{VMCS_HOST_FS_SELECTOR, SELECTOR_DATA},
		{VMCS_HOST_GS_SELECTOR, SELECTOR_DATA},
		{VMCS_HOST_TR_SELECTOR, SELECTOR_TSS},
		{VMCS_HOST_FS_BASE, 0},
		{VMCS_HOST_GS_BASE, 0},
		{VMCS_HOST_TR_BASE, (uintptr_t)monitor_tss},
		{VMCS_HOST_GDTR_BASE, (uintptr_t)monitor_gdt},
		{VMCS_HOST_IDTR_BASE, (uintptr_t)monitor_idt},
		{VMCS_HOST_IA32_SYSENTER_CS, 0},
		{VMCS_HOST_IA32_SYSENTER_ESP, 0},
		{VMCS_HOST_IA32_SYSENTER_EIP, 0},
		{VMCS_HOST_RSP, (uintptr_t)monitor_exit_stack_top},
		{VMCS_HOST_RIP, (uintptr_t)vmx_exit_entry},
	};
	(void)count;
	(void)words;
	if (write_host_fields(fields, sizeof(fields) / sizeof(fields[0])))
		say("%lu fields of the host-state area are the monitor's own state\n",
		    sizeof(fields) / sizeof(fields[0]));
	return true;
}

const struct command vmx_commands[] = {
	{"caps", "[SET]", "capability MSRs; what a control may be", 0, 1, true, run_caps, &control_set_names,
	 "Sets of controls: pin, primary, secondary, tertiary, exit, secondary_exit, entry. The TRUE MSRs\n"
	 "count where the processor has them.\n"},
	{"rdmsr", "MSR", "read an MSR, by name or number", 1, 1, false, run_rdmsr, &msr_names, NULL},
	{"wrmsr", "MSR VALUE", "write an MSR", 2, 2, false, run_wrmsr, &msr_names, NULL},
	{"vmxon", "[ADDRESS]", "VMXON", 0, 1, true, run_vmxon, NULL,
	 "Without an address it is a region of the monitor's, which gets the processor's revision "
	 "identifier;\n"
	 "the memory at an address is taken as it is.\n"},
	{"vmxoff", "", "VMXOFF", 0, 0, true, run_vmxoff, NULL, NULL},
	{"vmclear", "[ADDRESS]", "VMCLEAR", 0, 1, true, run_vmclear, NULL,
	 "Without an address: the monitor's own VMCS region, which gets the processor's revision "
	 "identifier.\n"},
	{"vmptrld", "[ADDRESS]", "VMPTRLD", 0, 1, true, run_vmptrld, NULL,
	 "Without an address: the monitor's own VMCS region, which gets the processor's revision "
	 "identifier.\n"},
	{"vmptrst", "", "VMPTRST: the current VMCS", 0, 0, true, run_vmptrst, NULL, NULL},
	{"vmread", "FIELD...", "VMREAD, by name or encoding", 1, 16, true, run_vmread, &field_names, NULL},
	{"vmwrite", "FIELD VALUE", "VMWRITE, and what VMREAD then gives", 2, 2, true, run_vmwrite,
	 &field_names, NULL},
	{"vmcs", "[PART]", "all fields; those with PART in the name", 0, 1, true, run_vmcs, &field_names,
	 NULL},
	{"host", "", "the host-state area: the monitor's own", 0, 0, true, run_host, NULL,
	 "For a VMCS that is made by hand: HOST_RIP is where the monitor takes an exit, and so on.\n"},
	{"state", "", "VMX operation and the current VMCS", 0, 0, false, run_state, NULL, NULL},
	{0},
};
