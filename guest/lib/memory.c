#include "lib/memory.h"

/*
 * String instructions, in the widest elements: short, and quick under every engine. Processors handle a whole
 * repetition at once; to an emulator each element is an instruction.
 */
void *memcpy(void *target, const void *source, size_t bytes)
{
	void *d = target;
	size_t words = bytes / 8, rest = bytes % 8;
	asm volatile("rep movsq" : "+D"(d), "+S"(source), "+c"(words) : : "memory");
	asm volatile("rep movsb" : "+D"(d), "+S"(source), "+c"(rest) : : "memory");
	return target;
}

void *memset(void *target, int value, size_t bytes)
{
	void *d = target;
	size_t words = bytes / 8, rest = bytes % 8;
	uint64_t pattern = 0x0101010101010101u * (uint8_t)value;
	asm volatile("rep stosq" : "+D"(d), "+c"(words) : "a"(pattern) : "memory");
	asm volatile("rep stosb" : "+D"(d), "+c"(rest) : "a"(pattern) : "memory");
	return target;
}

void *memmove(void *target, const void *source, size_t bytes)
{
	uint8_t *d = target;
	const uint8_t *s = source;
	if (d <= s || d >= s + bytes)
		return memcpy(target, source, bytes);
	while (bytes--)
		d[bytes] = s[bytes];
	return target;
}

int memcmp(const void *left, const void *right, size_t bytes)
{
	const uint8_t *a = left, *b = right;
	for (size_t i = 0; i < bytes; i++)
		if (a[i] != b[i])
			return a[i] < b[i] ? -1 : 1;
	return 0;
}

size_t strlen(const char *text)
{
	size_t length = 0;
	while (text[length])
		length++;
	return length;
}

int strcmp(const char *left, const char *right)
{
	while (*left && *left == *right) {
		left++;
		right++;
	}
	return (uint8_t)*left - (uint8_t)*right;
}
