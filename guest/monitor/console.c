#include "monitor/console.h"

#include <stdbool.h>

#include "cpu/traps.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/commands.h"
#include "monitor/payload.h"
#include "monitor/records.h"
#include "monitor/script.h"
#include "protocol.h"

enum {
	LINE_BYTES = 256,
	MAX_WORDS = 8,
	KEY_BACKSPACE = 0x08,
	KEY_DELETE = 0x7f,
	KEY_KILL_LINE = 0x15, /* Ctrl-U */
};

/* Reads a line with echo. True: a line; false: a frame was announced (CONSOLE_FRAME as a line's first byte). */
static bool read_line(char *line)
{
	size_t length = 0;
	bool too_long = false;
	for (;;) {
		char c = (char)serial_read();
		if (c == CONSOLE_FRAME && length == 0)
			return false;
		if (c == '\r' || c == '\n') {
			print("\n");
			if (too_long)
				print("that line is too long: nothing was done\n");
			line[too_long ? 0 : length] = 0;
			return true;
		}
		if ((c == KEY_BACKSPACE || c == KEY_DELETE) && length) {
			length--;
			print("\b \b");
		} else if (c == KEY_KILL_LINE) {
			for (; length; length--)
				print("\b \b");
			too_long = false;
		} else if (c >= ' ' && c <= '~') {
			too_long = too_long || length == LINE_BYTES - 1;
			if (too_long)
				continue;
			line[length++] = c;
			serial_write(&c, 1);
		}
	}
}

/* Splits at spaces, in place. One word more than can be told apart counts as MAX_WORDS + 1. */
static unsigned int split(char *line, char *words[MAX_WORDS])
{
	unsigned int count = 0;
	while (*line) {
		while (*line == ' ')
			*line++ = 0;
		if (!*line)
			break;
		if (count == MAX_WORDS)
			return MAX_WORDS + 1;
		words[count++] = line;
		while (*line && *line != ' ')
			line++;
	}
	return count;
}

static void serve_line(char *line)
{
	char *words[MAX_WORDS];
	unsigned int count = split(line, words);
	if (count > MAX_WORDS)
		print("too many words: nothing was done\n");
	else if (count)
		command_run(count, words);
}

static void serve_frame(void)
{
	struct script script;
	print("\n"); /* the first record starts a line of its own */
	if (frame_receive(&script))
		script_run(&script);
}

void console_run(void)
{
	struct recovery recovery;
	char line[LINE_BYTES];
	recovery_set(&recovery); /* after a fault in a command: on to the next prompt */
	trap_recovery = &recovery;
	for (;;) {
		print(CONSOLE_PROMPT);
		if (read_line(line))
			serve_line(line);
		else
			serve_frame();
	}
}
