/*
 * Reads a line from a person: editing, history, completion. Every byte is taken as it comes, and none makes it
 * wait for another: an escape sequence that is cut, or that is unknown, changes nothing.
 */
#ifndef CONSOLE_LINE_EDITOR_H
#define CONSOLE_LINE_EDITOR_H

#include <stddef.h>

enum { LINE_BYTES = 1024 /* with the 0 at the end */ };

enum line_event {
	LINE_READY,
	LINE_ABANDONED, /* Ctrl-C */
	LINE_TOO_LONG,
	LINE_NOT_ASCII,
	LINE_FRAME, /* CONSOLE_FRAME came as the first byte: what follows is no line */
};

/* What may stand in place of the word that begins at `start`; the names outlive the call. */
struct completions {
	size_t start;
	size_t count;
	const char *names[256];
};

/* Fills in the completions of what stands before the cursor. */
typedef void complete_function(const char *text, size_t length, struct completions *completions);

/* Shows the prompt and reads. The line is whole in case of LINE_READY, and empty in all others. */
enum line_event line_read(char line[LINE_BYTES], complete_function *complete);

#endif
