/*
 * A sweep: the same question for each value of a register of L2. One VM entry and one exit a value; what is
 * seen of the exits goes into a CRC-32, and a record comes for each block of values, not for each exit.
 */
#ifndef MONITOR_SWEEP_H
#define MONITOR_SWEEP_H

#include <stdbool.h>

#include "monitor/exits.h"
#include "monitor/reader.h"

/* Forgets the sweeps of the case before. */
void sweep_reset(void);

/*
 * Reads the operands of OP_SWEEP, and asks. Returns why it ended: "done"; "stop", at an exit that the script
 * does not go on behind (it has been reported in full); "vmfail" (with the outcome in *failure) or "script".
 */
const char *sweep_run(struct reader *script, const struct exit_policy *policy, vmx_outcome *failure);

#endif
