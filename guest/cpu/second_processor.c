#include "cpu/second_processor.h"

#include <stddef.h>

#include "cpu/apic.h"
#include "cpu/registers.h"
#include "lib/memory.h"
#include "protocol.h"
#include "vmx_facts.h"

enum {
	TRIES = 64,
	LOOKS = 2048,
	PAGE_SHIFT = 12,
	TO_THE_OTHERS = APIC_DESTINATION_ALL_EXCLUDING_SELF << 18,
};

/* cpu/second_processor_entry.S */
extern const uint8_t second_processor_trampoline[], second_processor_trampoline_end[];
extern const uint8_t second_processor_parked[];
extern volatile uint32_t second_processor_program, second_processor_arrived;

static void send(uint32_t command)
{
	apic_write(APIC_INTERRUPT_COMMAND_LOW, command | TO_THE_OTHERS | ICR_LEVEL_ASSERT);
}

/* CPUID: under a hypervisor an instruction that gives the other processor its turn. */
static bool wait_for_arrival(void)
{
	for (unsigned int i = 0; i < LOOKS && !second_processor_arrived; i++)
		cpuid(0);
	return second_processor_arrived;
}

bool second_processor_start(uint32_t program)
{
	memcpy(at_physical(TRAMPOLINE), second_processor_trampoline,
	       (size_t)(second_processor_trampoline_end - second_processor_trampoline));
	second_processor_program = program;
	second_processor_arrived = 0;
	send(APIC_DELIVERY_MODE_INIT << 8);
	/* A SIPI that comes too early is lost, and one too many is ignored. */
	for (unsigned int i = 0; i < TRIES; i++) {
		send(APIC_DELIVERY_MODE_START_UP << 8 | TRAMPOLINE >> PAGE_SHIFT);
		if (wait_for_arrival())
			return true;
	}
	return false;
}

void second_processor_park(void)
{
	second_processor_start((uint32_t)(uintptr_t)second_processor_parked);
}
