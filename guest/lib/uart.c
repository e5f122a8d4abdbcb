#include "lib/uart.h"

#include "cpu/io.h"

enum {
	COM1 = 0x3f8,
	UART_DATA = COM1 + 0,       /* DLAB=0: receive and transmit; DLAB=1: divisor, low byte */
	UART_INTERRUPTS = COM1 + 1, /* DLAB=1: divisor, high byte */
	UART_FIFO = COM1 + 2,
	UART_LINE = COM1 + 3,
	UART_MODEM = COM1 + 4,
	UART_STATUS = COM1 + 5,

	LINE_8_BITS = 0x03,
	LINE_DIVISOR_ACCESS = 0x80,
	FIFO_ENABLE_AND_CLEAR = 0x07,
	MODEM_DTR_RTS_OUT2 = 0x0b,
	STATUS_DATA_READY = 0x01,
	STATUS_TRANSMIT_EMPTY = 0x20, /* the transmit FIFO is empty: it takes FIFO_BYTES more */
	STATUS_IDLE = 0x40,           /* and the shift register too */
	FIFO_BYTES = 16,
};

/* How many bytes may be written before the status has to be asked again: now, and when the UART is empty. */
static unsigned int room, at_once;

void uart_listen(bool on)
{
	outb(UART_FIFO, on ? FIFO_ENABLE_AND_CLEAR : 0);
	at_once = on ? FIFO_BYTES : 1;
	room = 0;
}

void uart_init(void)
{
	outb(UART_INTERRUPTS, 0);
	outb(UART_LINE, LINE_DIVISOR_ACCESS | LINE_8_BITS);
	outb(UART_DATA, 1); /* 115200 baud */
	outb(UART_INTERRUPTS, 0);
	outb(UART_LINE, LINE_8_BITS);
	uart_listen(true);
	outb(UART_MODEM, MODEM_DTR_RTS_OUT2);
}

size_t uart_send(const char *bytes, size_t count)
{
	size_t sent = 0;
	if (room == 0 && inb(UART_STATUS) & STATUS_TRANSMIT_EMPTY)
		room = at_once;
	for (; room && sent < count; room--)
		outb(UART_DATA, (uint8_t)bytes[sent++]);
	return sent;
}

bool uart_idle(void)
{
	if (!(inb(UART_STATUS) & STATUS_IDLE))
		return false;
	room = at_once;
	return true;
}

bool uart_can_read(void)
{
	return inb(UART_STATUS) & STATUS_DATA_READY;
}

uint8_t uart_read(void)
{
	return inb(UART_DATA);
}
