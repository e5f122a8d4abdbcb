/*
 * The local APIC of the processor that asks, in xAPIC mode where it stands after a reset
 * (SDM Vol. 3A, 11.4.1). Registers are named by their offset: APIC_... in vmx_facts.h.
 */
#ifndef CPU_APIC_H
#define CPU_APIC_H

#include <stdint.h>

uint32_t apic_read(uint32_t offset);
void apic_write(uint32_t offset, uint32_t value);

/* Remembers how the APIC is set up. */
void apic_save(void);

/*
 * As apic_save found it, and silent: its timer stopped (unless it ran before), nothing requested or in
 * service; NMIs unblocked, and none pending. Takes for that what interrupts and NMIs there are: the caller has
 * set trap_events_wanted. An INIT that is pending stays so.
 */
void apic_restore(void);

#endif
