#include "console/ept_walk.h"

#include "console/address.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "prompt_facts.h"
#include "vmx_facts.h"

enum { ENTRIES = 512, PAGE_BYTES = 4096 };

#define RIGHTS (EPT_READ | EPT_WRITE | EPT_EXECUTE)

/* Any of these bits makes an entry present. */
static uint64_t present_bits;

bool ept_current(struct ept_root *root, bool quiet)
{
	uint64_t pointer;
	bool mode_based = control_is_set(VMCS_SECONDARY_PROCESSOR_BASED_CONTROLS,
					 SECONDARY_CONTROL_MODE_BASED_EXECUTE_CONTROL_FOR_EPT);
	present_bits = mode_based ? RIGHTS | EPT_USER_EXECUTE : RIGHTS;
	if (quiet)
		pointer = field_or_0(VMCS_EPT_POINTER);
	else if (!field_read(VMCS_EPT_POINTER, &pointer))
		return false;
	root->table = pointer & EPT_ADDRESS;
	root->levels = (unsigned int)(pointer >> 3 & 7) + 1; /* SDM Vol. 3C, table 25-9 */
	if (root->table && (root->levels == 4 || root->levels == 5))
		return true;
	if (!quiet && !root->table)
		say("EPT_POINTER is %#lx: there are no tables; 'ept new' makes some\n", pointer);
	else if (!quiet)
		say("EPT_POINTER is %#lx: a page walk of %u levels is none\n", pointer, root->levels);
	return false;
}

bool ept_present(uint64_t entry)
{
	return entry & present_bits;
}

bool ept_is_page(uint64_t entry, unsigned int level)
{
	return level == 1 || (level <= 3 && entry & EPT_LARGE);
}

unsigned int ept_shift(unsigned int level)
{
	return 12 + 9 * (level - 1);
}

static uint64_t entry_address(uint64_t table, uint64_t gpa, unsigned int level)
{
	return table + 8 * (gpa >> ept_shift(level) & (ENTRIES - 1));
}

bool ept_walk(struct ept_root root, uint64_t gpa, struct ept_walk *walk)
{
	uint64_t table = root.table;
	*walk = (struct ept_walk){0};
	for (unsigned int level = root.levels; level >= 1; level--) {
		struct ept_step *step = &walk->steps[walk->count++];
		uint64_t page = (1ull << ept_shift(level)) - 1;
		step->level = level;
		step->at = entry_address(table, gpa, level);
		if (!physical_read(step->at, 8, &step->entry))
			return false;
		if (!ept_present(step->entry))
			return true;
		if (ept_is_page(step->entry, level)) {
			walk->mapped = true;
			walk->physical = (step->entry & EPT_ADDRESS & ~page) | (gpa & page);
			return true;
		}
		table = step->entry & EPT_ADDRESS;
	}
	return true;
}

bool ept_walk_current(uint64_t gpa, struct ept_walk *walk, bool quiet)
{
	struct ept_root root;
	return ept_current(&root, quiet) && ept_walk(root, gpa, walk);
}

/* --- free pages -------------------------------------------------------------------------------------------- */

/* The pages of EPT_TABLES that are tables of these structures. */
static bool in_use[EPT_TABLES_MAX];

/* Not what a table leads to outside of EPT_TABLES; and each table once, so that a circle ends. */
static void mark(uint64_t table, unsigned int level)
{
	const uint64_t *entries = at_physical(table);
	uint64_t page = (table - EPT_TABLES) / PAGE_BYTES;
	if (table < EPT_TABLES || page >= EPT_TABLES_MAX || in_use[page])
		return;
	in_use[page] = true;
	for (unsigned int i = 0; level > 1 && i < ENTRIES; i++)
		if (ept_present(entries[i]) && !ept_is_page(entries[i], level))
			mark(entries[i] & EPT_ADDRESS, level - 1);
}

static bool is_zero(uint64_t page)
{
	const uint64_t *words = at_physical(page);
	for (unsigned int i = 0; i < PAGE_BYTES / sizeof(*words); i++)
		if (words[i])
			return false;
	return true;
}

/* The highest that is free; where none is all zeros, one that was a table of structures given up since. */
static uint64_t choose_page(void)
{
	uint64_t other = 0;
	for (unsigned int i = EPT_TABLES_MAX; i-- > 0;) {
		uint64_t page = EPT_TABLES + i * PAGE_BYTES;
		if (in_use[i])
			continue;
		if (is_zero(page))
			return page;
		if (!other)
			other = page;
	}
	return other;
}

uint64_t ept_free_page(const struct ept_root *root)
{
	uint64_t page;
	memset(in_use, 0, sizeof(in_use));
	mark(root->table, root->levels);
	page = choose_page();
	if (page)
		memset(at_physical(page), 0, PAGE_BYTES);
	else
		say("no page for a table is free from %#llx to %#llx\n", EPT_TABLES,
		    EPT_TABLES + EPT_TABLES_MAX * PAGE_BYTES - 1);
	return page;
}

/* --- changes ----------------------------------------------------------------------------------------------- */

/* A table that maps what the large page maps, with its attributes. */
static bool split(uint64_t table, uint64_t entry, unsigned int level)
{
	uint64_t bytes = 1ull << ept_shift(level - 1);
	uint64_t below = level - 1 == 1 ? entry & ~EPT_LARGE : entry;
	for (unsigned int i = 0; i < ENTRIES; i++)
		if (!physical_write(table + 8 * i, 8, below + i * bytes))
			return false;
	say("the page of %s that was mapped there is split\n", level == 3 ? "1 GiB" : "2 MiB");
	return true;
}

/* What an entry on the way leads to, a new table where it leads to none. 0, and said, where that fails. */
static uint64_t table_below(const struct ept_root *root, const struct ept_step *step)
{
	bool present = ept_present(step->entry);
	uint64_t page;
	if (present && !ept_is_page(step->entry, step->level))
		return step->entry & EPT_ADDRESS;
	page = ept_free_page(root);
	if (!page)
		return 0;
	if (present && !split(page, step->entry, step->level))
		return 0;
	return physical_write(step->at, 8, page | EPT_REFERENCE) ? page : 0;
}

bool ept_set(struct ept_root root, uint64_t gpa, unsigned int level, uint64_t entry)
{
	uint64_t table = root.table;
	for (unsigned int at = root.levels; at > level; at--) {
		struct ept_step step = {.level = at, .at = entry_address(table, gpa, at)};
		if (!physical_read(step.at, 8, &step.entry))
			return false;
		table = table_below(&root, &step);
		if (!table)
			return false;
	}
	return physical_write(entry_address(table, gpa, level), 8, entry);
}
