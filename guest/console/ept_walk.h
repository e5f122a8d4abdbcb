/* The EPT paging structures in memory: walked, and changed (SDM Vol. 3C, 29.3). */
#ifndef CONSOLE_EPT_WALK_H
#define CONSOLE_EPT_WALK_H

#include <stdbool.h>
#include <stdint.h>

enum { EPT_MAX_LEVELS = 5 };

/* An entry that a walk has met. */
struct ept_step {
	unsigned int level; /* 1 is a PTE */
	uint64_t at, entry;
};

struct ept_walk {
	struct ept_step steps[EPT_MAX_LEVELS];
	unsigned int count;
	bool mapped;
	uint64_t physical; /* where mapped */
};

struct ept_root {
	uint64_t table;
	unsigned int levels;
};

/* The structures that the current VMCS names. False, and said, where it names none that can be walked. */
bool ept_current(struct ept_root *root, bool quiet);

/* False where an entry can't be read. */
bool ept_walk(struct ept_root root, uint64_t gpa, struct ept_walk *walk);
bool ept_walk_current(uint64_t gpa, struct ept_walk *walk, bool quiet);

/* Whether the processor uses the entry (by the controls that ept_current last saw), and whether it maps a page rather than lead to a table. */
bool ept_present(uint64_t entry);
bool ept_is_page(uint64_t entry, unsigned int level);

/* The lowest bit of a guest-physical address that selects an entry of this level. */
unsigned int ept_shift(unsigned int level);

/*
 * Writes the entry of this level for a guest-physical address, and what leads there: tables that are missing
 * are made of free pages, a large page on the way is split. False, and said, where that can't be.
 */
bool ept_set(struct ept_root root, uint64_t gpa, unsigned int level, uint64_t entry);

/* A page for a table, all zeros, that none of these structures is; 0, and said, where none is free. */
uint64_t ept_free_page(const struct ept_root *root);

#endif
