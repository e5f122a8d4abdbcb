/*
 * What the monitor (L1) has done to the processor and must undo: VMX operation, the current VMCS, its local
 * APIC, the second processor. A case undoes all of it at its end. The prompt and a live session keep it from
 * one command to the next, until a case begins.
 */
#ifndef MONITOR_L1_STATE_H
#define MONITOR_L1_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/instructions.h"

/* The VMX instructions that change it, with their outcomes. */
vmx_outcome l1_vmxon(uint64_t region);
vmx_outcome l1_vmxoff(void);
vmx_outcome l1_vmclear(uint64_t region);
vmx_outcome l1_vmptrld(uint64_t region);

bool l1_in_vmx_operation(void);

/* An entry with the current VMCS has succeeded: its launch state is "launched" until a VMCLEAR. */
void l1_entered(void);

/* Whether the current VMCS is the one of which that is known. */
bool l1_launched(void);

/* Keeps the local APIC's setup, to put it back at the end. */
void l1_use_apic(void);

/* The second processor runs what lies at `program`; false where it does not come up. */
bool l1_start_second_processor(uint32_t program);

/*
 * After a script, whatever it did: the processor's state is the monitor's own again. VMX operation and what
 * was set up in it stay.
 */
void l1_settle(void);

/* Out of VMX operation, with nothing left behind: no event that was sent reaches what comes next. */
void l1_undo(void);

#endif
