/*
 * A disk by programmed I/O, as any AT has it (ATA/ATAPI-6, 9.5 and 9.6, with 28-bit addresses).
 *
 * From user space: the kernel's drivers for it would take longer to load than all transfers of a run.
 */
#include "carrier/disk.h"

#include <stddef.h>

#include "cpu/io.h"

enum {
	ATA_DATA = 0x1f0,
	ATA_COUNT = 0x1f2,
	ATA_ADDRESS_LOW = 0x1f3,
	ATA_ADDRESS_MIDDLE = 0x1f4,
	ATA_ADDRESS_HIGH = 0x1f5,
	ATA_DEVICE = 0x1f6,
	ATA_COMMAND = 0x1f7,
	ATA_STATUS = 0x1f7,
	ATA_CONTROL = 0x3f6,

	DEVICE_0_BY_ADDRESS = 0xe0,
	COMMAND_READ = 0x20,
	COMMAND_WRITE = 0x30,
	COMMAND_FLUSH = 0xe7,
	CONTROL_NO_INTERRUPT = 0x02,
	STATUS_ERROR = 0x01,
	STATUS_DATA = 0x08,
	STATUS_FAULT = 0x20,
	STATUS_BUSY = 0x80,

	PATIENCE_LOOKS = 1 << 20,
	WORDS = SECTOR_BYTES / 2,
};

/* Waits until it is no longer busy; true if `wanted` is set then, and no error is. */
static bool ready(uint8_t wanted)
{
	for (unsigned int look = 0; look < PATIENCE_LOOKS; look++) {
		uint8_t status = inb(ATA_STATUS);
		if (status & STATUS_BUSY)
			continue;
		if (status & (STATUS_ERROR | STATUS_FAULT))
			return false;
		if ((status & wanted) == wanted)
			return true;
	}
	return false;
}

static bool begin(uint8_t command, uint32_t sector)
{
	if (!ready(0))
		return false;
	outb(ATA_CONTROL, CONTROL_NO_INTERRUPT);
	outb(ATA_DEVICE, (uint8_t)(DEVICE_0_BY_ADDRESS | (sector >> 24 & 0xf)));
	outb(ATA_COUNT, 1);
	outb(ATA_ADDRESS_LOW, (uint8_t)sector);
	outb(ATA_ADDRESS_MIDDLE, (uint8_t)(sector >> 8));
	outb(ATA_ADDRESS_HIGH, (uint8_t)(sector >> 16));
	outb(ATA_COMMAND, command);
	return ready(STATUS_DATA);
}

bool disk_read(uint32_t sector, uint32_t count, void *data)
{
	for (; count; count--, sector++) {
		size_t words = WORDS;
		if (!begin(COMMAND_READ, sector))
			return false;
		asm volatile("rep insw" : "+D"(data), "+c"(words) : "d"(ATA_DATA) : "memory");
	}
	return true;
}

bool disk_write(uint32_t sector, uint32_t count, const void *data)
{
	for (; count; count--, sector++) {
		size_t words = WORDS;
		if (!begin(COMMAND_WRITE, sector))
			return false;
		asm volatile("rep outsw" : "+S"(data), "+c"(words) : "d"(ATA_DATA) : "memory");
	}
	outb(ATA_COMMAND, COMMAND_FLUSH);
	return ready(0);
}
