/* The 16550 UART at COM1: polled, 115200 baud, 8 data bits, FIFOs on. */
#ifndef LIB_SERIAL_H
#define LIB_SERIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void serial_init(void);

/* Sends all of it; waits as long as the UART needs. */
void serial_write(const char *text, size_t bytes);

/* Waits until the last bit has left the UART: before the machine is ended or reset. */
void serial_drain(void);

bool serial_can_read(void);
uint8_t serial_read(void);

#endif
