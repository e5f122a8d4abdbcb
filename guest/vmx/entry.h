/* VM entry and VM exit: from C into L2 and back. */
#ifndef VMX_ENTRY_H
#define VMX_ENTRY_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/instructions.h"

enum { GENERAL_REGISTERS = 16, REGISTER_RSP = 4 };

/* L2's general registers in the SDM's order; [REGISTER_RSP] is unused: the VMCS holds RSP. */
extern uint64_t l2_registers[GENERAL_REGISTERS];

/* What an entry loads into them: l2_registers, unless every entry is to have the same ones. */
extern const uint64_t *vmx_registers_from;

/*
 * Loads L2's registers, executes VMLAUNCH or VMRESUME, and returns when L2 exits (VMX_ENTERED, with
 * l2_registers saved) or when the instruction itself fails. Needs HOST_RIP = vmx_exit_entry; what else the
 * exit loaded into the processor is put right again before it returns.
 */
vmx_outcome vmx_enter(bool resume);

/*
 * True: the exit stub leaves out vmx_restore_monitor. For many exits in a row whose host-state area is known to
 * hold the monitor's own state: what is left undone then are the limits of the GDT and the IDT.
 */
extern bool vmx_keep_host_state;

/* What the exit stub loads again first of all, before a stack can be used. */
extern uint64_t monitor_cr3;

#endif
