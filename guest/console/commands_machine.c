/* The machine itself. */
#include <stdint.h>

#include "console/command.h"
#include "console/operands.h"
#include "console/text.h"
#include "cpu/io.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "vmx_facts.h"

enum {
	RESET_CONTROL_PORT = 0xcf9,
	RESET_CONTROL_HARD = 0x06,
	KEYBOARD_COMMAND_PORT = 0x64,
	KEYBOARD_PULSE_RESET = 0xfe,
};

#define NOT_CANONICAL 0x8000000000000000ull
#define NOT_MAPPED 0x4000000000ull /* beyond the 4 GiB of boot/start.S */

static const struct name fault_list[] = {
	{VECTOR_DE, "de"}, {VECTOR_BP, "bp"}, {VECTOR_UD, "ud"}, {VECTOR_GP, "gp"}, {VECTOR_PF, "pf"}};
static const struct names fault_names = {"fault", fault_list, sizeof(fault_list) / sizeof(fault_list[0])};

static bool run_fault(unsigned int count, char *words[])
{
	const struct name *fault = name_find(&fault_names, words[1]);
	uint32_t quotient = 0;
	(void)count;
	if (!fault)
		return false;
	switch (fault->value) {
	case VECTOR_DE:
		asm volatile("xor %%edx, %%edx; xor %%ecx, %%ecx; div %%ecx"
			     : "+a"(quotient)
			     :
			     : "ecx", "edx");
		break;
	case VECTOR_BP:
		asm volatile("int3");
		break;
	case VECTOR_UD:
		asm volatile("ud2");
		break;
	case VECTOR_GP:
		*(volatile uint8_t *)at_physical(NOT_CANONICAL) = 0;
		break;
	case VECTOR_PF:
		*(volatile uint8_t *)at_physical(NOT_MAPPED) = 0;
		break;
	}
	return true;
}

static bool run_reset(unsigned int count, char *words[])
{
	(void)count;
	(void)words;
	serial_drain();
	outb(RESET_CONTROL_PORT, RESET_CONTROL_HARD); /* chipsets with PCI */
	outb(KEYBOARD_COMMAND_PORT, KEYBOARD_PULSE_RESET);
	say("this machine resets neither by port 0xcf9 nor by the keyboard controller\n");
	return true;
}

const struct command machine_commands[] = {
	{"reset", "", "reset the machine", 0, 0, false, run_reset, NULL, NULL},
	{"fault", "de|bp|ud|gp|pf", "a fault of the monitor, to see it live", 1, 1, false, run_fault,
	 &fault_names, NULL},
	{0},
};
