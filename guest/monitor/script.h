/*
 * A script is a case as the monitor sees it: fill these pages, execute these VMX instructions, enter, react
 * to exits so. It holds no expectation. vmxlab.image.script writes it; protocol.h has the numbers.
 */
#ifndef MONITOR_SCRIPT_H
#define MONITOR_SCRIPT_H

#include "monitor/payload.h"

/*
 * Runs a script to its end and reports. Whatever happens in it, the processor's state is the monitor's own when
 * this returns, and VMX operation has been left; but not by a live one (OP_LIVE), behind which it stays.
 */
void script_run(const struct script *script);

#endif
