/* The 16550 UART at COM1: polled, 115200 baud, 8 data bits, FIFOs on. What lib/serial.c asks of a device. */
#ifndef LIB_UART_H
#define LIB_UART_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void uart_init(void);

/* Hands the UART what it takes right now; returns how many bytes those were. */
size_t uart_send(const char *bytes, size_t count);

/* Whether the last bit has left the UART. */
bool uart_idle(void);

bool uart_can_read(void);

/*
 * Bochs asks its socket for input once in a byte's time while the FIFOs are on, and seldom while they are off:
 * for long work, at the price of a byte that comes meanwhile. What is on its way out is lost.
 */
void uart_listen(bool on);

/* Only after uart_can_read said yes. */
uint8_t uart_read(void);

#endif
