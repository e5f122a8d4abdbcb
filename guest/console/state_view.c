#include "console/state_view.h"

#include "console/names.h"
#include "console/text.h"
#include "monitor/l1_state.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

#define NO_CURRENT_VMCS (~0ull) /* SDM Vol. 3C, 31.3, VMPTRST */

void state_say(void)
{
	uint64_t current;
	if (!vmx_present())
		say("this processor has no VMX\n");
	else if (!l1_in_vmx_operation())
		say("not in VMX operation\n");
	else if (vmx_vmptrst(&current) != VMX_SUCCEED)
		say("in VMX operation as the monitor knows, but VMPTRST fails: reset\n");
	else if (current == NO_CURRENT_VMCS)
		say("in VMX operation, no current VMCS\n");
	else
		say("in VMX operation, current VMCS %#lx\n", current);
}

static void say_fail_valid(void)
{
	uint64_t number = 0;
	const char *text;
	vmx_vmread(VMCS_VM_INSTRUCTION_ERROR, &number);
	text = name_of(&instruction_errors, number);
	say("VMfailValid(%lu: %s)", number, text ? text : "not assigned");
}

void outcome_say(vmx_outcome outcome)
{
	switch (vmx_outcome_kind(outcome)) {
	case VMX_SUCCEED:
	case VMX_ENTERED:
		say("VMsucceed");
		break;
	case VMX_FAIL_INVALID:
		say("VMfailInvalid");
		break;
	case VMX_FAIL_VALID:
		say_fail_valid();
		break;
	case VMX_FAULT:
		say("fault: ");
		say_vector(vmx_outcome_vector(outcome));
		say(", error code %#x", vmx_outcome_error_code(outcome));
		break;
	}
}

static void say_advice(vmx_outcome outcome)
{
	uint64_t error =
		vmx_outcome_kind(outcome) == VMX_FAIL_VALID ? field_or_0(VMCS_VM_INSTRUCTION_ERROR) : 0;
	if (error == VMX_ERROR_VMLAUNCH_NON_CLEAR_VMCS)
		say(": 'resume' it");
	else if (error == VMX_ERROR_VMRESUME_NON_LAUNCHED_VMCS)
		say(": 'launch' it");
	if (vmx_outcome_kind(outcome) == VMX_FAULT && !l1_in_vmx_operation())
		say(": not in VMX operation; 'vmxon' first, or 'load'");
	else if (outcome == VMX_FAIL_INVALID && l1_in_vmx_operation())
		say(": no current VMCS, or not one that can be; 'vmptrld' first, or 'load'");
}

bool outcome_report(vmx_outcome outcome)
{
	outcome_say(outcome);
	say_advice(outcome);
	say("\n");
	return outcome == VMX_SUCCEED;
}

static bool field_access(const char *instruction, uint32_t field, vmx_outcome outcome)
{
	const char *name = name_of(&field_names, field);
	if (outcome == VMX_SUCCEED)
		return true;
	say("%s of %s (%#x): ", instruction, name ? name : "a field without name", field);
	return outcome_report(outcome);
}

bool field_read(uint32_t field, uint64_t *value)
{
	*value = 0;
	return field_access("VMREAD", field, vmx_vmread(field, value));
}

bool field_write(uint32_t field, uint64_t value)
{
	return field_access("VMWRITE", field, vmx_vmwrite(field, value));
}

uint64_t field_or_0(uint32_t field)
{
	uint64_t value = 0;
	return vmx_vmread(field, &value) == VMX_SUCCEED ? value : 0;
}

bool control_is_set(uint32_t field, uint64_t control)
{
	uint64_t primary = field_or_0(VMCS_PRIMARY_PROCESSOR_BASED_CONTROLS);
	if (field == VMCS_SECONDARY_PROCESSOR_BASED_CONTROLS &&
	    !(primary & PRIMARY_CONTROL_ACTIVATE_SECONDARY_CONTROLS))
		return false;
	return field_or_0(field) & control;
}
