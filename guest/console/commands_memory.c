/* Memory, and machine code for L2. */
#include <stddef.h>
#include <stdint.h>

#include "console/address.h"
#include "console/command.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum { PAGE_BYTES = 4096, LINE_SHOWN_BYTES = 16, MOST_SHOWN_BYTES = 4096 };

#define ACCESS_RIGHTS_L (1u << 13) /* SDM Vol. 3C, table 25-2: 64-bit code segment */

static const struct name size_list[] = {{1, "u8"}, {2, "u16"}, {4, "u32"}, {8, "u64"}};
static const struct names size_names = {"size", size_list, sizeof(size_list) / sizeof(size_list[0])};

/* Guest addresses are those of the current VMCS. */
static bool can_be_reached(struct address address)
{
	if (address.space == PHYSICAL || vmx_present())
		return true;
	say("this processor has no VMX, so there is no L2\n");
	return false;
}

/* --- mem --------------------------------------------------------------------------------------------------- */

/* Translates for each page's first unit. Aligned units lie on one page each. */
static bool reach(struct address address, bool first, unsigned int bytes, uint64_t *physical)
{
	if (!first && address.at % PAGE_BYTES) {
		*physical += bytes;
		return true;
	}
	return address_translate(address, physical, false);
}

static void say_unit(uint64_t value, unsigned int bytes)
{
	switch (bytes) {
	case 1:
		say(" %02lx", value);
		break;
	case 2:
		say(" %04lx", value);
		break;
	case 4:
		say(" %08lx", value);
		break;
	default:
		say(" %016lx", value);
	}
}

/* One line. False where a unit can't be read, which has been said; those before it are shown. */
static bool show_line(struct address address, unsigned int bytes, unsigned int count)
{
	uint64_t physical = 0, values[LINE_SHOWN_BYTES];
	struct address at = address;
	unsigned int done = 0;
	for (; done < count; done++, at.at += bytes)
		if (!reach(at, done == 0, bytes, &physical) || !physical_read(physical, bytes, &values[done]))
			break;
	if (done) {
		address_say(address);
		say(":");
	}
	for (unsigned int i = 0; i < done; i++)
		say_unit(values[i], bytes);
	if (done)
		say("\n");
	return done == count;
}

static void show(struct address address, unsigned int bytes, uint64_t count)
{
	unsigned int in_a_line = LINE_SHOWN_BYTES / bytes;
	for (; count; address.at += LINE_SHOWN_BYTES) {
		unsigned int units = count < in_a_line ? (unsigned int)count : in_a_line;
		if (!show_line(address, bytes, units))
			return;
		count -= units;
	}
}

/* All operands are read before the first is written. */
static bool write_units(struct address address, unsigned int bytes, unsigned int count, char *words[])
{
	static uint64_t values[MAX_BYTES_OPERAND];
	uint64_t physical = 0, limit = bytes == 8 ? ~0ull : (1ull << 8 * bytes) - 1;
	if (count > MAX_BYTES_OPERAND)
		return false;
	for (unsigned int i = 0; i < count; i++)
		if (!limited_operand(words[i], "a unit of this size", limit, &values[i]))
			return false;
	for (unsigned int i = 0; i < count; i++, address.at += bytes)
		if (!reach(address, i == 0, bytes, &physical) || !physical_write(physical, bytes, values[i]))
			return true;
	say("%u unit%s of %u bytes written\n", count, plural(count), bytes);
	return true;
}

static bool write_bytes(struct address address, unsigned int count, char *words[])
{
	uint8_t bytes[MAX_BYTES_OPERAND];
	size_t length;
	if (!bytes_operand(count, words, bytes, &length))
		return false;
	if (address_write(address, bytes, (unsigned int)length))
		say("%lu byte%s written\n", length, plural(length));
	return true;
}

static bool show_operands(struct address address, unsigned int bytes, unsigned int count, char *words[])
{
	uint64_t units = LINE_SHOWN_BYTES / bytes;
	if (count > 1)
		return false;
	if (count && !limited_operand(words[0], "a count", MOST_SHOWN_BYTES / bytes, &units))
		return false;
	show(address, bytes, units);
	return true;
}

static bool run_mem(unsigned int count, char *words[])
{
	struct address address;
	const struct name *size = NULL;
	unsigned int bytes;
	if (words[1][0] == 'u' && count > 1) {
		size = name_find(&size_names, words[1]);
		if (!size)
			return false;
		words++;
		count--;
	}
	bytes = size ? (unsigned int)size->value : 1;
	if (!address_operand(words[1], &address))
		return false;
	if (!can_be_reached(address))
		return true;
	if (address.at % bytes) {
		say("%#lx is not a multiple of %u\n", address.at, bytes);
		return false;
	}
	if (count < 2 || !word_is(words[2], "="))
		return show_operands(address, bytes, count - 1, words + 2);
	if (count < 3)
		return false;
	return size ? write_units(address, bytes, count - 2, words + 3)
		    : write_bytes(address, count - 2, words + 3);
}

/* --- code -------------------------------------------------------------------------------------------------- */

/* Where L2 would fetch its next instruction from: in 64-bit mode the base of CS counts for nothing. */
static bool next_instruction(struct address *address)
{
	uint64_t rip;
	address->space = GUEST_LINEAR;
	if (!field_read(VMCS_GUEST_RIP, &rip))
		return false;
	if (field_or_0(VMCS_GUEST_CS_ACCESS_RIGHTS) & ACCESS_RIGHTS_L)
		address->at = rip;
	else
		address->at = (uint32_t)(field_or_0(VMCS_GUEST_CS_BASE) + rip);
	return true;
}

static bool run_code(unsigned int count, char *words[])
{
	uint8_t bytes[MAX_BYTES_OPERAND];
	size_t length;
	struct address address;
	uint64_t physical;
	bool elsewhere = word_is(words[1], "at");
	if (elsewhere && (count < 3 || !address_operand(words[2], &address)))
		return false;
	if (elsewhere && address.space == PHYSICAL)
		address.space = GUEST_PHYSICAL;
	words += elsewhere ? 3 : 1;
	if (!bytes_operand(count - (elsewhere ? 2 : 0), words, bytes, &length))
		return false;
	if ((!elsewhere && !next_instruction(&address)) || !address_translate(address, &physical, false))
		return true;
	if (address_write(address, bytes, (unsigned int)length)) {
		say("%lu byte%s at ", length, plural(length));
		address_say(address);
		say(", physical address %#lx\n", physical);
	}
	return true;
}

const struct command memory_commands[] = {
	{"mem", "[SIZE] ADDRESS [N|= VALUE...]", "show memory, or write it", 1, 3 + MAX_BYTES_OPERAND, false,
	 run_mem, &size_names,
	 "SIZE is u8, u16, u32 or u64. Values are numbers of that size, or without SIZE bytes as\n"
	 "hexadecimal digits. An address is physical; gpa:0x8000 is guest-physical, through the EPT of the\n"
	 "current VMCS; gla:0x8000 is linear in L2, through its paging.\n"},
	{"code", "[at GPA] BYTES...", "machine code for L2, at RIP or at GPA", 1, 2 + MAX_BYTES_OPERAND, true,
	 run_code, NULL,
	 "code e4 60 f4          in al, 0x60; hlt: where L2 goes on\n"
	 "code at 0x9000 f4      guest-physical; gla:0x9000 is linear in L2\n"},
	{0},
};
