/* The machine's other processor, where it has one: it runs a program, or waits halted. */
#ifndef CPU_SECOND_PROCESSOR_H
#define CPU_SECOND_PROCESSOR_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Has it run the program at a physical address below 4 GiB, from a reset (INIT and SIPIs: SDM Vol. 3A, 9.4.4):
 * in flat 32-bit protected mode without paging, with RFLAGS.IF = 1, an empty IDT and its local APIC software-
 * disabled. Returns whether it got there; false where there is no second processor.
 */
bool second_processor_start(uint32_t program);

/* Takes it away from its program: when this returns it is halted for good, but for another start. */
void second_processor_park(void);

#endif
