/* VMX operation as the monitor keeps it: what it set up, whether it is in it, and how it gets back out. */
#ifndef VMX_OPERATION_H
#define VMX_OPERATION_H

#include <stdbool.h>
#include <stdint.h>

/* CPUID.1:ECX.VMX[bit 5]. Where it is false no VMX MSR is read and no VMX instruction executed. */
bool vmx_present(void);

/*
 * Sets and locks IA32_FEATURE_CONTROL for VMXON outside SMX (where firmware has not locked it already) and
 * brings CR0 and CR4, CR4.VMXE included, to what VMX operation demands (SDM Vol. 3C, 24.7 and 24.8).
 */
void vmx_prepare(void);

/* The control registers that vmx_prepare chose. */
void vmx_restore_control_registers(void);

/* After a VM exit: GDT, IDT, TR, segments, CR0, CR3, CR4 and EFER are the monitor's again. */
void vmx_restore_monitor(void);

/* The raw value of a capability MSR; false where the processor has none (#GP). */
bool vmx_capability(uint32_t msr, uint64_t *value);

/* The MSRs that vmx_capability answers for, 0 at the end. */
extern const uint32_t vmx_capability_msrs[];

#endif
