/* What a VM entry that failed was asked to do. */
#ifndef MONITOR_VMCS_REPORT_H
#define MONITOR_VMCS_REPORT_H

/*
 * "@vmcs f6800=0x.. f6802=0x..": every field of the current VMCS that software writes and the processor has,
 * in as many records as it takes.
 */
void report_vmcs(void);

#endif
