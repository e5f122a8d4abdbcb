#include "cpu/apic.h"

#include <stdbool.h>
#include <stddef.h>

#include "cpu/traps.h"
#include "lib/memory.h"
#include "vmx_facts.h"

enum {
	VECTORS = 256,
	SPURIOUS_VECTOR = 0xff,
	DRAIN_VECTOR = 0xfe,
	NMI_ROUNDS = 3, /* one is taken, one more may be pending behind it */
	WORD_STRIDE = APIC_INTERRUPT_REQUEST_1 - APIC_INTERRUPT_REQUEST_0,
	WORDS = 8, /* of the 256-bit registers */
};

/* In the order in which they are written again: local vectors before what may mask them all. */
static struct {
	uint16_t offset;
	uint32_t value;
} setup[] = {
	{APIC_TASK_PRIORITY, 0},
	{APIC_LOGICAL_DESTINATION, 0},
	{APIC_DESTINATION_FORMAT, 0},
	{APIC_LVT_THERMAL_SENSOR, 0},
	{APIC_LVT_PERFORMANCE_MONITORING_COUNTERS, 0},
	{APIC_LVT_LINT0, 0},
	{APIC_LVT_LINT1, 0},
	{APIC_LVT_ERROR, 0},
	{APIC_LVT_TIMER, 0},
	{APIC_DIVIDE_CONFIGURATION, 0},
	{APIC_SPURIOUS_INTERRUPT_VECTOR, 0},
	{APIC_INITIAL_COUNT, 0},
};

uint32_t apic_read(uint32_t offset)
{
	return *(volatile uint32_t *)at_physical(APIC_DEFAULT_BASE + offset);
}

void apic_write(uint32_t offset, uint32_t value)
{
	*(volatile uint32_t *)at_physical(APIC_DEFAULT_BASE + offset) = value;
}

void apic_save(void)
{
	for (size_t i = 0; i < sizeof(setup) / sizeof(setup[0]); i++)
		setup[i].value = apic_read(setup[i].offset);
}

static bool any(uint32_t first_word)
{
	for (uint32_t i = 0; i < WORDS; i++)
		if (apic_read(first_word + i * WORD_STRIDE))
			return true;
	return false;
}

static void take_interrupts(void)
{
	for (unsigned int i = 0; i < VECTORS && any(APIC_INTERRUPT_REQUEST_0); i++)
		asm volatile("sti; nop; cli" : : : "memory");
}

void apic_restore(void)
{
	apic_write(APIC_LVT_TIMER, LVT_MASKED);
	apic_write(APIC_INITIAL_COUNT, 0);
	apic_write(APIC_TASK_PRIORITY, 0);
	apic_write(APIC_SPURIOUS_INTERRUPT_VECTOR, SVR_SOFTWARE_ENABLE | SPURIOUS_VECTOR);
	for (unsigned int i = 0; i < VECTORS && any(APIC_IN_SERVICE_0); i++)
		apic_write(APIC_EOI, 0);
	/* KVM may have forgotten that an NMI waits, and looks again when there is an interrupt to deliver. */
	for (unsigned int i = 0; i < NMI_ROUNDS; i++) {
		nmi_unblock();
		apic_write(APIC_INTERRUPT_COMMAND_LOW,
			   APIC_DESTINATION_SELF << 18 | ICR_LEVEL_ASSERT | DRAIN_VECTOR);
		take_interrupts();
	}
	for (size_t i = 0; i < sizeof(setup) / sizeof(setup[0]); i++)
		apic_write(setup[i].offset, setup[i].value);
}
