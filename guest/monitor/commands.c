#include "monitor/commands.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/io.h"
#include "lib/format.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/cases.h"
#include "monitor/records.h"
#include "vmx/instructions.h"
#include "vmx/operation.h"

enum {
	RESET_CONTROL_PORT = 0xcf9,
	RESET_CONTROL_HARD = 0x06,
	KEYBOARD_COMMAND_PORT = 0x64,
	KEYBOARD_PULSE_RESET = 0xfe,
	PEEK_BYTES = 256,
	PEEK_BYTES_PER_LINE = 16,
};

struct command {
	const char *name;
	unsigned int minimum, maximum; /* operands */
	const char *usage;
	/* False: the operands make no sense, show the usage. */
	bool (*run)(const uint64_t *operands, unsigned int count);
};

static const struct command commands[];

static void print_number(uint64_t value)
{
	char text[19];
	text[format_hex(text, value)] = 0;
	print(text);
}

static void print_outcome(vmx_outcome outcome)
{
	if (vmx_outcome_kind(outcome) != VMX_FAULT)
		return;
	print("fault: vector ");
	print_number(vmx_outcome_vector(outcome));
	print(", error code ");
	print_number(vmx_outcome_error_code(outcome));
	print("\n");
}

static bool run_help(const uint64_t *operands, unsigned int count)
{
	(void)operands;
	(void)count;
	for (const struct command *command = commands; command->name; command++) {
		print("  ");
		print(command->usage);
		print("\n");
	}
	return true;
}

static bool run_caps(const uint64_t *operands, unsigned int count)
{
	(void)operands;
	(void)count;
	if (vmx_present())
		report_capabilities();
	else
		print("this processor has no VMX (CPUID.1:ECX.VMX[5] is 0)\n");
	return true;
}

static bool run_rdmsr(const uint64_t *operands, unsigned int count)
{
	uint64_t value;
	vmx_outcome outcome;
	(void)count;
	if (operands[0] > UINT32_MAX)
		return false;
	outcome = try_rdmsr((uint32_t)operands[0], &value);
	print_outcome(outcome);
	if (outcome == VMX_SUCCEED) {
		print_number(value);
		print("\n");
	}
	return true;
}

static bool run_wrmsr(const uint64_t *operands, unsigned int count)
{
	(void)count;
	if (operands[0] > UINT32_MAX)
		return false;
	print_outcome(try_wrmsr((uint32_t)operands[0], operands[1]));
	return true;
}

static bool run_peek(const uint64_t *operands, unsigned int count)
{
	uint64_t bytes = count > 1 ? operands[1] : PEEK_BYTES_PER_LINE;
	if (bytes > PEEK_BYTES)
		return false;
	for (uint64_t i = 0; i < bytes; i++) {
		char digits[3] = {0};
		uint8_t byte;
		vmx_outcome outcome = try_read(at_physical(operands[0] + i), &byte);
		if (outcome != VMX_SUCCEED) {
			print("\n");
			print_outcome(outcome);
			return true;
		}
		format_digits(digits, byte, 2);
		print(digits);
		print((i + 1) % PEEK_BYTES_PER_LINE == 0 || i + 1 == bytes ? "\n" : " ");
	}
	return true;
}

static bool run_run(const uint64_t *operands, unsigned int count)
{
	uint32_t cases = cases_available();
	if (!cases) {
		print("this image holds no cases\n");
		return true;
	}
	if (count && operands[0] >= cases)
		return false;
	cases_run(count ? (uint32_t)operands[0] : 0, count ? 1 : cases);
	return true;
}

static bool run_reset(const uint64_t *operands, unsigned int count)
{
	(void)operands;
	(void)count;
	serial_drain();
	outb(RESET_CONTROL_PORT, RESET_CONTROL_HARD); /* chipsets with PCI */
	outb(KEYBOARD_COMMAND_PORT, KEYBOARD_PULSE_RESET);
	print("this machine resets neither by port 0xcf9 nor by the keyboard controller\n");
	return true;
}

static const struct command commands[] = {
	{"help", 0, 0, "help                      this list", run_help},
	{"caps", 0, 0, "caps                      the VMX capability MSRs, as a record", run_caps},
	{"rdmsr", 1, 1, "rdmsr MSR                 read an MSR", run_rdmsr},
	{"wrmsr", 2, 2, "wrmsr MSR VALUE           write an MSR", run_wrmsr},
	{"peek", 1, 2, "peek ADDRESS [BYTES]      show up to 256 bytes of memory", run_peek},
	{"run", 0, 1, "run [N]                   run the image's cases again, or only case N (from 0)",
	 run_run},
	{"reset", 0, 0, "reset                     reset the machine", run_reset},
	{NULL, 0, 0, NULL, NULL},
};

static void usage(const struct command *command)
{
	print("usage: ");
	print(command->usage);
	print("\n");
}

void command_run(unsigned int count, char *words[])
{
	uint64_t operands[2] = {0};
	for (const struct command *command = commands; command->name; command++) {
		bool good = count - 1 >= command->minimum && count - 1 <= command->maximum;
		if (strcmp(words[0], command->name) != 0)
			continue;
		for (unsigned int i = 1; good && i < count; i++)
			good = parse_number(words[i], &operands[i - 1]);
		if (!good || !command->run(operands, count - 1))
			usage(command);
		return;
	}
	print("there is no command '");
	print(words[0]);
	print("'; 'help' lists them\n");
}

void report_capabilities(void)
{
	record_begin("caps");
	for (const uint32_t *msr = vmx_capability_msrs; *msr; msr++) {
		char key[5] = "m";
		uint64_t value;
		if (!vmx_capability(*msr, &value))
			continue;
		format_digits(key + 1, *msr, 3);
		record_number(key, value);
	}
	record_end();
}
