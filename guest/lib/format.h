/* Numbers to text and back. */
#ifndef LIB_FORMAT_H
#define LIB_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Writes "0x" and the shortest hexadecimal form; returns how many characters (at most 18, no terminator). */
size_t format_hex(char *target, uint64_t value);

/* Exactly `digits` hexadecimal digits, no prefix. */
void format_digits(char *target, uint64_t value, unsigned int digits);

/* Reads a number, hexadecimal with "0x" or decimal; false if the text is not all number or is over 64 bits. */
bool parse_number(const char *text, uint64_t *value);

#endif
