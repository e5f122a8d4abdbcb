#include "cpu/heartbeat.h"

#include <stdbool.h>
#include <stdint.h>

#include "cpu/apic.h"
#include "cpu/registers.h"
#include "vmx_facts.h"

/*
 * Where the host and its guest both have RFLAGS.IF = 0 at a VM entry, Bochs 2.7 keeps external interrupts
 * masked, though the control "external-interrupt exiting" is 1 (SDM Vol. 3C, 26.2): a KVM in Bochs does not get
 * the processor back from an L2 that loops. But it runs the timer of a guest's local APIC by the
 * VMX-preemption timer, which ends the guest's turn whatever IF is. Masked, the timer changes nothing here.
 * While L1 itself runs that does not help, as KVM then goes on with the guest at once: where L1 waits it uses
 * an instruction that exits (lib/virtio_console.c).
 */
enum {
	VECTOR = 0xff,
	COUNT = 4000000, /* KVM's timer has 1 GHz: 4 ms */
	CPUID_HYPERVISOR = 0x40000000,
};

static bool under_kvm(void)
{
	struct cpuid leaf;
	if (!under_hypervisor())
		return false;
	leaf = cpuid(CPUID_HYPERVISOR);
	return leaf.ebx == 0x4b4d564b && leaf.ecx == 0x564b4d56 && leaf.edx == 0x4d;
}

void heartbeat_start(void)
{
	if (!under_kvm())
		return;
	apic_write(APIC_SPURIOUS_INTERRUPT_VECTOR, SVR_SOFTWARE_ENABLE | VECTOR);
	apic_write(APIC_DIVIDE_CONFIGURATION, APIC_DIVIDE_BY_1);
	apic_write(APIC_LVT_TIMER, LVT_TIMER_PERIODIC | LVT_MASKED | VECTOR);
	apic_write(APIC_INITIAL_COUNT, COUNT);
}
