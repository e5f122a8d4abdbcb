/* How the monitor was started. The value is what EAX held at the 32-bit entry. */
#ifndef BOOT_BOOT_H
#define BOOT_BOOT_H

#include <stdint.h>

#define BOOT_MAGIC_ROM 0x4d524c56u       /* boot/reset.S */
#define BOOT_MAGIC_MULTIBOOT 0x2badb002u /* Multiboot Specification 0.6.96, 3.2 */

/* "rom", "multiboot", or "pvh": PVH promises nothing about EAX, so it is what remains. */
const char *boot_loader_name(uint32_t magic);

/* Linker symbols (boot/monitor.ld). */
extern const uint8_t monitor_start[];
extern const uint8_t monitor_end[];

#endif
