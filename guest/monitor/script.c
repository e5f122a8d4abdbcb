#include "monitor/script.h"

#include "cpu/traps.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/exits.h"
#include "monitor/l1_state.h"
#include "monitor/operations.h"
#include "monitor/reader.h"
#include "monitor/records.h"
#include "monitor/sweep.h"
#include "protocol.h"
#include "vmx/entry.h"

/* What the running script has said so far. */
static struct {
	struct exit_policy policy;
	uint32_t id;
	const char *why;
	bool ended;
	bool sets_up; /* and enters nothing */
} run;

/* The operands of OP_CASE. */
static bool read_case(struct reader *script, uint32_t *id, char name[NAME_BYTES + 1])
{
	uint8_t length;
	const uint8_t *text;
	*id = take32(script);
	length = take8(script);
	text = take(script, length);
	if (script->overrun || length > NAME_BYTES)
		return false;
	memcpy(name, text, length);
	name[length] = 0;
	return true;
}

static bool op_case(struct reader *script)
{
	char name[NAME_BYTES + 1];
	if (!read_case(script, &run.id, name))
		return false;
	if (run.sets_up)
		return true; /* no case for a reader of the log: it does not run */
	record_begin("case");
	record_number("id", run.id);
	if (*name)
		record_word("name", name);
	record_end();
	return true;
}

static void op_live(struct reader *script)
{
	run.id = take32(script);
	record_begin("live");
	record_number("id", run.id);
	record_end();
}

static bool op_watch(struct reader *script)
{
	unsigned int fields = take8(script);
	if (fields > MAX_WATCHED_FIELDS)
		return false;
	for (unsigned int i = 0; i < fields; i++)
		run.policy.watched[i] = take32(script);
	run.policy.watched_count = fields;
	return true;
}

static void op_defaults(struct reader *script)
{
	const uint8_t *defaults = take(script, EXIT_REASONS);
	if (!script->overrun)
		memcpy(run.policy.defaults, defaults, EXIT_REASONS);
}

static bool op_reaction(struct reader *script)
{
	struct reaction *reaction;
	if (run.policy.reaction_count == MAX_REACTIONS)
		return false;
	reaction = &run.policy.reactions[run.policy.reaction_count++];
	*reaction = (struct reaction){.reason = take16(script)};
	reaction->from_match = take32(script);
	reaction->match_count = take32(script);
	reaction->qualification_mask = take64(script);
	reaction->qualification_value = take64(script);
	reaction->action_bytes = take16(script);
	reaction->actions = take(script, reaction->action_bytes);
	return true;
}

/* After a "stop" the script goes on; a failed VMLAUNCH is an outcome like any other; the rest ends the case. */
static vmx_outcome op_enter(struct reader *script)
{
	uint8_t how = take8(script);
	bool resume = how & ENTER_RESUME;
	uint32_t max_exits = take32(script);
	vmx_outcome outcome = VMX_SUCCEED;
	if (script->overrun)
		return outcome;
	/* If this entry kills the machine, what was said before it must not die in the UART. */
	record_end_list();
	serial_drain();
	run.policy.reports_vmcs = !(how & ENTER_WITHOUT_VMCS_REPORT);
	run.why = exits_run(&run.policy, resume, max_exits, &outcome);
	run.ended = outcome == VMX_SUCCEED && strcmp(run.why, "stop") != 0;
	return outcome;
}

static vmx_outcome op_sweep(struct reader *script)
{
	vmx_outcome outcome = VMX_SUCCEED;
	run.why = sweep_run(script, &run.policy, &outcome);
	run.ended = outcome == VMX_SUCCEED && strcmp(run.why, "done") != 0;
	return outcome;
}

/* What L2 is about to execute: an image that boots by hand says it, as no harness writes it into the log. */
static void op_code(struct reader *script)
{
	uint8_t bits = take8(script);
	uint64_t base = take64(script), at = take64(script), address = take64(script);
	uint32_t bytes = take32(script);
	while (bytes && !script->overrun) {
		uint32_t chunk = bytes < MEMORY_RECORD_BYTES ? bytes : MEMORY_RECORD_BYTES;
		record_begin("code");
		record_number("id", run.id);
		record_word("mode", bits == 64 ? "long" : bits == 32 ? "protected" : "real");
		record_nonzero("base", base);
		record_number("at", at);
		record_bytes("data", at_physical(address), chunk);
		record_end();
		at += chunk;
		address += chunk;
		bytes -= chunk;
	}
}

/* Executes one operation. *outcome says how a VMX instruction ended; false: the script can't be read. */
static bool step(struct reader *script, enum op op, vmx_outcome *outcome)
{
	*outcome = VMX_SUCCEED;
	switch (op) {
	case OP_END:
		script->position = script->end;
		return true;
	case OP_CASE:
		return op_case(script);
	case OP_LIVE:
		op_live(script);
		return true;
	case OP_CODE:
		op_code(script);
		return true;
	case OP_WATCH:
		return op_watch(script);
	case OP_DEFAULTS:
		op_defaults(script);
		return true;
	case OP_REACTION:
		return op_reaction(script);
	case OP_ENTER:
		*outcome = op_enter(script);
		return true;
	case OP_SWEEP:
		*outcome = op_sweep(script);
		return true;
	default:
		return operation_execute(script, op, outcome);
	}
}

/* Runs until the script ends, a VMX instruction fails that may not, or an entry ends the case. */
static void run_operations(struct reader *script)
{
	run.why = "done";
	run.ended = false;
	while (script->position < script->end && !run.ended) {
		uint8_t byte = take8(script);
		enum op op = byte & ~OP_GO_ON;
		vmx_outcome outcome;
		if (run.sets_up && (op == OP_ENTER || op == OP_SWEEP))
			return;
		if (op < OP_VMXON)
			serial_poll();
		else
			serial_flush();
		if (!step(script, op, &outcome) || script->overrun) {
			run.why = "script";
			return;
		}
		if (outcome != VMX_SUCCEED && !(byte & OP_GO_ON)) {
			run.why = "vmfail";
			return;
		}
	}
}

static void report_end(void)
{
	record_begin("end");
	record_number("id", run.id);
	record_word("why", run.why);
	record_number("exits", exits_count());
	record_end();
}

/* A live command goes on with what the one before left, and leaves everything in its turn. */
static bool is_live(const struct script *script)
{
	return script->length && script->bytes[0] == OP_LIVE;
}

/* A fault that no instruction was expected to raise ends the script. */
static void run_guarded(const struct script *script)
{
	struct reader reader = {script->bytes, script->bytes + script->length, false};
	struct recovery recovery, *outer = trap_recovery;
	if (recovery_set(&recovery) == 0) {
		trap_recovery = &recovery;
		run_operations(&reader);
	} else {
		run.why = "fault";
	}
	trap_recovery = outer;
}

/* Runs as much as is to be run. `live`: what was set up before stays, and the registers. */
static void run_script(const struct script *script, bool live)
{
	if (!live) {
		l1_undo(); /* what the prompt or a live session has set up */
		memset(l2_registers, 0, sizeof(l2_registers));
	}
	nmi_unblock();
	exits_reset(&run.policy);
	sweep_reset();
	run.id = 0;
	trap_events_wanted = false;
	run_guarded(script);
	l1_settle();
}

void script_run(const struct script *script)
{
	bool live = is_live(script);
	run.sets_up = false;
	run_script(script, live);
	if (!live)
		l1_undo();
	report_end();
}

bool script_set_up(const struct script *script)
{
	run.sets_up = true;
	run_script(script, false);
	record_end_list();
	return strcmp(run.why, "done") == 0;
}

void script_name(const struct script *script, char name[NAME_BYTES + 1])
{
	struct reader reader = {script->bytes, script->bytes + script->length, false};
	uint32_t id;
	*name = 0;
	if (take8(&reader) == OP_CASE && !read_case(&reader, &id, name))
		*name = 0;
}
