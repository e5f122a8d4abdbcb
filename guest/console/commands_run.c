/* VM entries and exits. */
#include <stdint.h>

#include "console/command.h"
#include "console/describe.h"
#include "console/exit_view.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/step.h"
#include "console/text.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/exits.h"
#include "monitor/l1_state.h"
#include "monitor/vmcs_report.h"
#include "vmx/entry.h"
#include "vmx/instructions.h"
#include "vmx_facts.h"

extern const uint8_t vmx_exit_entry[];

/* Every exit comes back to the person. */
static struct exit_policy every_exit_stops;

/* --- entries ----------------------------------------------------------------------------------------------- */

static void warn_before_entry(void)
{
	uint64_t pin = field_or_0(VMCS_PIN_BASED_CONTROLS), host_rip;
	if (vmx_vmread(VMCS_HOST_RIP, &host_rip) != VMX_SUCCEED)
		return; /* the entry itself will say it */
	if (host_rip != (uintptr_t)vmx_exit_entry)
		say("note: HOST_RIP is %#lx, not %#lx, where the monitor takes exits ('host' writes it)\n",
		    host_rip, (uint64_t)(uintptr_t)vmx_exit_entry);
	if (!(pin & PIN_CONTROL_ACTIVATE_PREEMPTION_TIMER))
		say("note: the preemption timer is not active: nothing ends L2 if it never exits\n");
}

/* Why VMLAUNCH or VMRESUME failed; with all fields, where they are the cause. */
static void say_failed_entry(vmx_outcome outcome)
{
	uint64_t error = field_or_0(VMCS_VM_INSTRUCTION_ERROR);
	if (vmx_outcome_kind(outcome) == VMX_FAIL_VALID && (error == VMX_ERROR_ENTRY_INVALID_CONTROL_FIELDS ||
							    error == VMX_ERROR_ENTRY_INVALID_HOST_STATE)) {
		report_vmcs();
		say("'vmxlab check LOG' names the rules of VM entry that are broken\n");
	}
	outcome_report(outcome);
}

static void say_failed_late(void)
{
	report_vmcs();
	say("the entry failed; 'vmxlab check LOG' names the rules of VM entry that are broken\n");
}

/* One entry and its exit, reported and remembered. False where the instruction failed. */
static bool enter(bool resume)
{
	uint64_t before[GENERAL_REGISTERS], rflags = field_or_0(VMCS_GUEST_RFLAGS);
	vmx_outcome failure = VMX_SUCCEED;
	memcpy(before, l2_registers, sizeof(before));
	before[REGISTER_RSP] = field_or_0(VMCS_GUEST_RSP);
	serial_drain(); /* if this entry kills the machine, what was said before it must not die with it */
	exits_run(&every_exit_stops, resume, 1, &failure);
	if (failure != VMX_SUCCEED) {
		say_failed_entry(failure);
		return false;
	}
	exit_remember(before, rflags);
	return true;
}

static bool enter_and_show(bool resume)
{
	warn_before_entry();
	if (!enter(resume))
		return false;
	if (field_or_0(VMCS_EXIT_REASON) & EXIT_REASON_ENTRY_FAILURE_BIT)
		say_failed_late();
	exit_show();
	return true;
}

static bool run_launch(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	enter_and_show(false);
	return true;
}

static bool run_resume(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	enter_and_show(true);
	return true;
}

static bool has_current_vmcs(void)
{
	uint64_t rip;
	return field_read(VMCS_GUEST_RIP, &rip);
}

/* What an exit that is no good end of a step may mean. */
static void note_of_step(uint64_t rip_before)
{
	bool moved = field_or_0(VMCS_GUEST_RIP) != rip_before;
	bool by_mtf = (field_or_0(VMCS_EXIT_REASON) & 0xffff) == EXIT_REASON_MONITOR_TRAP_FLAG;
	if (!moved && !exit_instruction_length())
		say("note: RIP is where it was: a jump to itself, or nothing was executed\n");
	else if (moved && step_is_by_mtf() && !by_mtf)
		say("note: the monitor trap flag made no exit; 'step tf' is the other way\n");
}

static bool run_step(unsigned int count, char *words[])
{
	enum step_way way = STEP_BY_ANY;
	uint64_t rip;
	if (count && word_is(words[1], "mtf"))
		way = STEP_BY_MTF;
	else if (count && word_is(words[1], "tf"))
		way = STEP_BY_TF;
	else if (count)
		return false;
	if (!field_read(VMCS_GUEST_RIP, &rip) || !step_prepare(way))
		return true;
	if (!enter(l1_launched())) {
		step_end();
		return true;
	}
	step_end();
	exit_show();
	note_of_step(rip);
	return true;
}

/* False, and said, where the exit is about no instruction, and tells no length. */
static bool skip_instruction(void)
{
	if (!exit_instruction_length()) {
		say("the last exit is about no instruction, so it tells no length: 'reg rip' sets RIP\n");
		return false;
	}
	exits_skip_instruction();
	return true;
}

static bool run_skip(unsigned int count, char *words[])
{
	uint64_t rip;
	(void)count;
	(void)words;
	if (!has_current_vmcs())
		return true;
	if (skip_instruction() && field_read(VMCS_GUEST_RIP, &rip))
		say("rip = %#lx\n", rip);
	return true;
}

static bool run_go(unsigned int count, char *words[])
{
	enum { MOST = 1000 };
	uint64_t times = 1;
	if (count && !limited_operand(words[1], "a number of exits", MOST, &times))
		return false;
	if (!has_current_vmcs())
		return true;
	for (; times; times--) {
		if (!skip_instruction() || !enter_and_show(true) ||
		    field_or_0(VMCS_EXIT_REASON) & EXIT_REASON_ENTRY_FAILURE_BIT)
			break;
	}
	return true;
}

static bool run_exit(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	exit_show();
	return true;
}

/* --- registers --------------------------------------------------------------------------------------------- */

/* Those that the VMCS holds; the others are in l2_registers, by their numbers. */
#define VMCS_HOLDS(field) (1ull << 32 | (field))

static const struct name l2_register_list[] = {
	{GPR_RAX, "rax"},
	{GPR_RCX, "rcx"},
	{GPR_RDX, "rdx"},
	{GPR_RBX, "rbx"},
	{VMCS_HOLDS(VMCS_GUEST_RSP), "rsp"},
	{GPR_RBP, "rbp"},
	{GPR_RSI, "rsi"},
	{GPR_RDI, "rdi"},
	{GPR_R8, "r8"},
	{GPR_R9, "r9"},
	{GPR_R10, "r10"},
	{GPR_R11, "r11"},
	{GPR_R12, "r12"},
	{GPR_R13, "r13"},
	{GPR_R14, "r14"},
	{GPR_R15, "r15"},
	{VMCS_HOLDS(VMCS_GUEST_RIP), "rip"},
	{VMCS_HOLDS(VMCS_GUEST_RFLAGS), "rflags"},
	{VMCS_HOLDS(VMCS_GUEST_CR0), "cr0"},
	{VMCS_HOLDS(VMCS_GUEST_CR3), "cr3"},
	{VMCS_HOLDS(VMCS_GUEST_CR4), "cr4"},
	{VMCS_HOLDS(VMCS_GUEST_DR7), "dr7"},
};
static const struct names l2_registers_names = {"register of L2", l2_register_list,
						sizeof(l2_register_list) / sizeof(l2_register_list[0])};

static bool read_register(const struct name *name, uint64_t *value)
{
	if (name->value >> 32)
		return field_read((uint32_t)name->value, value);
	*value = l2_registers[name->value];
	return true;
}

static bool write_register(const struct name *name, uint64_t value)
{
	if (name->value >> 32)
		return field_write((uint32_t)name->value, value);
	l2_registers[name->value] = value;
	return true;
}

static void show_registers(void)
{
	enum { IN_A_LINE = 3 };
	for (size_t i = 0; i < l2_registers_names.count; i++) {
		uint64_t value;
		if (!read_register(&l2_register_list[i], &value))
			return;
		say("  %-6s %016lx%s", l2_register_list[i].text, value,
		    i % IN_A_LINE == IN_A_LINE - 1 || i + 1 == l2_registers_names.count ? "\n" : "");
	}
}

static bool run_reg(unsigned int count, char *words[])
{
	const struct name *name;
	uint64_t value;
	if (!count) {
		show_registers();
		return true;
	}
	name = name_find(&l2_registers_names, words[1]);
	if (!name || (count == 2 && !number_operand(words[2], &value)))
		return false;
	if (count == 2 && !write_register(name, value))
		return true;
	if (read_register(name, &value))
		say("%s = %#lx\n", name->text, value);
	return true;
}

/* --- decode ------------------------------------------------------------------------------------------------ */

static bool run_decode(unsigned int count, char *words[])
{
	uint64_t reason, qualification = 0, event = 0;
	if (!name_or_number(&exit_reason_names, words[1], &reason) || reason > UINT32_MAX ||
	    (count > 1 && !number_operand(words[2], &qualification)) ||
	    (count > 2 && !limited_operand(words[3], "interruption information", UINT32_MAX, &event)))
		return false;
	say("reason         ");
	describe_reason((uint32_t)reason);
	if (count > 1) {
		say("\nqualification  ");
		describe_qualification((uint32_t)reason, qualification,
				       event >> 31 ? (uint8_t)event : NO_VECTOR);
	}
	if (count > 2) {
		say("\nevent          ");
		describe_interruption((uint32_t)event);
	}
	say("\n");
	return true;
}

static const struct name step_way_list[] = {{0, "mtf"}, {0, "tf"}};
static const struct names step_ways = {"way", step_way_list, 2};

const struct command run_commands[] = {
	{"launch", "", "VMLAUNCH, and the exit", 0, 0, true, run_launch, NULL,
	 "The exit comes as a record and decoded. What is entered is the current VMCS; 'load' sets one "
	 "up.\n"},
	{"resume", "", "VMRESUME, and the exit", 0, 0, true, run_resume, NULL, NULL},
	{"step", "[mtf|tf]", "one instruction of L2", 0, 1, true, run_step, &step_ways,
	 "By the monitor trap flag where the processor has it, else by RFLAGS.TF and a #DB that exits. What "
	 "it\n"
	 "changes in the VMCS is put back.\n"},
	{"skip", "", "L2's RIP past the instruction", 0, 0, true, run_skip, NULL, NULL},
	{"go", "[N]", "skip and resume, N times", 0, 1, true, run_go, NULL, NULL},
	{"exit", "", "the last exit again, decoded", 0, 0, true, run_exit, NULL, NULL},
	{"reg", "[NAME [VALUE]]", "L2's registers", 0, 2, true, run_reg, &l2_registers_names, NULL},
	{"decode", "REASON [QUAL [EVENT]]", "an exit's numbers, in words", 1, 3, false, run_decode,
	 &exit_reason_names, "QUAL: exit qualification; EVENT: VM-exit interruption information.\n"},
	{0},
};
