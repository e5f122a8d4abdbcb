/* The words of a line as numbers, ranges and bytes. What can't be read is said. */
#ifndef CONSOLE_OPERANDS_H
#define CONSOLE_OPERANDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_BYTES_OPERAND = 512 };

/* 96, 0x60, or -1 for 0xffffffffffffffff. */
bool number_operand(const char *word, uint64_t *value);

/* The same, up to `limit`; `what` for the message. */
bool limited_operand(const char *word, const char *what, uint64_t limit, uint64_t *value);

/* FIRST, or FIRST-LAST. */
bool range_operand(char *word, const char *what, uint64_t limit, uint64_t *first, uint64_t *last);

/* Words of hexadecimal digits, two a byte; a byte may have 0x before it. */
bool bytes_operand(unsigned int count, char *words[], uint8_t bytes[MAX_BYTES_OPERAND], size_t *length);

/* Whether a word is this one, in whatever case. */
bool word_is(const char *word, const char *wanted);

#endif
