/* The I/O bitmaps and the MSR bitmap of the current VMCS: SDM Vol. 3C, 25.6.4 and 25.6.9. */
#include <stdint.h>

#include "console/address.h"
#include "console/command.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "vmx_facts.h"

enum {
	PORTS_IN_A = 0x8000, /* bitmap A has the lower ports, B the rest */
	RUNS_SHOWN = 32,
	MSRS_IN_A_RANGE = 0x2000,
	RANGE_BYTES = 1024,
};

#define HIGH_MSRS 0xc0000000u

static const struct name port_word_list[] = {{0, "on"}, {0, "off"}, {0, "show"}};
static const struct names port_words = {"word", port_word_list, 3};

static bool change_bit(uint64_t bitmap, uint64_t bit, bool on)
{
	uint64_t byte;
	if (!physical_read(bitmap + bit / 8, 1, &byte))
		return false;
	byte = on ? byte | 1u << bit % 8 : byte & ~(1ull << bit % 8);
	return physical_write(bitmap + bit / 8, 1, byte);
}

static bool read_bit(uint64_t bitmap, uint64_t bit, bool *on)
{
	uint64_t byte;
	if (!physical_read(bitmap + bit / 8, 1, &byte))
		return false;
	*on = byte >> bit % 8 & 1;
	return true;
}

/* "on", "off" or "show": 1, 0, -1; -2 for anything else. */
static int what_to_do(const char *word)
{
	if (word_is(word, "on"))
		return 1;
	if (word_is(word, "off"))
		return 0;
	return word_is(word, "show") ? -1 : -2;
}

static const char *on_or_off(bool on)
{
	return on ? "on: exits" : "off: no exit";
}

/* The bits are changed all the same: a person may set them before the control. */
static void warn_of_control(const char *name, uint64_t control, uint32_t field)
{
	if (!field_or_0(field))
		say("note: %s is 0: the bitmap is at physical address 0\n", name_of(&field_names, field));
	if (!control_is_set(VMCS_PRIMARY_PROCESSOR_BASED_CONTROLS, control))
		say("note: %s is 0 in PRIMARY_PROCESSOR_BASED_CONTROLS, so the processor does not look at "
		    "it\n",
		    name);
}

/* --- ports ------------------------------------------------------------------------------------------------- */

static uint64_t bitmap_of(const uint64_t bitmaps[2], uint64_t port)
{
	return bitmaps[port / PORTS_IN_A];
}

static bool set_ports(const uint64_t bitmaps[2], uint64_t first, uint64_t last, bool on)
{
	for (uint64_t port = first; port <= last; port++)
		if (!change_bit(bitmap_of(bitmaps, port), port % PORTS_IN_A, on))
			return false;
	return true;
}

static void say_run(uint64_t first, uint64_t last, bool on)
{
	if (first == last)
		say("port %#lx %s\n", first, on_or_off(on));
	else
		say("ports %#lx-%#lx %s\n", first, last, on_or_off(on));
}

static void show_ports(const uint64_t bitmaps[2], uint64_t first, uint64_t last)
{
	unsigned int runs = 0;
	uint64_t start = first;
	bool on, on_before = false;
	for (uint64_t port = first; port <= last; port++, on_before = on) {
		if (!read_bit(bitmap_of(bitmaps, port), port % PORTS_IN_A, &on))
			return;
		if (port == first || on == on_before)
			continue;
		if (runs++ == RUNS_SHOWN) {
			say("and so on, from port %#lx\n", start);
			return;
		}
		say_run(start, port - 1, on_before);
		start = port;
	}
	say_run(start, last, on_before);
}

static bool run_port(unsigned int count, char *words[])
{
	uint64_t first = 0, last = 0xffff, bitmaps[2];
	int what = what_to_do(words[count]);
	if (what == -2 || (count == 1 && what != -1))
		return false;
	if (count == 2 && !range_operand(words[1], "a port", 0xffff, &first, &last))
		return false;
	if (!field_read(VMCS_IO_BITMAP_A, &bitmaps[0]) || !field_read(VMCS_IO_BITMAP_B, &bitmaps[1]))
		return true;
	if (what == -1)
		show_ports(bitmaps, first, last);
	else if (set_ports(bitmaps, first, last, what == 1))
		say_run(first, last, what == 1);
	else
		return true;
	warn_of_control("USE_IO_BITMAPS", PRIMARY_CONTROL_USE_IO_BITMAPS, VMCS_IO_BITMAP_A);
	return true;
}

/* --- MSRs -------------------------------------------------------------------------------------------------- */

/* Read bits of low MSRs, of high ones; then write bits. False where the bitmap has none: RDMSR and WRMSR exit. */
static bool place_of_msr(uint64_t msr, bool write, uint64_t *bit)
{
	bool high = msr >= HIGH_MSRS;
	uint64_t index = high ? msr - HIGH_MSRS : msr;
	if (index >= MSRS_IN_A_RANGE)
		return false;
	*bit = ((write ? 2u : 0u) + high) * RANGE_BYTES * 8 + index;
	return true;
}

static bool do_msr(uint64_t bitmap, uint64_t msr, bool write, int what)
{
	uint64_t bit = 0;
	bool on = what == 1;
	place_of_msr(msr, write, &bit);
	if (what >= 0 ? !change_bit(bitmap, bit, on) : !read_bit(bitmap, bit, &on))
		return false;
	say("%s of %s (%#lx) %s\n", write ? "WRMSR" : "RDMSR",
	    name_of(&msr_names, msr) ? name_of(&msr_names, msr) : "MSR", msr, on_or_off(on));
	return true;
}

static bool run_msr(unsigned int count, char *words[])
{
	uint64_t msr, bitmap, bit;
	bool show = word_is(words[count], "show");
	const char *which = count == 3 ? words[2] : "rw";
	bool read = word_is(which, "r") || word_is(which, "rw"),
	     write = word_is(which, "w") || word_is(which, "rw");
	int what = what_to_do(words[count]);
	if (what == -2 || (!read && !write) || (count == 2 && !show))
		return false;
	if (!name_or_number(&msr_names, words[1], &msr))
		return false;
	if (!place_of_msr(msr, false, &bit)) {
		say("MSR %#lx has no bit: the bitmap has 0 to 0x1fff and 0xc0000000 to 0xc0001fff; it "
		    "exits\n",
		    msr);
		return true;
	}
	if (!field_read(VMCS_MSR_BITMAP, &bitmap))
		return true;
	if ((read && !do_msr(bitmap, msr, false, what)) || (write && !do_msr(bitmap, msr, true, what)))
		return true;
	warn_of_control("USE_MSR_BITMAPS", PRIMARY_CONTROL_USE_MSR_BITMAPS, VMCS_MSR_BITMAP);
	return true;
}

const struct command bitmap_commands[] = {
	{"port", "[PORT[-LAST]] on|off|show", "bits of the I/O bitmaps", 1, 2, true, run_port, &port_words,
	 "port 0x60 on          IN and OUT of it exit\n"
	 "port 0x3f8-0x3ff off  they don't\n"
	 "port show             all of them\n"},
	{"msr", "MSR [r|w|rw] on|off|show", "bits of the MSR bitmap", 2, 3, true, run_msr, &msr_names,
	 "msr IA32_EFER r on    RDMSR of it exits\n"},
	{0},
};
