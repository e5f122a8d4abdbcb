/*
 * The operations of a script that stand for themselves: memory is filled, an instruction executed, something
 * reported. Those that say what follows (reactions, entries) are monitor/script.c's.
 */
#ifndef MONITOR_OPERATIONS_H
#define MONITOR_OPERATIONS_H

#include <stdbool.h>

#include "monitor/reader.h"
#include "protocol.h"
#include "vmx/instructions.h"

enum { MEMORY_RECORD_BYTES = 256 };

/* Executes one. *outcome is set by those that may fail: how they ended. False: there is no such operation. */
bool operation_execute(struct reader *script, enum op op, vmx_outcome *outcome);

#endif
