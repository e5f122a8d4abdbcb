#include "console/text.h"

#include <stdarg.h>

#include "console/names.h"
#include "lib/format.h"
#include "lib/memory.h"
#include "monitor/records.h"

enum { NUMBER_CHARACTERS = 24 };

/* One conversion of a format, between its '%' and its letter. */
struct conversion {
	bool prefix, zeros, left, is_long;
	unsigned int width;
};

static const char *read_conversion(const char *format, struct conversion *conversion)
{
	*conversion = (struct conversion){0};
	for (;; format++) {
		switch (*format) {
		case '#':
			conversion->prefix = true;
			break;
		case '-':
			conversion->left = true;
			break;
		case 'l':
			conversion->is_long = true;
			break;
		default:
			if (*format < '0' || *format > '9')
				return format;
			if (*format == '0' && conversion->width == 0)
				conversion->zeros = true;
			conversion->width = conversion->width * 10 + (unsigned int)(*format - '0');
		}
	}
}

static void put(const char *text, const struct conversion *conversion)
{
	size_t length = strlen(text);
	size_t padding = conversion->width > length ? conversion->width - length : 0;
	for (size_t i = 0; !conversion->left && i < padding; i++)
		print(conversion->zeros ? "0" : " ");
	print(text);
	for (size_t i = 0; conversion->left && i < padding; i++)
		print(" ");
}

static void put_decimal(uint64_t value, const struct conversion *conversion)
{
	char text[NUMBER_CHARACTERS];
	char *digit = text + NUMBER_CHARACTERS - 1;
	*digit = 0;
	do {
		*--digit = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	put(digit, conversion);
}

static void put_hex(uint64_t value, const struct conversion *conversion)
{
	char text[NUMBER_CHARACTERS];
	text[format_hex(text, value)] = 0;
	put(conversion->prefix ? text : text + 2, conversion);
}

static void put_character(char c)
{
	char text[2] = {c, 0};
	print(text);
}

void say(const char *format, ...)
{
	va_list operands;
	va_start(operands, format);
	for (; *format; format++) {
		struct conversion conversion;
		uint64_t value;
		if (*format != '%') {
			put_character(*format);
			continue;
		}
		format = read_conversion(format + 1, &conversion);
		switch (*format) {
		case 's':
			put(va_arg(operands, const char *), &conversion);
			break;
		case 'c':
			put_character((char)va_arg(operands, int));
			break;
		case 'u':
		case 'x':
			value = conversion.is_long ? va_arg(operands, uint64_t)
						   : va_arg(operands, unsigned int);
			if (*format == 'u')
				put_decimal(value, &conversion);
			else
				put_hex(value, &conversion);
			break;
		default:
			put_character(*format);
		}
	}
	va_end(operands);
}

void say_vector(uint8_t vector)
{
	const char *name = name_of(&vector_names, vector);
	if (name)
		say("%s (%u)", name, vector);
	else
		say("vector %#x", vector);
}

const char *plural(uint64_t count)
{
	return count == 1 ? "" : "s";
}
