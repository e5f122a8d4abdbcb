/*
 * Addresses that a person types, and memory behind them: physical ones, as they are; "gpa:0x8000", L2's
 * guest-physical ones, through the EPT of the current VMCS; "gla:0x8000", L2's linear ones, through its paging.
 * Whatever fails is said, and nothing faults.
 */
#ifndef CONSOLE_ADDRESS_H
#define CONSOLE_ADDRESS_H

#include <stdbool.h>
#include <stdint.h>

enum address_space { PHYSICAL, GUEST_PHYSICAL, GUEST_LINEAR };

struct address {
	enum address_space space;
	uint64_t at;
};

/* A word as an address. */
bool address_operand(const char *word, struct address *address);

/* "gpa:0x8000": as it is typed. */
void address_say(struct address address);

/* Where it is in the machine's memory. With `quiet` a failure is not said. */
bool address_translate(struct address address, uint64_t *physical, bool quiet);

/* One access of 1, 2, 4 or 8 bytes, which lie on one page. */
bool physical_read(uint64_t physical, unsigned int bytes, uint64_t *value);

/* The same. Refuses the monitor's own memory: a person can't have meant that, and the prompt would be lost. */
bool physical_write(uint64_t physical, unsigned int bytes, uint64_t value);

/* Bytes wherever they lie, page by page; false where one can't be reached. */
bool address_read(struct address address, uint8_t *bytes, unsigned int count, bool quiet);
bool address_write(struct address address, const uint8_t *bytes, unsigned int count);

#endif
