#include "monitor/sweep.h"

#include "lib/crc.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/records.h"
#include "vmx/entry.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum {
	MAX_PROBES = 16,
	MAX_FIELDS = 8,
	REASONS_WORDS = 2,
	REASON_BASIC_MASK = 0xffff,
	REASON_EXCEPTION = 0,
	FIELD_WIDTH_SHIFT = 13, /* SDM Vol. 3C, 25.11.2: bits 14:13 of an encoding */
	FIELD_WIDTH_MASK = 3,
	/* What is folded of an exit before the fields: value, reason, RIP. */
	FOLDED_BYTES = 8 + 4 + 8 + 8 * MAX_FIELDS,
};

/* By bits 14:13: 16-bit, 64-bit, 32-bit, natural-width. */
static const uint8_t width_bytes[FIELD_WIDTH_MASK + 1] = {2, 8, 4, 8};

struct field_list {
	uint32_t count;
	uint32_t fields[MAX_FIELDS];
	uint8_t bytes[MAX_FIELDS];
};

/* The operands, as vmxlab.image.script.sweep writes them. */
struct question {
	bool resume, report_all;
	uint8_t index; /* of the register */
	uint8_t probe_count;
	uint64_t go_on[REASONS_WORDS]; /* behind these basic exit reasons */
	uint64_t rip;
	uint64_t first, stride, mask;
	uint32_t count, block;
	uint8_t *bits; /* NULL: no bit is changed */
	uint32_t first_bit, bit_stride;
	bool bit;
	uint64_t probes[MAX_PROBES];
	struct field_list of_exit, of_exception;
};

static struct question ask;
static uint64_t registers[GENERAL_REGISTERS]; /* L2's, at each entry */
static uint32_t sweeps;
static uint32_t crc;
static uint32_t folded; /* exits in the block so far */

/* The exit stub and the entry as everyone else expects them; after a fault in a sweep, too. */
static void end_asking(void)
{
	vmx_keep_host_state = false;
	vmx_registers_from = l2_registers;
	serial_listen(true);
}

void sweep_reset(void)
{
	sweeps = 0;
	end_asking();
}

static void take_fields(struct reader *script, struct field_list *list)
{
	for (uint32_t i = 0; i < list->count; i++) {
		list->fields[i] = take32(script);
		list->bytes[i] = width_bytes[list->fields[i] >> FIELD_WIDTH_SHIFT & FIELD_WIDTH_MASK];
	}
}

static bool take_question(struct reader *script)
{
	ask.resume = take8(script);
	ask.report_all = take8(script);
	ask.index = take8(script);
	ask.go_on[0] = take64(script);
	ask.go_on[1] = take64(script);
	ask.rip = take64(script);
	ask.first = take64(script);
	ask.stride = take64(script);
	ask.mask = take64(script);
	ask.count = take32(script);
	ask.block = take32(script);
	ask.bits = at_physical(take64(script));
	ask.first_bit = take32(script);
	ask.bit_stride = take32(script);
	ask.bit = take8(script);
	ask.probe_count = take8(script);
	ask.of_exit.count = take8(script);
	ask.of_exception.count = take8(script);
	if (ask.probe_count > MAX_PROBES || ask.of_exit.count > MAX_FIELDS ||
	    ask.of_exception.count > MAX_FIELDS || ask.index >= GENERAL_REGISTERS ||
	    ask.index == REGISTER_RSP || ask.block == 0)
		return false;
	for (uint32_t i = 0; i < ask.probe_count; i++)
		ask.probes[i] = take64(script);
	take_fields(script, &ask.of_exit);
	take_fields(script, &ask.of_exception);
	return !script->overrun;
}

/*
 * Without vmx_vmread's care for faults, of which there can be none here: this is most of what the monitor does
 * between two exits. A field that the processor does not have is 0.
 */
static inline uint64_t read_field(uint32_t field)
{
	uint64_t value = 0;
	asm volatile("vmread %1, %0" : "+r"(value) : "r"((uint64_t)field) : "cc");
	return value;
}

static inline uint8_t *put(uint8_t *to, uint64_t value, unsigned int bytes)
{
	/* All eight: what follows is put over those that are not wanted. Inline: a call costs more than the rest. */
	__builtin_memcpy(to, &value, sizeof(value));
	return to + bytes;
}

static void fold(uint64_t value, uint32_t reason, uint64_t rip)
{
	const struct field_list *list =
		(reason & REASON_BASIC_MASK) == REASON_EXCEPTION ? &ask.of_exception : &ask.of_exit;
	uint8_t bytes[FOLDED_BYTES + sizeof(uint64_t)], *end = bytes;
	end = put(end, value, 8);
	end = put(end, reason, 4);
	end = put(end, rip, 8);
	for (uint32_t i = 0; i < list->count; i++)
		end = put(end, read_field(list->fields[i]), list->bytes[i]);
	crc = crc32_continue(crc, bytes, (size_t)(end - bytes));
	folded++;
}

static bool goes_on(uint32_t reason)
{
	uint32_t basic = reason & REASON_BASIC_MASK;
	return !(reason & EXIT_REASON_ENTRY_FAILURE_BIT) && basic < 64 * REASONS_WORDS &&
	       ask.go_on[basic / 64] >> basic % 64 & 1;
}

/* One value: in, out, and RIP back where it was. NULL, or why the sweep ends here. */
static const char *probe(const struct exit_policy *policy, uint64_t value, vmx_outcome *failure)
{
	uint32_t reason;
	uint64_t rip;
	bool end;
	vmx_outcome outcome;
	registers[ask.index] = value;
	outcome = vmx_enter(ask.resume);
	if (outcome != VMX_ENTERED) {
		*failure = outcome;
		return "vmfail";
	}
	reason = (uint32_t)read_field(VMCS_EXIT_REASON);
	end = !goes_on(reason);
	if (end)
		serial_listen(true);
	if (end || ask.report_all)
		exits_report(policy, reason, ask.resume ? NULL : "vmlaunch");
	if (end)
		return "stop";
	ask.resume = true;
	rip = read_field(VMCS_GUEST_RIP);
	fold(value, reason, rip);
	if (rip != ask.rip)
		vmx_vmwrite(VMCS_GUEST_RIP, ask.rip);
	return NULL;
}

static void report_block(uint32_t at)
{
	serial_listen(true);
	record_begin("sweep");
	record_number("n", sweeps);
	record_number("at", at);
	record_number("exits", folded);
	record_number("crc", crc);
	record_end();
	crc = 0;
	folded = 0;
}

/* The values from index `at` on, up to a block of them. */
static const char *run_block(const struct exit_policy *policy, uint32_t at, vmx_outcome *failure)
{
	const char *why = NULL;
	uint32_t end = ask.count - at < ask.block ? ask.count : at + ask.block;
	/* Should a value kill the machine, the log says how far it got. */
	serial_drain();
	if (!ask.report_all)
		serial_listen(false);
	for (uint32_t i = at; i < end && !why; i++) {
		uint64_t value = ask.first + i * ask.stride;
		uint32_t number = ask.first_bit + i * ask.bit_stride;
		uint8_t *byte = ask.bits + number / 8, before = 0, mark = (uint8_t)(1u << number % 8);
		if (ask.bits) {
			before = *byte;
			*(volatile uint8_t *)byte = ask.bit ? before | mark : before & (uint8_t)~mark;
		}
		for (unsigned int p = 0; p < ask.probe_count && !why; p++)
			why = probe(policy, (value + ask.probes[p]) & ask.mask, failure);
		if (ask.bits)
			*(volatile uint8_t *)byte = before;
	}
	report_block(at);
	return why;
}

const char *sweep_run(struct reader *script, const struct exit_policy *policy, vmx_outcome *failure)
{
	const char *why = NULL;
	uint64_t before[GENERAL_REGISTERS];
	bool launched;
	if (!take_question(script))
		return "script";
	launched = ask.resume;
	record_end_list();
	serial_drain();
	memcpy(registers, l2_registers, sizeof(registers));
	memcpy(before, l2_registers, sizeof(before));
	crc = 0;
	folded = 0;
	vmx_vmwrite(VMCS_GUEST_RIP, ask.rip);
	/* The host-state area is the harness's own here: an exit brings back all that the monitor needs. */
	vmx_keep_host_state = true;
	vmx_registers_from = registers;
	for (uint32_t at = 0; at < ask.count && !why; at += ask.block)
		why = run_block(policy, at, failure);
	end_asking();
	vmx_restore_monitor();
	memcpy(l2_registers, before, sizeof(before));
	sweeps++;
	if (why && strcmp(why, "vmfail") == 0) {
		record_begin("vmx");
		record_word("op", launched || ask.resume ? "vmresume" : "vmlaunch");
		record_outcome(*failure);
		record_end();
	}
	return why ? why : "done";
}
