#include "monitor/payload.h"

#include "cpu/io.h"
#include "lib/crc.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/records.h"
#include "protocol.h"

/* The real-time clock, MC146818: an index port and a data port. */
enum {
	CLOCK_INDEX = 0x70,
	CLOCK_DATA = 0x71,
	CLOCK_SECONDS = 0x00,
	CLOCK_NONE = 0xff, /* what is read where there is none */
	LOOKS_PER_CLOCK = 1 << 14,
	PATIENCE_SECONDS = 4,
};

/* vmxlab.image.frames.FRAME_HEADER */
struct frame_header {
	uint32_t bytes;         /* of the operations that follow */
	uint32_t decoded_bytes; /* of the script they make */
	uint32_t crc32;         /* of the operations */
	uint32_t base;          /* crc32 of the frame whose script is copied from; 0: of none */
};

/* vmxlab.image.frames.PAYLOAD_HEADER */
struct payload_header {
	uint32_t magic;
	uint32_t version;
	uint32_t cases;
	uint32_t bytes; /* of all frames */
	uint32_t crc32; /* of all frames */
	uint32_t flags; /* PAYLOAD_WAITS */
};

/* Two buffers that take turns: one holds the script before, the other the one being made. */
static uint8_t *const buffers[2] = {
	(uint8_t *)SCRIPT_BUFFER_0,
	(uint8_t *)SCRIPT_BUFFER_1,
};
static unsigned int current;
static size_t current_length;
static uint32_t current_crc32; /* of the frame that made the current script */

static const uint8_t *payload_position;
static uint32_t payload_left;

static bool broken(const char *what)
{
	record_begin("error");
	record_word("what", what);
	record_end();
	return false;
}

/* LEB128; false where it runs past the end or over 32 bits. */
static bool read_varint(const uint8_t **position, const uint8_t *end, uint32_t *value)
{
	uint64_t result = 0;
	for (unsigned int shift = 0; shift < 35; shift += 7) {
		if (*position == end)
			return false;
		uint8_t byte = *(*position)++;
		result |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80)) {
			*value = (uint32_t)result;
			return result <= UINT32_MAX;
		}
	}
	return false;
}

/*
 * An operation is a varint: bit 0 says copy (1) or literal (0), the rest is the length. A copy is followed
 * by a zigzag varint: how far its source lies from where the last operation left off in the old script.
 */
static bool decode(const uint8_t *position, const uint8_t *end, size_t old_length, uint8_t *target,
		   size_t target_bytes)
{
	const uint8_t *old = buffers[current];
	uint64_t source = 0;
	size_t done = 0;
	while (position < end) {
		uint32_t operation, bytes, zigzag;
		if (!read_varint(&position, end, &operation))
			return false;
		bytes = operation >> 1;
		if (bytes > target_bytes - done)
			return false;
		if (operation & 1) {
			if (!read_varint(&position, end, &zigzag))
				return false;
			source += (zigzag >> 1) ^ -(uint64_t)(zigzag & 1);
			if (source > old_length || bytes > old_length - source)
				return false;
			memcpy(target + done, old + source, bytes);
		} else {
			if (bytes > (size_t)(end - position))
				return false;
			memcpy(target + done, position, bytes);
			position += bytes;
		}
		source += bytes;
		done += bytes;
	}
	return done == target_bytes;
}

static bool open_frame(const struct frame_header *header, const uint8_t *operations, struct script *script)
{
	uint8_t *target = buffers[!current];
	size_t old_length = header->base ? current_length : 0;
	if (header->decoded_bytes > SCRIPT_BUFFER_BYTES)
		return broken("script-too-long");
	if (crc32(operations, header->bytes) != header->crc32)
		return broken("frame-crc");
	if (header->base && header->base != current_crc32)
		return broken("frame-base");
	if (!decode(operations, operations + header->bytes, old_length, target, header->decoded_bytes))
		return broken("frame-operations");
	current = !current;
	current_crc32 = header->crc32;
	current_length = header->decoded_bytes;
	*script = (struct script){target, current_length};
	return true;
}

static const struct payload_header *payload_header(void)
{
	return (const struct payload_header *)PAYLOAD_BASE;
}

uint32_t payload_cases(void)
{
	const struct payload_header *header = payload_header();
	if (header->magic != PAYLOAD_MAGIC)
		return 0;
	if (header->version != PROTOCOL_VERSION) {
		broken("payload-version");
		return 0;
	}
	if (header->bytes > PAYLOAD_BYTES - sizeof(*header) ||
	    crc32((const uint8_t *)(header + 1), header->bytes) != header->crc32) {
		broken("payload-crc");
		return 0;
	}
	payload_rewind();
	return header->cases;
}

bool payload_waits(void)
{
	return payload_header()->flags & PAYLOAD_WAITS;
}

void payload_rewind(void)
{
	payload_position = (const uint8_t *)(payload_header() + 1);
	payload_left = payload_header()->bytes;
	current_length = 0;
}

bool payload_next(struct script *script)
{
	struct frame_header header;
	if (payload_left == 0)
		return false;
	if (payload_left < sizeof(header))
		return broken("payload-cut");
	memcpy(&header, payload_position, sizeof(header));
	if (header.bytes > payload_left - sizeof(header))
		return broken("payload-cut");
	payload_position += sizeof(header) + header.bytes;
	payload_left -= sizeof(header) + header.bytes;
	return open_frame(&header, payload_position - header.bytes, script);
}

static uint8_t clock_second(void)
{
	outb(CLOCK_INDEX, CLOCK_SECONDS);
	return inb(CLOCK_DATA);
}

/*
 * A sender that stops in the middle must not hang the prompt, and one that is slow must not be given up. Both
 * must have passed: so many looks, and so many seconds of the real-time clock. Where a look is a port read,
 * the looks take some seconds, whereas an emulator's clock may run much too fast. Where a look is a memory
 * read, they are over at once, and the clock is right. Where there is no clock, the looks must do.
 */
static bool wait_for_byte(void)
{
	uint32_t looks = 0;
	unsigned int seconds = 0;
	uint8_t last = 0, now;
	while (!serial_can_read()) {
		if (looks++ % LOOKS_PER_CLOCK != 0)
			continue;
		now = clock_second();
		if (looks > 1 && now != last)
			seconds++;
		last = now;
		if (looks > FRAME_PATIENCE_LOOKS && (seconds > PATIENCE_SECONDS || now == CLOCK_NONE))
			return false;
	}
	return true;
}

static bool receive(uint8_t *target, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++) {
		if (!wait_for_byte())
			return broken("frame-stopped");
		target[i] = serial_read();
	}
	return true;
}

bool frame_receive(struct script *script)
{
	struct frame_header header;
	uint8_t *operations = (uint8_t *)FRAME_BUFFER;
	if (!receive((uint8_t *)&header, sizeof(header)))
		return false;
	if (header.bytes > FRAME_BUFFER_BYTES)
		return broken("frame-too-long");
	if (!receive(operations, header.bytes))
		return false;
	return open_frame(&header, operations, script);
}
