/* The last exit, for people. */
#ifndef CONSOLE_EXIT_VIEW_H
#define CONSOLE_EXIT_VIEW_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/entry.h"

/* Takes what the current VMCS and l2_registers hold now for the last exit; `before`: the registers at its entry. */
void exit_remember(const uint64_t before[GENERAL_REGISTERS], uint64_t rflags_before);

/* Shows it, decoded; or says that there was none. */
void exit_show(void);

#endif
