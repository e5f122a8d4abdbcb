#include "monitor/l1_state.h"

#include "boot/warm_start.h"
#include "cpu/apic.h"
#include "cpu/gdt.h"
#include "cpu/second_processor.h"
#include "cpu/traps.h"
#include "monitor/records.h"
#include "vmx/operation.h"

enum { NO_VMCS = 1 /* no VMCS lies at an odd address */ };

static bool in_vmx_operation;
static uint64_t current_vmcs = NO_VMCS, launched_vmcs = NO_VMCS;
static bool apic_used, second_processor_used;

vmx_outcome l1_vmxon(uint64_t region)
{
	vmx_outcome outcome = vmx_vmxon(&region);
	if (outcome == VMX_SUCCEED)
		in_vmx_operation = true;
	return outcome;
}

vmx_outcome l1_vmxoff(void)
{
	vmx_outcome outcome = vmx_vmxoff();
	if (outcome == VMX_SUCCEED)
		in_vmx_operation = false;
	return outcome;
}

vmx_outcome l1_vmclear(uint64_t region)
{
	vmx_outcome outcome = vmx_vmclear(&region);
	if (outcome == VMX_SUCCEED && region == current_vmcs)
		current_vmcs = NO_VMCS;
	if (outcome == VMX_SUCCEED && region == launched_vmcs)
		launched_vmcs = NO_VMCS;
	return outcome;
}

vmx_outcome l1_vmptrld(uint64_t region)
{
	vmx_outcome outcome = vmx_vmptrld(&region);
	if (outcome == VMX_SUCCEED)
		current_vmcs = region;
	return outcome;
}

bool l1_in_vmx_operation(void)
{
	return in_vmx_operation;
}

void l1_entered(void)
{
	launched_vmcs = current_vmcs;
}

bool l1_launched(void)
{
	return current_vmcs != NO_VMCS && launched_vmcs == current_vmcs;
}

void l1_use_apic(void)
{
	if (apic_used)
		return;
	apic_save();
	apic_used = true;
}

bool l1_start_second_processor(uint32_t program)
{
	second_processor_used = true;
	return second_processor_start(program);
}

/* Out of VMX operation; the VMCS is flushed to memory first, as SDM Vol. 3C, 25.11.1 asks. */
static void leave_vmx_operation(void)
{
	if (!in_vmx_operation)
		return;
	if (current_vmcs != NO_VMCS)
		vmx_vmclear(&current_vmcs);
	if (vmx_vmxoff() != VMX_SUCCEED) {
		record_begin("vmx");
		record_word("op", "vmxoff");
		record_outcome(VMX_FAIL_INVALID);
		record_end();
	}
	in_vmx_operation = false;
}

/* The same, where an INIT may wait for the end of VMX operation: it resets the processor, and here it goes on. */
static void leave_vmx_operation_by_init(void)
{
	struct recovery recovery;
	if (recovery_set(&recovery) == 0) {
		warm_start_arm(&recovery);
		leave_vmx_operation();
	} else {
		in_vmx_operation = false;
		gdt_reload();
		traps_reload();
	}
	warm_start_disarm();
}

/*
 * No event of this case may reach the next. Nobody sends any more; then what was sent is taken: an INIT with the
 * end of VMX operation, interrupts and NMIs behind it.
 */
static void leave_with_events(void)
{
	if (second_processor_used)
		second_processor_park();
	leave_vmx_operation_by_init();
	vmx_restore_control_registers();
	apic_restore();
	trap_events_wanted = false;
}

void l1_settle(void)
{
	trap_events_wanted = apic_used;
	vmx_restore_monitor();
}

void l1_undo(void)
{
	if (apic_used) {
		leave_with_events();
	} else {
		leave_vmx_operation();
		vmx_restore_control_registers();
	}
	current_vmcs = launched_vmcs = NO_VMCS;
	apic_used = second_processor_used = false;
}
