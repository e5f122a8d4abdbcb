/* Memory: what the compiler expects of a freestanding C library, and unaligned little-endian reads. */
#ifndef LIB_MEMORY_H
#define LIB_MEMORY_H

#include <stddef.h>
#include <stdint.h>

void *memcpy(void *target, const void *source, size_t bytes);
void *memset(void *target, int value, size_t bytes);
void *memmove(void *target, const void *source, size_t bytes);
int memcmp(const void *left, const void *right, size_t bytes);
size_t strlen(const char *text);
int strcmp(const char *left, const char *right);

static inline uint16_t load16(const uint8_t *p)
{
	uint16_t value;
	memcpy(&value, p, sizeof(value));
	return value;
}

static inline uint32_t load32(const uint8_t *p)
{
	uint32_t value;
	memcpy(&value, p, sizeof(value));
	return value;
}

static inline uint64_t load64(const uint8_t *p)
{
	uint64_t value;
	memcpy(&value, p, sizeof(value));
	return value;
}

/* A physical address as a pointer: the monitor maps the first 4 GiB one to one. */
static inline void *at_physical(uint64_t address)
{
	return (void *)(uintptr_t)address;
}

#endif
