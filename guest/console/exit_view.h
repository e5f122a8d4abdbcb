/* The last exit, for people. */
#ifndef CONSOLE_EXIT_VIEW_H
#define CONSOLE_EXIT_VIEW_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/entry.h"

/* Takes what the current VMCS and l2_registers hold now for the last exit; `before`: the registers at its entry. */
void exit_remember(const uint64_t before[GENERAL_REGISTERS], uint64_t rflags_before);

/*
 * How long the instruction is that the current VMCS's last exit is about; 0 for an exit that is about none, which
 * leaves the field undefined (SDM Vol. 3C, 28.2.5).
 */
uint64_t exit_instruction_length(void);

/* Shows it, decoded; or says that there was none. */
void exit_show(void);

#endif
