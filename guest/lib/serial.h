/*
 * The serial line: the virtio port (lib/virtio_console.h) where there is one, else the UART (lib/uart.h).
 *
 * Output waits in a buffer and leaves while the monitor does other work, if that calls serial_poll now and
 * then. What may kill the machine is not done before serial_flush: the log must not end before the cause.
 */
#ifndef LIB_SERIAL_H
#define LIB_SERIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void serial_init(void);

/* Takes all of it; waits only where the buffer is full. */
void serial_write(const char *text, size_t bytes);

/* Hands the device what it takes right now. */
void serial_poll(void);

/* Waits until the UART has everything, or the virtio port has handed everything on. */
void serial_flush(void);

/* Waits until the last bit has left the device: a machine that dies may drop what is still in it. */
void serial_drain(void);

/*
 * False: no input is expected until serial_listen(true), which makes long work quicker on an emulated UART.
 * Waits until all output has left.
 */
void serial_listen(bool on);

bool serial_can_read(void);
uint8_t serial_read(void);

#endif
