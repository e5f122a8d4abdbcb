/*
 * A script is a case as the monitor sees it: fill these pages, execute these VMX instructions, enter, react
 * to exits so. It holds no expectation. vmxlab.image.script writes it; protocol.h has the numbers.
 */
#ifndef MONITOR_SCRIPT_H
#define MONITOR_SCRIPT_H

#include "monitor/payload.h"

enum { NAME_BYTES = 64 /* of a case */ };

/*
 * Runs a script to its end and reports. Whatever happens in it, the processor's state is the monitor's own when
 * this returns, and VMX operation has been left; but not by a live one (OP_LIVE), behind which it stays.
 */
void script_run(const struct script *script);

/*
 * The same up to the first entry, which is not made: what has been set up stays, for the prompt to go on with.
 * What was set up before is undone first. False where it failed on the way, which the records say.
 */
bool script_set_up(const struct script *script);

/* The name of the case; "" where it has none. */
void script_name(const struct script *script, char name[NAME_BYTES + 1]);

#endif
