#include "console/history.h"

#include <stddef.h>

#include "console/line_editor.h"
#include "lib/memory.h"

enum { HISTORY_LINES = 64 };

static char lines[HISTORY_LINES][LINE_BYTES];
static unsigned int added; /* in all; line n lies at n modulo HISTORY_LINES */

const char *history_line(unsigned int back)
{
	if (back == 0 || back > added || back > HISTORY_LINES)
		return NULL;
	return lines[(added - back) % HISTORY_LINES];
}

void history_add(const char *line)
{
	const char *last = history_line(1);
	if (!*line || (last && strcmp(last, line) == 0))
		return;
	memcpy(lines[added % HISTORY_LINES], line, strlen(line) + 1);
	added++;
}
