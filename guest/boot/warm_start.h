/*
 * An INIT resets the processor and leaves memory alone (SDM Vol. 3A, 10.1.1): while the words at WARM_START
 * say so, the ROM's stub (boot/reset.S) then goes to the monitor that is there, instead of loading a new one.
 * Without our ROM an INIT ends in the firmware.
 */
#ifndef BOOT_WARM_START_H
#define BOOT_WARM_START_H

#define WARM_START 0x7000 /* the magic, and the 32-bit address to go on at */
#define WARM_START_MAGIC 0x4d524157

#ifndef __ASSEMBLER__
#include "cpu/traps.h"

/* From now on an INIT that is taken makes recovery_set return once more, with no IDT, TR or data segments. */
void warm_start_arm(const struct recovery *recovery);
void warm_start_disarm(void);
#endif

#endif
