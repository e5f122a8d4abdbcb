/* What happens between a VM entry and the end of a case: exits are reported, and answered as the script says. */
#ifndef MONITOR_EXITS_H
#define MONITOR_EXITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmx/instructions.h"

enum {
	EXIT_REASONS = 128,
	MAX_REACTIONS = 64,
	MAX_WATCHED_FIELDS = 64,
};

/* One reaction of the script: which exits it is for, and its actions as they stand in the script. */
struct reaction {
	uint16_t reason;
	uint32_t from_match;  /* applies from this match on, counted from 0 */
	uint32_t match_count; /* to so many matches; 0: all */
	uint64_t qualification_mask, qualification_value;
	const uint8_t *actions;
	size_t action_bytes;
	uint32_t matches;
};

/* What a script has said so far about exits. */
struct exit_policy {
	uint8_t defaults[EXIT_REASONS]; /* enum action by basic exit reason */
	struct reaction reactions[MAX_REACTIONS];
	unsigned int reaction_count;
	uint32_t watched[MAX_WATCHED_FIELDS];
	unsigned int watched_count;
	bool reports_vmcs; /* of an entry that fails */
};

/* Clears the policy and what the records said of L2's registers: before each case. The registers stay. */
void exits_reset(struct exit_policy *policy);

/*
 * Enters L2 and goes on until a reaction stops it, an entry fails, or max_exits have been reported.
 * Returns why it ended: "stop", "limit", "vmfail" (with the outcome in *failure) or "script" (an action that
 * could not be read).
 */
const char *exits_run(struct exit_policy *policy, bool resume, uint32_t max_exits, vmx_outcome *failure);

/* Reports and counts an exit that another part of the monitor has seen. `entered_by` as the record has it; or NULL. */
void exits_report(const struct exit_policy *policy, uint32_t reason, const char *entered_by);

/* As the action "skip": RIP past the instruction that exited, in the current VMCS. */
void exits_skip_instruction(void);

/* How many exits the case has had. */
uint32_t exits_count(void);

#endif
