/* The EPT paging structures that the current VMCS names. */
#include <stdint.h>

#include "console/address.h"
#include "console/command.h"
#include "console/ept_walk.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "prompt_facts.h"
#include "vmx/instructions.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum {
	ENTRIES = 512,
	PAGES_SHOWN = 48,        /* runs of pages */
	TABLES_LOOKED_AT = 4096, /* a circle of tables has no end */
	LEVELS_OF_NEW = 4,
};

static const struct name ept_word_list[] = {{0, "show"}, {0, "map"}, {0, "unmap"}, {0, "new"}};
static const struct names ept_words = {"word", ept_word_list, 4};

static const struct name size_list[] = {{1, "4k"}, {2, "2m"}, {3, "1g"}};
static const struct names size_names = {"size", size_list, 3};

/* --- what is shown ----------------------------------------------------------------------------------------- */

/* Rights, memory type of a page, and all else that is set, in vmxlab's words. */
static void say_bits(uint64_t entry, bool is_page)
{
	uint64_t type = (entry & EPT_MEMORY_TYPE) >> EPT_MEMORY_TYPE_SHIFT;
	const char *name = name_of(&memory_type_names, type);
	say("%c%c%c", entry & EPT_READ ? 'r' : '-', entry & EPT_WRITE ? 'w' : '-',
	    entry & EPT_EXECUTE ? 'x' : '-');
	if (!(entry & EPT_USER_EXECUTE) != !(entry & EPT_EXECUTE))
		say(" %cux", entry & EPT_USER_EXECUTE ? '+' : '-');
	if (is_page && name)
		say(" %s", name);
	else if (is_page)
		say(" type%lu", type);
	for (size_t i = 0; i < ept_bits.count; i++)
		if (entry >> ept_bits.list[i].value & 1)
			say(" %s", ept_bits.list[i].text);
}

static const char *size_of(unsigned int level)
{
	const char *size = name_of(&size_names, level);
	return size ? size : "";
}

static void say_step(const struct ept_step *step)
{
	bool is_page = ept_is_page(step->entry, step->level);
	const char *name = name_of(&ept_levels, step->level);
	say("  %-5s at %#lx: %#lx  ", name ? name : "PML5E", step->at, step->entry);
	if (!ept_present(step->entry)) {
		say("not present\n");
		return;
	}
	say_bits(step->entry, is_page);
	if (is_page)
		say("  page of %s\n", size_of(step->level));
	else
		say("  table at %#llx\n", step->entry & EPT_ADDRESS);
}

static void show_walk(struct ept_root root, uint64_t gpa)
{
	struct ept_walk walk;
	if (!ept_walk(root, gpa, &walk))
		return;
	for (unsigned int i = 0; i < walk.count; i++)
		say_step(&walk.steps[i]);
	if (walk.mapped)
		say("gpa:%#lx is physical address %#lx\n", gpa, walk.physical);
	else
		say("gpa:%#lx is not mapped\n", gpa);
}

/* Pages that follow each other on both sides, with the same attributes, are one line. */
struct listing {
	uint64_t gpa, entry, pages;
	unsigned int level;
	unsigned int shown, tables;
};

static void say_listed(struct listing *listing)
{
	uint64_t bytes = listing->pages << (listing->level ? ept_shift(listing->level) : 0);
	if (listing->pages && listing->shown++ < PAGES_SHOWN) {
		say("  gpa:%#lx-%#lx -> %#llx  ", listing->gpa, listing->gpa + bytes - 1,
		    listing->entry & EPT_ADDRESS);
		say_bits(listing->entry, true);
		say("  %lu x %s\n", listing->pages, size_of(listing->level));
	}
	listing->pages = 0;
}

static void list_page(struct listing *listing, uint64_t gpa, uint64_t entry, unsigned int level)
{
	uint64_t bytes = listing->pages << ept_shift(level);
	if (listing->pages && level == listing->level && gpa == listing->gpa + bytes &&
	    entry == listing->entry + bytes) {
		listing->pages++;
		return;
	}
	say_listed(listing);
	listing->gpa = gpa;
	listing->entry = entry;
	listing->level = level;
	listing->pages = 1;
}

static bool list_table(struct listing *listing, uint64_t table, uint64_t gpa, unsigned int level)
{
	if (listing->tables++ == TABLES_LOOKED_AT || listing->shown > PAGES_SHOWN)
		return false;
	for (uint64_t i = 0; i < ENTRIES; i++) {
		uint64_t entry, at = gpa + (i << ept_shift(level));
		if (!physical_read(table + 8 * i, 8, &entry))
			return false;
		if (!ept_present(entry))
			continue;
		if (ept_is_page(entry, level))
			list_page(listing, at, entry, level);
		else if (level == 1 || !list_table(listing, entry & EPT_ADDRESS, at, level - 1))
			return false;
	}
	return true;
}

static void show_all(struct ept_root root)
{
	struct listing listing = {0};
	bool whole = list_table(&listing, root.table, 0, root.levels);
	say_listed(&listing);
	if (!whole || listing.shown > PAGES_SHOWN)
		say("and so on: 'ept show GPA' shows one of them\n");
	else if (!listing.shown)
		say("nothing is mapped\n");
}

/* --- changes ----------------------------------------------------------------------------------------------- */

/* What the processor may remember of the old entries (SDM Vol. 3C, 29.4.3). */
static void invalidate(void)
{
	struct vmx_invalidation descriptor = {field_or_0(VMCS_EPT_POINTER), 0};
	uint64_t capabilities = 0, type = INVEPT_SINGLE_CONTEXT;
	vmx_capability(MSR_IA32_VMX_EPT_VPID_CAP, &capabilities);
	if (!(capabilities & EPT_VPID_CAP_INVEPT)) {
		say("no INVEPT: this processor has none\n");
		return;
	}
	if (!(capabilities & EPT_VPID_CAP_INVEPT_SINGLE_CONTEXT))
		type = INVEPT_GLOBAL;
	say("INVEPT, %s: ", type == INVEPT_GLOBAL ? "global" : "single-context");
	outcome_report(vmx_invept(type, &descriptor));
}

static void warn_of_control(void)
{
	if (!control_is_set(VMCS_SECONDARY_PROCESSOR_BASED_CONTROLS, SECONDARY_CONTROL_ENABLE_EPT))
		say("note: ENABLE_EPT is 0 in SECONDARY_PROCESSOR_BASED_CONTROLS, so the processor does not "
		    "use "
		    "it\n");
}

static void warn_of_size(unsigned int level)
{
	uint64_t capabilities = 0;
	vmx_capability(MSR_IA32_VMX_EPT_VPID_CAP, &capabilities);
	if ((level == 2 && !(capabilities & EPT_VPID_CAP_PAGE_2M)) ||
	    (level == 3 && !(capabilities & EPT_VPID_CAP_PAGE_1G)))
		say("note: this processor has no EPT pages of %s: the entry is a misconfiguration\n",
		    size_of(level));
}

/* Any of "r", "rw", "x", "rwx" ..., or "none". */
static bool rights_operand(const char *word, uint64_t *rights)
{
	*rights = 0;
	if (word_is(word, "none"))
		return true;
	for (; *word; word++) {
		if (*word == 'r')
			*rights |= EPT_READ;
		else if (*word == 'w')
			*rights |= EPT_WRITE;
		else if (*word == 'x')
			*rights |= EPT_EXECUTE | EPT_USER_EXECUTE;
		else
			return false;
	}
	return true;
}

struct mapping {
	uint64_t gpa, hpa, rights, type;
	unsigned int level;
};

/* Rights, size and memory type, in whatever order. */
static bool read_options(struct mapping *mapping, unsigned int count, char *words[])
{
	for (unsigned int i = 0; i < count; i++) {
		uint64_t rights;
		const struct name *found = NULL;
		for (size_t n = 0; n < size_names.count + memory_type_names.count; n++) {
			const struct name *name = n < size_names.count
							  ? &size_names.list[n]
							  : &memory_type_names.list[n - size_names.count];
			if (word_is(words[i], name->text))
				found = name;
		}
		if (found >= size_list && found < size_list + size_names.count) {
			mapping->level = (unsigned int)found->value;
		} else if (found) {
			mapping->type = found->value;
		} else if (rights_operand(words[i], &rights)) {
			mapping->rights = rights;
		} else {
			say("'%s' is neither rights (rwx, r, ..., none) nor a size (4k, 2m, 1g) nor a memory "
			    "type "
			    "(wb, uc, wt, wc, wp)\n",
			    words[i]);
			return false;
		}
	}
	return true;
}

static bool is_aligned(const char *what, uint64_t address, unsigned int level)
{
	if (!(address & ((1ull << ept_shift(level)) - 1)))
		return true;
	say("%s %#lx is not a multiple of %s\n", what, address, size_of(level));
	return false;
}

static void show_change(struct ept_root root, uint64_t gpa)
{
	show_walk(root, gpa);
	invalidate();
	warn_of_control();
}

static bool run_map(struct ept_root root, unsigned int count, char *words[])
{
	struct mapping map = {.level = 1,
			      .rights = EPT_READ | EPT_WRITE | EPT_EXECUTE | EPT_USER_EXECUTE,
			      .type = MEMORY_TYPE_WB};
	uint64_t entry, limit = (1ull << ept_shift(root.levels + 1)) - 1;
	if (count < 2 || !limited_operand(words[0], "a guest-physical address", limit, &map.gpa) ||
	    !limited_operand(words[1], "a physical address", EPT_ADDRESS | 0xfff, &map.hpa) ||
	    !read_options(&map, count - 2, words + 2) || !is_aligned("GPA", map.gpa, map.level) ||
	    !is_aligned("physical address", map.hpa, map.level))
		return false;
	entry = map.hpa | map.rights | map.type << EPT_MEMORY_TYPE_SHIFT | (map.level > 1 ? EPT_LARGE : 0);
	if (!ept_set(root, map.gpa, map.level, entry))
		return true;
	warn_of_size(map.level);
	show_change(root, map.gpa);
	return true;
}

/* The 4 KiB page at an address; of a larger one only these, unless its size is named. */
static bool run_unmap(struct ept_root root, unsigned int count, char *words[])
{
	struct mapping map = {.level = 1};
	struct ept_walk walk;
	if (count < 1 || !number_operand(words[0], &map.gpa) || !read_options(&map, count - 1, words + 1) ||
	    !is_aligned("GPA", map.gpa, map.level))
		return false;
	if (!ept_walk(root, map.gpa, &walk))
		return true;
	if (!walk.mapped) {
		say("gpa:%#lx is not mapped\n", map.gpa);
		return true;
	}
	if (ept_set(root, map.gpa, map.level, 0))
		show_change(root, map.gpa);
	return true;
}

/* An empty root, and the pointer to it. */
static bool run_new(void)
{
	struct ept_root before = {0};
	uint64_t table, pointer;
	ept_current(&before, true); /* whose tables stay as they are */
	table = ept_free_page(&before);
	pointer = table | MEMORY_TYPE_WB | (LEVELS_OF_NEW - 1) << 3; /* SDM Vol. 3C, table 25-9 */
	if (table && field_write(VMCS_EPT_POINTER, pointer)) {
		say("EPT_POINTER = %#lx: nothing is mapped\n", pointer);
		warn_of_control();
	}
	return true;
}

static bool run_ept(unsigned int count, char *words[])
{
	struct ept_root root;
	uint64_t gpa;
	if (word_is(words[1], "new"))
		return count == 1 && run_new();
	if (!word_is(words[1], "show") && !word_is(words[1], "map") && !word_is(words[1], "unmap"))
		return false;
	if (!ept_current(&root, false))
		return true;
	if (word_is(words[1], "map"))
		return run_map(root, count - 1, words + 2);
	if (word_is(words[1], "unmap"))
		return run_unmap(root, count - 1, words + 2);
	if (count > 2 || (count == 2 && !number_operand(words[2], &gpa)))
		return false;
	if (count == 2)
		show_walk(root, gpa);
	else
		show_all(root);
	return true;
}

const struct command ept_commands[] = {
	{"ept", "show|map|unmap|new ...", "the EPT of the current VMCS", 1, 6, true, run_ept, &ept_words,
	 "ept show [GPA]                          what is mapped, or the walk of one address\n"
	 "ept map GPA ADDRESS [rwx] [4k|2m|1g] [wb|uc|...]\n"
	 "                                        map a page; tables come from free pages\n"
	 "ept unmap GPA [4k|2m|1g]                take it away; a larger page is split\n"
	 "ept new                                 no tables yet: an empty one, and EPT_POINTER to it\n"
	 "What the processor remembers of a change it forgets by INVEPT, where it has it.\n"},
	{0},
};
