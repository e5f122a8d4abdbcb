/* VM entry and VM exit: from C into L2 and back. */
#ifndef VMX_ENTRY_H
#define VMX_ENTRY_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/instructions.h"

enum { GENERAL_REGISTERS = 16, REGISTER_RSP = 4 };

/* L2's general registers in the SDM's order; [REGISTER_RSP] is unused: the VMCS holds RSP. */
extern uint64_t l2_registers[GENERAL_REGISTERS];

/*
 * Loads l2_registers, executes VMLAUNCH or VMRESUME, and returns when L2 exits (VMX_ENTERED, with
 * l2_registers saved) or when the instruction itself fails. Needs HOST_RIP = vmx_exit_entry; what else the
 * exit loaded into the processor is put right again before it returns.
 */
vmx_outcome vmx_enter(bool resume);

/* What the exit stub loads again first of all, before a stack can be used. */
extern uint64_t monitor_cr3;

#endif
