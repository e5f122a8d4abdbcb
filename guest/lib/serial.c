#include "lib/serial.h"

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
	WAIT_LOOPS = 64,
	BUFFER_BYTES = 4096,
};

/* A ring: bytes at [taken, given), counted without end and taken modulo its size. */
static char buffer[BUFFER_BYTES];
static uint32_t given, taken;

/* How many bytes may be written before the status has to be asked again. */
static unsigned int room;

void serial_init(void)
{
	outb(UART_INTERRUPTS, 0);
	outb(UART_LINE, LINE_DIVISOR_ACCESS | LINE_8_BITS);
	outb(UART_DATA, 1); /* 115200 baud */
	outb(UART_INTERRUPTS, 0);
	outb(UART_LINE, LINE_8_BITS);
	outb(UART_FIFO, FIFO_ENABLE_AND_CLEAR);
	outb(UART_MODEM, MODEM_DTR_RTS_OUT2);
	room = 0;
	given = taken = 0;
}

/*
 * A pause between two looks at the status: an emulator pays a hundred times more for a port read than for
 * an instruction, and its UART's time is counted in instructions. (Not PAUSE: that may be an exit to L0.)
 */
static void wait(void)
{
	for (unsigned int i = 0; i < WAIT_LOOPS; i++)
		asm volatile("");
}

/* Output that is not polled for loses bytes on Bochs and on QEMU alike. */
void serial_poll(void)
{
	if (taken == given)
		return;
	if (room == 0 && inb(UART_STATUS) & STATUS_TRANSMIT_EMPTY)
		room = FIFO_BYTES;
	for (; room && taken != given; room--)
		outb(UART_DATA, (uint8_t)buffer[taken++ % BUFFER_BYTES]);
}

void serial_write(const char *text, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++) {
		while (given - taken == BUFFER_BYTES) {
			serial_poll();
			wait();
		}
		buffer[given++ % BUFFER_BYTES] = text[i];
	}
	serial_poll();
}

void serial_flush(void)
{
	for (serial_poll(); taken != given; serial_poll())
		wait();
}

void serial_drain(void)
{
	serial_flush();
	while (!(inb(UART_STATUS) & STATUS_IDLE))
		wait();
	room = FIFO_BYTES;
}

bool serial_can_read(void)
{
	serial_poll();
	return inb(UART_STATUS) & STATUS_DATA_READY;
}

uint8_t serial_read(void)
{
	while (!serial_can_read())
		;
	return inb(UART_DATA);
}
