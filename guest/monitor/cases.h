/* The cases that came with the image. */
#ifndef MONITOR_CASES_H
#define MONITOR_CASES_H

#include <stdint.h>

uint32_t cases_available(void);

/* Runs `count` cases from number `first` on, then reports how many ran. */
void cases_run(uint32_t first, uint32_t count);

#endif
