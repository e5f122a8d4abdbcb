/* Where VMX operation stands, for people; and how a VMX instruction ended. */
#ifndef CONSOLE_STATE_VIEW_H
#define CONSOLE_STATE_VIEW_H

#include <stdbool.h>
#include <stdint.h>

#include "vmx/instructions.h"

/* "in VMX operation, current VMCS 0x1001000", or what else it is. */
void state_say(void);

/* "VMsucceed", "VMfailValid(12: ...)", "fault: #UD (6), error code 0x0", with no line's end. */
void outcome_say(vmx_outcome outcome);

/* The same with a line's end, and what to do about it; true for VMsucceed. */
bool outcome_report(vmx_outcome outcome);

/* A field of the current VMCS; where it can't be read that is said, with the field's name. */
bool field_read(uint32_t field, uint64_t *value);
bool field_write(uint32_t field, uint64_t value);

/* Nothing said: 0 where it can't be read. */
uint64_t field_or_0(uint32_t field);

/* "USE_IO_BITMAPS" of the primary controls and the like: whether the current VMCS has it set. */
bool control_is_set(uint32_t field, uint64_t control);

#endif
