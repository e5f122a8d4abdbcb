#include "monitor/exits.h"

#include "cpu/apic.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/l1_state.h"
#include "monitor/reader.h"
#include "monitor/records.h"
#include "monitor/vmcs_report.h"
#include "protocol.h"
#include "vmx/entry.h"
#include "vmx/instructions.h"
#include "vmx_facts.h"

#define EXIT_REASON_BASIC 0xffffu
#define INTERRUPTIBILITY_STI_MOV_SS (INTERRUPTIBILITY_BLOCKING_BY_STI | INTERRUPTIBILITY_BLOCKING_BY_MOV_SS)
#define ACCESS_RIGHTS_L (1u << 13) /* SDM Vol. 3C, table 25-2: 64-bit code segment */

/* What the record of an exit holds besides the reason: zero values are left out. */
static const struct {
	const char *key;
	uint32_t field;
} reported[] = {
	{"qual", VMCS_EXIT_QUALIFICATION},           {"len", VMCS_EXIT_INSTRUCTION_LENGTH},
	{"info", VMCS_EXIT_INSTRUCTION_INFORMATION}, {"gla", VMCS_GUEST_LINEAR_ADDRESS},
	{"gpa", VMCS_GUEST_PHYSICAL_ADDRESS},        {"intr", VMCS_EXIT_INTERRUPTION_INFORMATION},
	{"ierr", VMCS_EXIT_INTERRUPTION_ERROR_CODE}, {"idtv", VMCS_IDT_VECTORING_INFORMATION},
	{"iderr", VMCS_IDT_VECTORING_ERROR_CODE},    {"rip", VMCS_GUEST_RIP},
};

/* What the last record said: a register that is as it was is left out. */
static uint64_t last_registers[GENERAL_REGISTERS];
static uint64_t last_rflags;
static uint32_t count;

/* A field that the processor does not have reads as 0, and so is left out. */
static uint64_t read_field(uint32_t field)
{
	uint64_t value = 0;
	return vmx_vmread(field, &value) == VMX_SUCCEED ? value : 0;
}

void exits_reset(struct exit_policy *policy)
{
	memset(policy, 0, sizeof(*policy));
	memset(last_registers, 0, sizeof(last_registers));
	last_rflags = 0;
	count = 0;
}

uint32_t exits_count(void)
{
	return count;
}

static void report_changed(const char *key, uint64_t value, uint64_t *last)
{
	if (value != *last)
		record_number(key, value);
	*last = value;
}

/* `entered_by`: the instruction that a step of the script entered with; NULL where a reaction resumed. */
static void report_exit(const struct exit_policy *policy, uint32_t reason, const char *entered_by)
{
	record_begin("exit");
	record_number("n", count);
	if (entered_by)
		record_word("by", entered_by);
	record_number("reason", reason);
	for (size_t i = 0; i < sizeof(reported) / sizeof(reported[0]); i++)
		record_nonzero(reported[i].key, read_field(reported[i].field));
	report_changed("rflags", read_field(VMCS_GUEST_RFLAGS), &last_rflags);
	l2_registers[REGISTER_RSP] = read_field(VMCS_GUEST_RSP);
	for (unsigned int i = 0; i < GENERAL_REGISTERS; i++)
		report_changed(record_register_keys[i], l2_registers[i], &last_registers[i]);
	for (unsigned int i = 0; i < policy->watched_count; i++)
		record_field(policy->watched[i], read_field(policy->watched[i]));
	record_end();
}

void exits_report(const struct exit_policy *policy, uint32_t reason, const char *entered_by)
{
	report_exit(policy, reason, entered_by);
	count++;
}

/* A failing VMWRITE of a reaction is reported: nothing may look done that was not. */
static void set_field(uint32_t field, uint64_t value)
{
	vmx_outcome outcome = vmx_vmwrite(field, value);
	if (outcome == VMX_SUCCEED)
		return;
	record_begin("vmx");
	record_word("op", "vmwrite");
	record_number("field", field);
	record_outcome(outcome);
	record_end();
}

/*
 * As if the instruction had been executed: RIP past it, in the width of the code segment, and the blocking
 * by STI and MOV SS gone (SDM Vol. 3A, 6.8.3: it lasts for one instruction).
 */
void exits_skip_instruction(void)
{
	uint64_t rip = read_field(VMCS_GUEST_RIP) + read_field(VMCS_EXIT_INSTRUCTION_LENGTH);
	uint64_t interruptibility = read_field(VMCS_GUEST_INTERRUPTIBILITY_STATE);
	if (!(read_field(VMCS_GUEST_CS_ACCESS_RIGHTS) & ACCESS_RIGHTS_L))
		rip = (uint32_t)rip;
	set_field(VMCS_GUEST_RIP, rip);
	if (interruptibility & INTERRUPTIBILITY_STI_MOV_SS)
		set_field(VMCS_GUEST_INTERRUPTIBILITY_STATE,
			  interruptibility & ~(uint64_t)INTERRUPTIBILITY_STI_MOV_SS);
}

static void set_register(unsigned int index, uint64_t value)
{
	if (index == REGISTER_RSP)
		set_field(VMCS_GUEST_RSP, value);
	else
		l2_registers[index % GENERAL_REGISTERS] = value;
}

static void invalidate_ept(uint64_t type, uint64_t eptp)
{
	struct vmx_invalidation descriptor = {eptp, 0};
	vmx_outcome outcome = vmx_invept(type, &descriptor);
	if (outcome == VMX_SUCCEED) {
		record_success("invept");
		return;
	}
	record_begin("vmx");
	record_word("op", "invept");
	record_outcome(outcome);
	record_end();
}

/* Carries out one action; false where it ends the case. */
static bool act(enum action action, struct reader *operands, const char **why)
{
	uint64_t address;
	uint32_t number, bytes;
	const uint8_t *data;
	switch (action) {
	case ACTION_RESUME:
		return true;
	case ACTION_SKIP:
		exits_skip_instruction();
		return true;
	case ACTION_SET_REGISTER:
		number = take8(operands);
		set_register(number, take64(operands));
		return true;
	case ACTION_SET_FIELD:
		number = take32(operands);
		set_field(number, take64(operands));
		return true;
	case ACTION_SET_MEMORY:
		address = take64(operands);
		bytes = take32(operands);
		data = take(operands, bytes);
		if (!operands->overrun)
			memcpy(at_physical(address), data, bytes);
		return true;
	case ACTION_INVEPT:
		address = take64(operands); /* the type */
		invalidate_ept(address, take64(operands));
		return true;
	case ACTION_APIC_WRITE:
		number = take32(operands);
		apic_write(number, take32(operands));
		return true;
	case ACTION_STOP:
		*why = "stop";
		return false;
	}
	*why = "script";
	return false;
}

static bool matches(struct reaction *reaction, uint32_t basic, uint64_t qualification)
{
	uint32_t match;
	if (reaction->reason != basic ||
	    (qualification & reaction->qualification_mask) != reaction->qualification_value)
		return false;
	match = reaction->matches++;
	return match >= reaction->from_match &&
	       (reaction->match_count == 0 || match - reaction->from_match < reaction->match_count);
}

/* The first reaction that applies, or NULL. All of them count the exit, so that their counts agree. */
static const struct reaction *choose(struct exit_policy *policy, uint32_t basic)
{
	uint64_t qualification = read_field(VMCS_EXIT_QUALIFICATION);
	const struct reaction *chosen = NULL;
	for (unsigned int i = 0; i < policy->reaction_count; i++)
		if (matches(&policy->reactions[i], basic, qualification) && !chosen)
			chosen = &policy->reactions[i];
	return chosen;
}

/* Answers an exit: by the first reaction that applies, else by the default of its reason. False ends the case. */
static bool answer(struct exit_policy *policy, uint32_t reason, const char **why)
{
	uint32_t basic = reason & EXIT_REASON_BASIC;
	const struct reaction *reaction = choose(policy, basic);
	struct reader actions = {0};
	if (!reaction)
		return act(basic < EXIT_REASONS ? policy->defaults[basic] : ACTION_STOP, &actions, why);
	actions.position = reaction->actions;
	actions.end = reaction->actions + reaction->action_bytes;
	while (actions.position < actions.end)
		if (!act(take8(&actions), &actions, why))
			return false;
	if (actions.overrun)
		*why = "script";
	return !actions.overrun;
}

static void report_failed_entry(const struct exit_policy *policy, const char *instruction,
				vmx_outcome outcome)
{
	record_begin("vmx");
	record_word("op", instruction);
	record_outcome(outcome);
	record_end();
	/* A fault is the instruction's own; a VMfail of another kind is not about what the VMCS says. */
	if (policy->reports_vmcs && vmx_outcome_kind(outcome) == VMX_FAIL_VALID)
		report_vmcs();
}

const char *exits_run(struct exit_policy *policy, bool resume, uint32_t max_exits, vmx_outcome *failure)
{
	const char *why = "limit";
	const char *first = resume ? "vmresume" : "vmlaunch";
	for (uint32_t exits = 0; exits < max_exits; exits++) {
		vmx_outcome outcome;
		uint32_t reason;
		serial_flush();
		outcome = vmx_enter(resume);
		if (outcome != VMX_ENTERED) {
			report_failed_entry(policy, resume ? "vmresume" : "vmlaunch", outcome);
			*failure = outcome;
			return "vmfail";
		}
		reason = (uint32_t)read_field(VMCS_EXIT_REASON);
		report_exit(policy, reason, first);
		first = NULL;
		count++;
		if (policy->reports_vmcs && reason & EXIT_REASON_ENTRY_FAILURE_BIT)
			report_vmcs();
		/* An entry that failed late leaves the launch state "clear": the next try is a VMLAUNCH again. */
		if (!(reason & EXIT_REASON_ENTRY_FAILURE_BIT)) {
			l1_entered();
			resume = true;
		}
		if (!answer(policy, reason, &why))
			return why;
	}
	return why;
}
