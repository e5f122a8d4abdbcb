#include "console/names.h"

#include "console/text.h"
#include "lib/format.h"
#include "lib/memory.h"
#include "prompt_facts.h"

#define COUNT(list) (sizeof(list) / sizeof((list)[0]))
#define NAME(value, text) {value, text},

enum { CANDIDATES_SHOWN = 24 };

#define NAMES(variable, what, LIST)                                                                          \
	static const struct name variable##_list[] = {LIST(NAME)};                                           \
	const struct names variable = {what, variable##_list, COUNT(variable##_list)};

NAMES(field_names, "VMCS field", VMCS_FIELD_NAMES)
NAMES(msr_names, "MSR", MSR_NAMES)
NAMES(exit_reason_names, "exit reason", EXIT_REASON_NAMES)
NAMES(exit_reason_flags, "flag of the exit reason", EXIT_REASON_FLAG_TEXTS)
NAMES(instruction_errors, "VM-instruction error", INSTRUCTION_ERROR_TEXTS)
NAMES(vector_names, "vector", VECTOR_NAMES)
NAMES(interruption_types, "interruption type", INTERRUPTION_TYPE_TEXTS)
NAMES(apic_access_types, "type of APIC access", APIC_ACCESS_TYPE_TEXTS)
NAMES(memory_type_names, "memory type", MEMORY_TYPE_NAMES)
NAMES(register_names, "register", REGISTER_NAMES)
NAMES(ept_levels, "level of EPT", EPT_LEVEL_NAMES)
NAMES(ept_bits, "bit of an EPT entry", EPT_BIT_TEXTS)

#define CONTROL_LIST(field, msr, true_msr, set)                                                              \
	static const struct name set##_list[] = {set##_CONTROL_NAMES(NAME)};
CONTROL_SETS(CONTROL_LIST)

#define CONTROL_SET(field, msr, true_msr, set)                                                               \
	{#set, field, msr, true_msr, {"control", set##_list, COUNT(set##_list)}},
const struct control_set control_sets[] = {CONTROL_SETS(CONTROL_SET)};

#define CONTROL_SET_NAME(field, msr, true_msr, set) {field, #set},
static const struct name control_set_list[] = {CONTROL_SETS(CONTROL_SET_NAME)};
const struct names control_set_names = {"set of controls", control_set_list, COUNT(control_set_list)};

const char *name_of(const struct names *names, uint64_t value)
{
	for (size_t i = 0; i < names->count; i++)
		if (names->list[i].value == value)
			return names->list[i].text;
	return NULL;
}

static char folded(char c)
{
	return c >= 'a' && c <= 'z' ? (char)(c - 'a' + 'A') : c;
}

bool name_begins(const char *name, const char *text, size_t length)
{
	for (size_t i = 0; i < length; i++)
		if (!name[i] || folded(name[i]) != folded(text[i]))
			return false;
	return true;
}

bool name_contains(const char *name, const char *text, size_t length)
{
	for (; *name; name++)
		if (name_begins(name, text, length))
			return true;
	return false;
}

static bool name_is(const char *name, const char *text, size_t length)
{
	return name_begins(name, text, length) && !name[length];
}

static bool (*const matchers[])(const char *, const char *, size_t) = {name_is, name_begins, name_contains};

static void say_candidates(const struct names *names, const char *text,
			   bool (*matches)(const char *, const char *, size_t))
{
	size_t length = strlen(text), found = 0;
	for (size_t i = 0; i < names->count; i++) {
		if (!matches(names->list[i].text, text, length))
			continue;
		if (found++ < CANDIDATES_SHOWN)
			say("  %s\n", names->list[i].text);
	}
	if (found > CANDIDATES_SHOWN)
		say("  and %lu more\n", found - CANDIDATES_SHOWN);
}

const struct name *name_find(const struct names *names, const char *text)
{
	size_t length = strlen(text);
	for (size_t m = 0; m < COUNT(matchers); m++) {
		const struct name *found = NULL;
		size_t count = 0;
		for (size_t i = 0; i < names->count; i++) {
			if (!matchers[m](names->list[i].text, text, length))
				continue;
			found = &names->list[i];
			count++;
		}
		if (count == 1)
			return found;
		if (count > 1) {
			say("'%s' is more than one %s:\n", text, names->what);
			say_candidates(names, text, matchers[m]);
			return NULL;
		}
	}
	say("there is no %s '%s'\n", names->what, text);
	return NULL;
}

bool name_or_number(const struct names *names, const char *text, uint64_t *value)
{
	const struct name *found;
	if (text[0] >= '0' && text[0] <= '9') {
		if (parse_number(text, value))
			return true;
		say("'%s' is no number\n", text);
		return false;
	}
	found = name_find(names, text);
	if (found)
		*value = found->value;
	return found;
}
