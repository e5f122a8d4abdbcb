/* What a command of the prompt is. The files commands_*.c have them, by subject. */
#ifndef CONSOLE_COMMAND_H
#define CONSOLE_COMMAND_H

#include <stdbool.h>

#include "console/names.h"

struct command {
	const char *name;
	const char *operands; /* as the usage shows them */
	const char *summary;
	unsigned int minimum, maximum; /* how many operands */
	bool needs_vmx;                /* not even tried on a processor without */
	/* words[0] is the command. False: the operands make no sense, show the usage. */
	bool (*run)(unsigned int count, char *words[]);
	const struct names *completes; /* what Tab offers for an operand; or NULL */
	const char *details;           /* what 'help NAME' adds; or NULL */
};

/* One subject: its title, and its commands up to one without a name. */
struct command_group {
	const char *title;
	const struct command *commands;
};

extern const struct command vmx_commands[], run_commands[], memory_commands[], bitmap_commands[],
	ept_commands[], case_commands[], machine_commands[];

#endif
