/* Text for people. */
#ifndef CONSOLE_TEXT_H
#define CONSOLE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * As printf, with %s, %c, %u and %x and what numbers need: '#', '0', '-', a width, 'l'. "%#x" of 0 is "0x0".
 * A line that starts with '@' would be taken for a record: the prompt's own texts don't.
 */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* "#GP (13)", "vector 0x20": of a fault in L1. */
void say_vector(uint8_t vector);

/* The rest of a sentence: "", or "s" for any number but one. */
const char *plural(uint64_t count);

#endif
