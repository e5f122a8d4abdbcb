#include "vmx/operation.h"

#include "cpu/gdt.h"
#include "cpu/registers.h"
#include "cpu/traps.h"
#include "vmx/entry.h"
#include "vmx/instructions.h"
#include "vmx_facts.h"

#define CPUID_1_ECX_VMX (1u << 5) /* SDM Vol. 3C, 24.6 */

const uint32_t vmx_capability_msrs[] = {
	MSR_IA32_FEATURE_CONTROL,
	MSR_IA32_VMX_BASIC,
	MSR_IA32_VMX_PINBASED_CTLS,
	MSR_IA32_VMX_PROCBASED_CTLS,
	MSR_IA32_VMX_EXIT_CTLS,
	MSR_IA32_VMX_ENTRY_CTLS,
	MSR_IA32_VMX_MISC,
	MSR_IA32_VMX_CR0_FIXED0,
	MSR_IA32_VMX_CR0_FIXED1,
	MSR_IA32_VMX_CR4_FIXED0,
	MSR_IA32_VMX_CR4_FIXED1,
	MSR_IA32_VMX_VMCS_ENUM,
	MSR_IA32_VMX_PROCBASED_CTLS2,
	MSR_IA32_VMX_EPT_VPID_CAP,
	MSR_IA32_VMX_TRUE_PINBASED_CTLS,
	MSR_IA32_VMX_TRUE_PROCBASED_CTLS,
	MSR_IA32_VMX_TRUE_EXIT_CTLS,
	MSR_IA32_VMX_TRUE_ENTRY_CTLS,
	MSR_IA32_VMX_VMFUNC,
	MSR_IA32_VMX_PROCBASED_CTLS3,
	MSR_IA32_VMX_EXIT_CTLS2,
	0,
};

uint64_t monitor_cr3;
static uint64_t monitor_cr0, monitor_cr4, monitor_efer;

bool vmx_present(void)
{
	return cpuid(1).ecx & CPUID_1_ECX_VMX;
}

bool vmx_capability(uint32_t msr, uint64_t *value)
{
	return vmx_present() && try_rdmsr(msr, value) == VMX_SUCCEED;
}

static uint64_t with_fixed_bits(uint64_t value, uint32_t fixed0_msr, uint32_t fixed1_msr)
{
	uint64_t fixed0 = 0, fixed1 = ~0ull;
	vmx_capability(fixed0_msr, &fixed0);
	vmx_capability(fixed1_msr, &fixed1);
	return (value | fixed0) & fixed1;
}

void vmx_prepare(void)
{
	uint64_t feature_control;
	if (vmx_capability(MSR_IA32_FEATURE_CONTROL, &feature_control) &&
	    !(feature_control & FEATURE_CONTROL_LOCKED))
		try_wrmsr(MSR_IA32_FEATURE_CONTROL, feature_control |
							    FEATURE_CONTROL_VMXON_ENABLED_OUTSIDE_SMX |
							    FEATURE_CONTROL_LOCKED);
	monitor_cr0 = read_cr0();
	monitor_cr4 = read_cr4();
	if (vmx_present()) {
		monitor_cr0 = with_fixed_bits(monitor_cr0, MSR_IA32_VMX_CR0_FIXED0, MSR_IA32_VMX_CR0_FIXED1);
		monitor_cr4 = with_fixed_bits(monitor_cr4 | CR4_VMXE, MSR_IA32_VMX_CR4_FIXED0,
					      MSR_IA32_VMX_CR4_FIXED1);
	}
	monitor_cr3 = read_cr3();
	try_rdmsr(MSR_IA32_EFER, &monitor_efer);
	vmx_restore_control_registers();
}

void vmx_restore_control_registers(void)
{
	/* Only what differs: each of these writes may be an exit to L0. */
	if (read_cr3() != monitor_cr3)
		write_cr3(monitor_cr3);
	if (read_cr0() != monitor_cr0)
		write_cr0(monitor_cr0);
	if (read_cr4() != monitor_cr4)
		write_cr4(monitor_cr4);
}

void vmx_restore_monitor(void)
{
	uint64_t efer;
	vmx_restore_control_registers();
	if (try_rdmsr(MSR_IA32_EFER, &efer) == VMX_SUCCEED && efer != monitor_efer)
		try_wrmsr(MSR_IA32_EFER, monitor_efer);
	gdt_reload();
	traps_reload();
}
