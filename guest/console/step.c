#include "console/step.h"

#include <stdint.h>

#include "console/state_view.h"
#include "console/text.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum {
	MOST_CHANGES = 6,
	/* Of the preemption timer, where none runs: much more than an instruction needs. */
	TIMER_TICKS = 1 << 20,
};

#define PENDING_DEBUG_BS (1ull << 14) /* SDM Vol. 3C, table 25-4 */
#define INTERRUPTIBILITY_STI_MOV_SS (INTERRUPTIBILITY_BLOCKING_BY_STI | INTERRUPTIBILITY_BLOCKING_BY_MOV_SS)

static struct {
	struct {
		uint32_t field;
		uint64_t value;
	} before[MOST_CHANGES];
	unsigned int count;
	bool clears_tf, by_mtf;
} changes;

static bool change(uint32_t field, uint64_t value)
{
	uint64_t before;
	if (!field_read(field, &before) || !field_write(field, value))
		return false;
	changes.before[changes.count].field = field;
	changes.before[changes.count++].value = before;
	return true;
}

static bool may_be_1(uint32_t msr, uint32_t true_msr, uint32_t control)
{
	uint64_t basic = 0, allowed = 0;
	vmx_capability(MSR_IA32_VMX_BASIC, &basic);
	return vmx_capability(basic >> 55 & 1 ? true_msr : msr, &allowed) && allowed >> 32 & control;
}

/* A processor that takes the monitor trap flag and makes no exit, or a VMCS without a timer, must not hang. */
static bool guard(void)
{
	uint64_t pin;
	if (!field_read(VMCS_PIN_BASED_CONTROLS, &pin))
		return false;
	if (pin & PIN_CONTROL_ACTIVATE_PREEMPTION_TIMER ||
	    !may_be_1(MSR_IA32_VMX_PINBASED_CTLS, MSR_IA32_VMX_TRUE_PINBASED_CTLS,
		      PIN_CONTROL_ACTIVATE_PREEMPTION_TIMER))
		return true;
	return change(VMCS_PIN_BASED_CONTROLS, pin | PIN_CONTROL_ACTIVATE_PREEMPTION_TIMER) &&
	       change(VMCS_VMX_PREEMPTION_TIMER_VALUE, TIMER_TICKS);
}

static bool prepare_mtf(void)
{
	uint64_t primary;
	say("step by the monitor trap flag\n");
	return guard() && field_read(VMCS_PRIMARY_PROCESSOR_BASED_CONTROLS, &primary) &&
	       change(VMCS_PRIMARY_PROCESSOR_BASED_CONTROLS, primary | PRIMARY_CONTROL_MONITOR_TRAP_FLAG);
}

/* Blocking by STI or MOV SS with TF wants BS in the pending debug exceptions (SDM Vol. 3C, 27.3.1.5). */
static bool prepare_pending(void)
{
	uint64_t pending;
	if (!(field_or_0(VMCS_GUEST_INTERRUPTIBILITY_STATE) & INTERRUPTIBILITY_STI_MOV_SS))
		return true;
	return field_read(VMCS_GUEST_PENDING_DEBUG_EXCEPTIONS, &pending) &&
	       field_write(VMCS_GUEST_PENDING_DEBUG_EXCEPTIONS, pending | PENDING_DEBUG_BS);
}

static bool prepare_tf(void)
{
	uint64_t rflags, exceptions;
	say("step by RFLAGS.TF; the #DB exits\n");
	if (!guard() || !field_read(VMCS_EXCEPTION_BITMAP, &exceptions) ||
	    !change(VMCS_EXCEPTION_BITMAP, exceptions | 1u << VECTOR_DB) || !prepare_pending() ||
	    !field_read(VMCS_GUEST_RFLAGS, &rflags))
		return false;
	changes.clears_tf = !(rflags & RFLAGS_TF);
	return field_write(VMCS_GUEST_RFLAGS, rflags | RFLAGS_TF);
}

bool step_prepare(enum step_way way)
{
	bool mtf = may_be_1(MSR_IA32_VMX_PROCBASED_CTLS, MSR_IA32_VMX_TRUE_PROCBASED_CTLS,
			    PRIMARY_CONTROL_MONITOR_TRAP_FLAG);
	bool done;
	changes.count = 0;
	changes.clears_tf = false;
	if (way == STEP_BY_MTF && !mtf)
		say("note: this processor does not allow MONITOR_TRAP_FLAG to be 1\n");
	if (way == STEP_BY_ANY)
		way = mtf ? STEP_BY_MTF : STEP_BY_TF;
	changes.by_mtf = way == STEP_BY_MTF;
	done = way == STEP_BY_MTF ? prepare_mtf() : prepare_tf();
	if (!done)
		step_end();
	return done;
}

bool step_is_by_mtf(void)
{
	return changes.by_mtf;
}

/*
 * TF is L2's own only if it was set before: the exit has saved the one that was set for the step, and with it
 * perhaps a single-step trap that is still pending.
 */
static void clear_tf(void)
{
	uint64_t rflags, pending;
	if (field_read(VMCS_GUEST_RFLAGS, &rflags))
		field_write(VMCS_GUEST_RFLAGS, rflags & ~(uint64_t)RFLAGS_TF);
	if (field_read(VMCS_GUEST_PENDING_DEBUG_EXCEPTIONS, &pending) && pending & PENDING_DEBUG_BS)
		field_write(VMCS_GUEST_PENDING_DEBUG_EXCEPTIONS, pending & ~PENDING_DEBUG_BS);
}

void step_end(void)
{
	while (changes.count) {
		changes.count--;
		field_write(changes.before[changes.count].field, changes.before[changes.count].value);
	}
	if (changes.clears_tf)
		clear_tf();
	changes.clears_tf = false;
}
