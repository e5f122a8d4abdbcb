/* Numbers of the manual by their names, as vmxlab.sdm has them (prompt_facts.h). */
#ifndef CONSOLE_NAMES_H
#define CONSOLE_NAMES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct name {
	uint64_t value;
	const char *text;
};

/* A list of names, and what one of them is, for messages: "VMCS field". */
struct names {
	const char *what;
	const struct name *list;
	size_t count;
};

extern const struct names field_names, msr_names, exit_reason_names, exit_reason_flags;
extern const struct names instruction_errors, vector_names, interruption_types, apic_access_types;
extern const struct names memory_type_names, register_names, ept_levels, ept_bits, control_set_names;

/* A set of controls: its field, its capability MSRs (true_msr 0: there is none) and its bits by number. */
struct control_set {
	const char *name;
	uint32_t field, msr, true_msr;
	struct names bits;
};

enum { CONTROL_SETS_COUNT = 7 };
extern const struct control_set control_sets[CONTROL_SETS_COUNT];

/* The text of a value; NULL where the list has none. */
const char *name_of(const struct names *names, uint64_t value);

/* Whether `text`, of so many characters, is how the name begins; or a part of it. Case does not matter. */
bool name_begins(const char *name, const char *text, size_t length);
bool name_contains(const char *name, const char *text, size_t length);

/*
 * The one name that `text` is, begins or is a part of, tried in this order. NULL, and said, where there is none
 * or more than one.
 */
const struct name *name_find(const struct names *names, const char *text);

/* The same, or the number itself. */
bool name_or_number(const struct names *names, const char *text, uint64_t *value);

#endif
