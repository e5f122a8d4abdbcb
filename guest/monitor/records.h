/*
 * Records: the machine-readable lines of the serial log.
 *
 *   @kind key=value key=value*hhhh
 *
 * hhhh is the CRC-16/XMODEM of what stands between '@' and '*'. Everything that is not a record is for people.
 */
#ifndef MONITOR_RECORDS_H
#define MONITOR_RECORDS_H

#include <stddef.h>
#include <stdint.h>

#include "vmx/entry.h"
#include "vmx/instructions.h"

void record_begin(const char *kind);

/*
 * "@vmx ok=vmxon,vmclear,...": what succeeded, in one record. It leaves piece by piece as things happen, so
 * that a log which ends in the middle shows how far the machine got; whatever is sent next ends it.
 */
void record_success(const char *operation);

/* The same for `count` executions: operation:0x5f. */
void record_successes(const char *operation, uint32_t count);

/* Ends the list that record_success has open, if it has one. */
void record_end_list(void);

/* key=0x... */
void record_number(const char *key, uint64_t value);

/* The same, left out where the value is 0: a reader takes a missing key for 0. */
void record_nonzero(const char *key, uint64_t value);

/* key=word; the word holds no space, '=', '*' or control character. */
void record_word(const char *key, const char *word);

/* key=hex digits, two a byte, in memory order. */
void record_bytes(const char *key, const uint8_t *bytes, size_t count);

/* The keys of L2's general registers: rax, rcx, ... */
extern const char *const record_register_keys[GENERAL_REGISTERS];

/* fNNNN=0x...: a VMCS field by its encoding. */
void record_field(uint32_t field, uint64_t value);

/* rc=ok, invalid, valid error=0x.., or fault vector=0x.. code=0x... */
void record_outcome(vmx_outcome outcome);

void record_end(void);

/* Text for people: "\n" becomes "\r\n". */
void print(const char *text);

#endif
