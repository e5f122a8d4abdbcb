#include "lib/format.h"

static const char hex_digits[16] = "0123456789abcdef";

void format_digits(char *target, uint64_t value, unsigned int digits)
{
	while (digits--) {
		target[digits] = hex_digits[value & 0xf];
		value >>= 4;
	}
}

size_t format_hex(char *target, uint64_t value)
{
	unsigned int digits = 1;
	while (digits < 16 && value >> (4 * digits))
		digits++;
	target[0] = '0';
	target[1] = 'x';
	format_digits(target + 2, value, digits);
	return 2 + digits;
}

static int digit_of(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

bool parse_number(const char *text, uint64_t *value)
{
	unsigned int base = 10;
	uint64_t result = 0;
	if (text[0] == '0' && (text[1] | 0x20) == 'x') {
		base = 16;
		text += 2;
	}
	if (!*text)
		return false;
	for (; *text; text++) {
		int digit = digit_of(*text);
		if (digit < 0 || (unsigned int)digit >= base)
			return false;
		if (__builtin_mul_overflow(result, base, &result) ||
		    __builtin_add_overflow(result, (uint64_t)digit, &result))
			return false;
	}
	*value = result;
	return true;
}
