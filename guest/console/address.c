#include "console/address.h"

#include "boot/boot.h"
#include "console/ept_walk.h"
#include "console/names.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "vmx_facts.h"

#define PAGE_BYTES 4096ull
#define PAGING_ADDRESS 0xffffffffff000ull /* SDM Vol. 3A, tables 5-15 to 5-20: bits 51:12 */
#define PAGING_PRESENT 0x01ull
#define PAGING_LARGE 0x80ull
#define MONITOR_MAPS (1ull << 32) /* boot/start.S */

static const char *const prefixes[] = {"", "gpa:", "gla:"};

bool address_operand(const char *word, struct address *address)
{
	address->space = PHYSICAL;
	for (enum address_space space = GUEST_PHYSICAL; space <= GUEST_LINEAR; space++) {
		size_t length = strlen(prefixes[space]);
		if (!name_begins(word, prefixes[space], length))
			continue;
		address->space = space;
		word += length;
		break;
	}
	return number_operand(word, &address->at);
}

void address_say(struct address address)
{
	say("%s%#lx", prefixes[address.space], address.at);
}

/* --- physical ---------------------------------------------------------------------------------------------- */

static bool report_access(const char *what, uint64_t physical, vmx_outcome outcome)
{
	if (outcome == VMX_SUCCEED)
		return true;
	say("%s at physical address %#lx: ", what, physical);
	outcome_say(outcome);
	say("%s\n", physical >= MONITOR_MAPS ? " (the monitor maps the first 4 GiB)" : "");
	return false;
}

/*
 * Registers of the APICs have 32 bits each: those of the local one stand at multiples of 16 (SDM Vol. 3A, 11.4.1),
 * the I/O APIC has two. What other accesses do is undefined; an emulator may end at them.
 */
static bool is_undefined(uint64_t physical, unsigned int bytes)
{
	enum { IO_APIC = 0xfec00000, LOCAL_APIC = 0xfee00000, APIC_BYTES = 0x1000, MIB = 0x100000 };
	bool local = physical - LOCAL_APIC < APIC_BYTES, io = physical - IO_APIC < MIB;
	if (!local && !io)
		return false;
	if (bytes == 4 && physical % 16 == 0 && (local || physical - IO_APIC <= 16))
		return false;
	say("%#lx is in %s: not a register of 32 bits\n", physical, local ? "the local APIC" : "an I/O APIC");
	return true;
}

bool physical_read(uint64_t physical, unsigned int bytes, uint64_t *value)
{
	const void *memory = at_physical(physical);
	vmx_outcome outcome;
	*value = 0;
	if (is_undefined(physical, bytes))
		return false;
	switch (bytes) {
	case 1:
		outcome = try_read8(memory, (uint8_t *)value);
		break;
	case 2:
		outcome = try_read16(memory, (uint16_t *)value);
		break;
	case 4:
		outcome = try_read32(memory, (uint32_t *)value);
		break;
	default:
		outcome = try_read64(memory, value);
	}
	return report_access("read", physical, outcome);
}

static bool is_monitors(uint64_t physical, unsigned int bytes)
{
	uint64_t start = (uintptr_t)monitor_start, end = (uintptr_t)monitor_end;
	if (physical + bytes <= start || physical >= end)
		return false;
	say("%#lx is the monitor's own memory (%#lx to %#lx): nothing was written\n", physical, start,
	    end - 1);
	return true;
}

bool physical_write(uint64_t physical, unsigned int bytes, uint64_t value)
{
	void *memory = at_physical(physical);
	vmx_outcome outcome;
	if (is_monitors(physical, bytes) || is_undefined(physical, bytes))
		return false;
	switch (bytes) {
	case 1:
		outcome = try_write8(memory, (uint8_t)value);
		break;
	case 2:
		outcome = try_write16(memory, (uint16_t)value);
		break;
	case 4:
		outcome = try_write32(memory, (uint32_t)value);
		break;
	default:
		outcome = try_write64(memory, value);
	}
	return report_access("write", physical, outcome);
}

/* --- L2's -------------------------------------------------------------------------------------------------- */

static bool translate_guest_physical(uint64_t gpa, uint64_t *physical, bool quiet)
{
	struct ept_walk walk;
	if (!control_is_set(VMCS_SECONDARY_PROCESSOR_BASED_CONTROLS, SECONDARY_CONTROL_ENABLE_EPT)) {
		*physical = gpa; /* SDM Vol. 3C, 29.3.1: then they are the same */
		return true;
	}
	if (!ept_walk_current(gpa, &walk, quiet))
		return false;
	if (walk.mapped) {
		*physical = walk.physical;
		return true;
	}
	if (!quiet)
		say("gpa:%#lx is not mapped by EPT\n", gpa);
	return false;
}

static bool not_mapped(uint64_t gla, bool quiet)
{
	if (!quiet)
		say("gla:%#lx is not mapped by L2's paging\n", gla);
	return false;
}

/* An entry of L2's paging structures. */
static bool read_entry(uint64_t gpa, unsigned int bytes, uint64_t *entry, bool quiet)
{
	uint64_t physical;
	return translate_guest_physical(gpa, &physical, quiet) && physical_read(physical, bytes, entry);
}

/* 4-level, 5-level and PAE paging: SDM Vol. 3A, 5.4 and 5.5. */
static bool walk_wide(uint64_t gla, uint64_t table, unsigned int levels, uint64_t *gpa, bool quiet)
{
	for (unsigned int level = levels; level >= 1; level--) {
		unsigned int shift = 12 + 9 * (level - 1);
		uint64_t entry, page = (1ull << shift) - 1;
		unsigned int index_mask = levels == 3 && level == 3 ? 3 : 511;
		if (!read_entry(table + 8 * (gla >> shift & index_mask), 8, &entry, quiet))
			return false;
		if (!(entry & PAGING_PRESENT))
			return not_mapped(gla, quiet);
		if (level == 1 || (level <= 3 && !(levels == 3 && level == 3) && entry & PAGING_LARGE)) {
			*gpa = (entry & PAGING_ADDRESS & ~page) | (gla & page);
			return true;
		}
		table = entry & PAGING_ADDRESS;
	}
	return false;
}

/* 32-bit paging: SDM Vol. 3A, 5.3. */
static bool walk_32_bit(uint64_t gla, uint64_t cr3, bool large_pages, uint64_t *gpa, bool quiet)
{
	enum { SHIFT_4M = 22 };
	uint64_t entry, page = (1ull << SHIFT_4M) - 1;
	if (!read_entry((cr3 & 0xfffff000u) + 4 * (gla >> SHIFT_4M & 1023), 4, &entry, quiet))
		return false;
	if (!(entry & PAGING_PRESENT))
		return not_mapped(gla, quiet);
	if (large_pages && entry & PAGING_LARGE) {
		*gpa = (entry & 0xffc00000u) | (entry >> 13 & 0xff) << 32 | (gla & page);
		return true;
	}
	if (!read_entry((entry & 0xfffff000u) + 4 * (gla >> 12 & 1023), 4, &entry, quiet))
		return false;
	if (!(entry & PAGING_PRESENT))
		return not_mapped(gla, quiet);
	*gpa = (entry & 0xfffff000u) | (gla & (PAGE_BYTES - 1));
	return true;
}

static bool translate_linear(uint64_t gla, uint64_t *gpa, bool quiet)
{
	uint64_t cr0, cr3 = field_or_0(VMCS_GUEST_CR3), cr4 = field_or_0(VMCS_GUEST_CR4);
	if (quiet)
		cr0 = field_or_0(VMCS_GUEST_CR0);
	else if (!field_read(VMCS_GUEST_CR0, &cr0))
		return false;
	if (!(cr0 & CR0_PG)) {
		*gpa = gla;
		return true;
	}
	if (!(cr4 & CR4_PAE))
		return walk_32_bit(gla, cr3, cr4 & CR4_PSE, gpa, quiet);
	if (!(field_or_0(VMCS_ENTRY_CONTROLS) & ENTRY_CONTROL_IA32E_MODE_GUEST))
		return walk_wide(gla, cr3 & 0xffffffe0u, 3, gpa, quiet);
	return walk_wide(gla, cr3 & PAGING_ADDRESS, cr4 & CR4_LA57 ? 5 : 4, gpa, quiet);
}

bool address_translate(struct address address, uint64_t *physical, bool quiet)
{
	uint64_t gpa = address.at;
	if (address.space == PHYSICAL) {
		*physical = address.at;
		return true;
	}
	if (address.space == GUEST_LINEAR && !translate_linear(address.at, &gpa, quiet))
		return false;
	return translate_guest_physical(gpa, physical, quiet);
}

bool address_read(struct address address, uint8_t *bytes, unsigned int count, bool quiet)
{
	uint64_t physical = 0, value;
	for (unsigned int i = 0; i < count; i++, address.at++, physical++) {
		if ((i == 0 || address.at % PAGE_BYTES == 0) && !address_translate(address, &physical, quiet))
			return false;
		if (!physical_read(physical, 1, &value))
			return false;
		bytes[i] = (uint8_t)value;
	}
	return true;
}

bool address_write(struct address address, const uint8_t *bytes, unsigned int count)
{
	uint64_t physical = 0;
	for (unsigned int i = 0; i < count; i++, address.at++, physical++) {
		if ((i == 0 || address.at % PAGE_BYTES == 0) && !address_translate(address, &physical, false))
			return false;
		if (!physical_write(physical, 1, bytes[i]))
			return false;
	}
	return true;
}
