#include "boot/warm_start.h"

#include <stdint.h>

#include "lib/memory.h"

extern const uint8_t start32_warm[];

/* Read by boot/start.S. */
const struct recovery *warm_start_recovery;

static volatile uint32_t *words(void)
{
	return at_physical(WARM_START);
}

void warm_start_arm(const struct recovery *recovery)
{
	warm_start_recovery = recovery;
	words()[1] = (uint32_t)(uintptr_t)start32_warm;
	words()[0] = WARM_START_MAGIC;
}

void warm_start_disarm(void)
{
	words()[0] = 0;
}
