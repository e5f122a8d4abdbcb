#include "console/operands.h"

#include "console/names.h"
#include "console/text.h"
#include "lib/format.h"
#include "lib/memory.h"

bool number_operand(const char *word, uint64_t *value)
{
	bool negative = *word == '-';
	if (!parse_number(word + negative, value)) {
		say("'%s' is no number: 96, 0x60 or -1\n", word);
		return false;
	}
	if (negative)
		*value = -*value;
	return true;
}

bool limited_operand(const char *word, const char *what, uint64_t limit, uint64_t *value)
{
	if (!number_operand(word, value))
		return false;
	if (*value <= limit)
		return true;
	say("%s is out of range: %s is 0 to %#lx\n", word, what, limit);
	return false;
}

bool range_operand(char *word, const char *what, uint64_t limit, uint64_t *first, uint64_t *last)
{
	char *dash = word;
	bool good;
	while (*dash && *dash != '-')
		dash++;
	if (!*dash) {
		good = limited_operand(word, what, limit, first);
		*last = *first;
		return good;
	}
	*dash = 0;
	good = limited_operand(word, what, limit, first) && limited_operand(dash + 1, what, limit, last);
	*dash = '-';
	if (good && *last < *first) {
		say("%s ends before it begins\n", word);
		return false;
	}
	return good;
}

static int digit_of(char c)
{
	uint64_t value;
	char text[] = {'0', 'x', c, 0};
	return parse_number(text, &value) ? (int)value : -1;
}

bool bytes_operand(unsigned int count, char *words[], uint8_t bytes[MAX_BYTES_OPERAND], size_t *length)
{
	*length = 0;
	for (unsigned int i = 0; i < count; i++) {
		const char *digits = words[i];
		if (name_begins(digits, "0x", 2))
			digits += 2;
		if (strlen(digits) % 2 || !*digits) {
			say("'%s' is no bytes: two hexadecimal digits each, such as e4 60 or e460\n",
			    words[i]);
			return false;
		}
		for (; *digits; digits += 2) {
			int high = digit_of(digits[0]), low = digit_of(digits[1]);
			if (high < 0 || low < 0) {
				say("'%s' has other than hexadecimal digits\n", words[i]);
				return false;
			}
			if (*length == MAX_BYTES_OPERAND) {
				say("that is more than %u bytes: nothing was done\n", MAX_BYTES_OPERAND);
				return false;
			}
			bytes[(*length)++] = (uint8_t)(high << 4 | low);
		}
	}
	return true;
}

bool word_is(const char *word, const char *wanted)
{
	size_t length = strlen(wanted);
	return name_begins(word, wanted, length) && !word[length];
}
