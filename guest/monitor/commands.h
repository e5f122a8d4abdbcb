/* The commands of the prompt. */
#ifndef MONITOR_COMMANDS_H
#define MONITOR_COMMANDS_H

/* words[0] names the command. An unknown one, or wrong operands, is answered with the usage. */
void command_run(unsigned int count, char *words[]);

/* What the monitor says of itself and of the processor when it starts, and for the command "caps". */
void report_capabilities(void);

#endif
