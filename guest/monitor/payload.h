/*
 * Where scripts come from: a payload that was loaded with the monitor, or frames over the serial line.
 * Both hold frames of one format (vmxlab.image.frames): a header, then copies from the script before and
 * literal bytes, so that a case costs only what distinguishes it from the one before.
 */
#ifndef MONITOR_PAYLOAD_H
#define MONITOR_PAYLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct script {
	const uint8_t *bytes;
	size_t length;
};

/* Whether the cases are for the prompt, and don't run by themselves. */
bool payload_waits(void);

/* How many cases the loaded payload holds; 0 where there is none. A broken one is reported. */
uint32_t payload_cases(void);

/* The scripts of the payload, one after the other; false at the end or where the payload is broken (reported). */
bool payload_next(struct script *script);
void payload_rewind(void);

/* Reads one frame from the serial line; false, and reported, where it is broken or stops arriving. */
bool frame_receive(struct script *script);

#endif
