#include "console/fault_view.h"

#include <stdint.h>

#include "console/state_view.h"
#include "console/text.h"
#include "cpu/traps.h"
#include "monitor/l1_state.h"

struct shown {
	const char *name;
	uint64_t value;
};

static void say_registers(const struct shown *registers, unsigned int count)
{
	enum { IN_A_LINE = 4 };
	for (unsigned int i = 0; i < count; i++)
		say("%s%-6s %016lx%s", i % IN_A_LINE ? "  " : "  ", registers[i].name, registers[i].value,
		    (i + 1) % IN_A_LINE == 0 || i + 1 == count ? "\n" : "");
}

void fault_show(void)
{
	const struct trap_frame *at = &trap_last.frame;
	const struct shown registers[] = {
		{"rax", at->rax},       {"rcx", at->rcx},       {"rdx", at->rdx},
		{"rbx", at->rbx},       {"rsp", at->rsp},       {"rbp", at->rbp},
		{"rsi", at->rsi},       {"rdi", at->rdi},       {"r8", at->r8},
		{"r9", at->r9},         {"r10", at->r10},       {"r11", at->r11},
		{"r12", at->r12},       {"r13", at->r13},       {"r14", at->r14},
		{"r15", at->r15},       {"rip", at->rip},       {"rflags", at->rflags},
		{"cs", at->cs},         {"ss", at->ss},         {"cr0", trap_last.cr0},
		{"cr2", trap_last.cr2}, {"cr3", trap_last.cr3}, {"cr4", trap_last.cr4},
	};
	say("fault in the monitor (L1): ");
	say_vector((uint8_t)at->vector);
	say(", error code %#lx\n", at->error_code);
	say_registers(registers, sizeof(registers) / sizeof(registers[0]));
	l1_settle();
	state_say();
}
