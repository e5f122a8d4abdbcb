/* What stands in the current VMCS. */
#ifndef MONITOR_VMCS_REPORT_H
#define MONITOR_VMCS_REPORT_H

#include <stdbool.h>

#include "vmx/instructions.h"

/*
 * What a VM entry that failed was asked to do: "@vmcs f6800=0x.. f6802=0x..", every field of the current VMCS
 * that software writes and the processor has, in as many records as it takes.
 */
void report_vmcs(void);

/*
 * "@snapshot f6800=0x.. ... rax=0x..": every field that the processor has, and L2's general registers but RSP,
 * in as many records as it takes. Where `all` is false, only what is not as the last snapshot said; one record
 * there is in any case. Fails as a VMREAD would.
 */
vmx_outcome report_snapshot(bool all);

#endif
