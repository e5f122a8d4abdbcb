#include "lib/serial.h"

#include "lib/uart.h"
#include "lib/virtio_console.h"

enum {
	WAIT_LOOPS = 64,
	BUFFER_BYTES = 4096,
};

/* A ring: bytes at [taken, given), counted without end and taken modulo its size. */
static char buffer[BUFFER_BYTES];
static uint32_t given, taken;

static bool is_listening; /* for input: see serial_listen */
static bool is_virtio;    /* a branch, not a table of functions: polling is what the monitor does most */

void serial_init(void)
{
	given = taken = 0;
	is_listening = true;
	is_virtio = virtio_console_init();
	if (!is_virtio)
		uart_init();
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
	uint32_t start = taken % BUFFER_BYTES;
	uint32_t bytes = given - taken;
	if (bytes == 0)
		return;
	if (bytes > BUFFER_BYTES - start)
		bytes = BUFFER_BYTES - start;
	taken += (uint32_t)(is_virtio ? virtio_console_send(buffer + start, bytes)
				      : uart_send(buffer + start, bytes));
}

/*
 * To the virtio port a byte costs as much as a bufferful: it gets what was gathered until the next poll. The
 * UART's time passes while we work, so it gets its share at once.
 */
void serial_write(const char *text, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++) {
		while (given - taken == BUFFER_BYTES) {
			serial_poll();
			wait();
		}
		buffer[given++ % BUFFER_BYTES] = text[i];
	}
	if (!is_virtio)
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
	while (!is_virtio && !uart_idle())
		wait();
}

void serial_listen(bool on)
{
	if (is_virtio || on == is_listening)
		return;
	serial_drain();
	uart_listen(on);
	is_listening = on;
}

bool serial_can_read(void)
{
	serial_poll();
	return is_virtio ? virtio_console_can_read() : uart_can_read();
}

uint8_t serial_read(void)
{
	while (!serial_can_read())
		;
	return is_virtio ? virtio_console_read() : uart_read();
}
