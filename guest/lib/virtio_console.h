/*
 * The port named VIRTIO_CONSOLE_PORT_NAME of a virtio console device: QEMU's virtio-serial-device with a
 * virtserialport. Polled in memory, no interrupts; a notification is the only access that leaves the processor.
 *
 * Not QEMU's virtconsole: that throws output away when its backend is full, where a virtserialport keeps
 * the buffer until all of it has been taken. Ports with names come with the feature MULTIPORT.
 */
#ifndef LIB_VIRTIO_CONSOLE_H
#define LIB_VIRTIO_CONSOLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VIRTIO_CONSOLE_PORT_NAME "vmxlab"

/* Looks for the port and opens it. False: there is none, and what was found instead is left reset. */
bool virtio_console_init(void);

/*
 * Offers these bytes; they must stay where they are, and be offered again, until they have left. Returns how
 * many at their beginning have: 0 while the device holds them, which it does until its backend takes them.
 */
size_t virtio_console_send(const char *bytes, size_t count);

bool virtio_console_can_read(void);

/* Only after virtio_console_can_read said yes. */
uint8_t virtio_console_read(void);

#endif
