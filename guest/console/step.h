/* One instruction of L2: what an entry for that needs in the VMCS, and putting it back. */
#ifndef CONSOLE_STEP_H
#define CONSOLE_STEP_H

#include <stdbool.h>

enum step_way {
	STEP_BY_ANY,
	STEP_BY_MTF, /* the monitor trap flag (SDM Vol. 3C, 26.5.2) */
	STEP_BY_TF,  /* RFLAGS.TF, and a #DB that exits */
};

/* Changes the current VMCS for one entry, and says how. False, and said, where that can't be. */
bool step_prepare(enum step_way way);

/* Which way it was. */
bool step_is_by_mtf(void);

/* After the entry, whatever came of it. */
void step_end(void);

#endif
