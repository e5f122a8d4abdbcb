/*
 * The 16550 UART at COM1: polled, 115200 baud, 8 data bits, FIFOs on.
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

/* Hands the UART what it takes right now. */
void serial_poll(void);

/* Waits until the UART has everything. */
void serial_flush(void);

/* Waits until the last bit has left the UART: a machine that dies may drop what is still in it. */
void serial_drain(void);

bool serial_can_read(void);
uint8_t serial_read(void);

#endif
