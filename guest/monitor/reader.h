/* Reading a script: little-endian numbers from a range of bytes, with one sticky mark for "ran past the end". */
#ifndef MONITOR_READER_H
#define MONITOR_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/memory.h"

struct reader {
	const uint8_t *position, *end;
	bool overrun;
};

static inline const uint8_t *take(struct reader *reader, size_t bytes)
{
	static const uint8_t zeros[8];
	const uint8_t *here = reader->position;
	if (bytes > (size_t)(reader->end - here)) {
		reader->overrun = true;
		reader->position = reader->end;
		return bytes <= sizeof(zeros) ? zeros : NULL;
	}
	reader->position += bytes;
	return here;
}

static inline uint8_t take8(struct reader *reader)
{
	return *take(reader, 1);
}

static inline uint16_t take16(struct reader *reader)
{
	return load16(take(reader, 2));
}

static inline uint32_t take32(struct reader *reader)
{
	return load32(take(reader, 4));
}

static inline uint64_t take64(struct reader *reader)
{
	return load64(take(reader, 8));
}

#endif
