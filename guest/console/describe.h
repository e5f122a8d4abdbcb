/*
 * Exits in words: those of vmxlab.sdm (describe_reason, Qualification.describe, InterruptionInformation.describe),
 * which a test holds together. Nothing here ends a line.
 */
#ifndef CONSOLE_DESCRIBE_H
#define CONSOLE_DESCRIBE_H

#include <stdbool.h>
#include <stdint.h>

enum { NO_VECTOR = -1 };

/* "HLT", "ENTRY_FAILURE_GUEST_STATE (VM-entry failure)": the whole exit-reason field. */
void describe_reason(uint32_t reason);

/* "IN port 0x60, 1 byte"; `vector` of an exception or NMI, else NO_VECTOR. "-" where there is none, as it should. */
void describe_qualification(uint32_t reason, uint64_t raw, int vector);

/* Whether it says more than "-". */
bool describe_has_qualification(uint32_t reason, uint64_t raw, int vector);

/* "#PF (14), hardware exception, error code"; "none" where the field is not valid. */
void describe_interruption(uint32_t information);

/* "IA32_EFER (0xc0000080)", or "MSR 0x1234". */
void describe_msr(uint32_t msr);

#endif
