/* The commands of the prompt, together. */
#ifndef CONSOLE_COMMANDS_H
#define CONSOLE_COMMANDS_H

#include "console/line_editor.h"

/* Does what a line says. An unknown command, or wrong operands, is answered with the usage. */
void command_line(char *line);

/* Completes commands and their operands. */
complete_function command_complete;

#endif
