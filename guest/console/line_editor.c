#include "console/line_editor.h"

#include <stdbool.h>
#include <stdint.h>

#include "console/history.h"
#include "console/names.h"
#include "console/text.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/records.h"
#include "protocol.h"

enum {
	CTRL_A = 0x01,
	CTRL_B = 0x02,
	CTRL_C = 0x03,
	CTRL_D = 0x04,
	CTRL_E = 0x05,
	CTRL_F = 0x06,
	CTRL_H = 0x08,
	TAB = 0x09,
	LF = 0x0a,
	CTRL_K = 0x0b,
	CTRL_L = 0x0c,
	CR = 0x0d,
	CTRL_N = 0x0e,
	CTRL_P = 0x10,
	CTRL_U = 0x15,
	CTRL_W = 0x17,
	ESCAPE = 0x1b,
	DELETE = 0x7f,
	FIRST_NOT_ASCII = 0x80,

	SCREEN_COLUMNS = 80,
	/* The last column stays free: what stands there makes some terminals begin a new line. */
	WINDOW = SCREEN_COLUMNS - (sizeof(CONSOLE_PROMPT) - 1) - 1,
	FOREIGN = '\x7f', /* in the line, for a character that is not ASCII; shown as '?' */
};

/* Of an escape sequence (ECMA-48): nothing, ESC, ESC [ or ESC O. */
enum escape_state { NO_ESCAPE, AFTER_ESCAPE, IN_CONTROL_SEQUENCE, IN_SINGLE_SHIFT };

static struct {
	char *text;
	size_t length, cursor;
	size_t window; /* the first character that is shown */
	bool too_long;
	unsigned int browsed; /* how many lines back in the history; 0: a new line */
	char draft[LINE_BYTES];
	enum escape_state escape;
	unsigned int parameter;
} editor;

static bool last_was_cr; /* the LF behind it ends no second line */

/* --- what is shown ----------------------------------------------------------------------------------------- */

static void put(const char *text, size_t bytes)
{
	serial_write(text, bytes);
}

static void put_shown(size_t from, size_t to)
{
	for (size_t i = from; i < to; i++)
		put(editor.text[i] == FOREIGN ? "?" : &editor.text[i], 1);
}

/* Begins with CR, not with a new line: to the harness a prompt at a line's start is the end of an answer. */
static void redraw(void)
{
	size_t end = editor.window + WINDOW < editor.length ? editor.window + WINDOW : editor.length;
	size_t column = sizeof(CONSOLE_PROMPT) - 1 + editor.cursor - editor.window;
	put("\r" CONSOLE_PROMPT, sizeof(CONSOLE_PROMPT));
	put_shown(editor.window, end);
	put("\x1b[K", 3);
	if (editor.cursor != end)
		say("\r\x1b[%luC", column);
}

/* Half a window at a time, so that a long line that is pasted is not shown again with each character. */
static void scroll(void)
{
	if (editor.cursor < editor.window)
		editor.window = editor.cursor > WINDOW / 2 ? editor.cursor - WINDOW / 2 : 0;
	else if (editor.cursor > editor.window + WINDOW)
		editor.window = editor.cursor - WINDOW / 2;
}

static void show_change(void)
{
	scroll();
	redraw();
}

static void move(size_t cursor)
{
	if (cursor == editor.cursor)
		return;
	editor.cursor = cursor;
	show_change();
}

/* --- editing ----------------------------------------------------------------------------------------------- */

static void insert(char c)
{
	size_t window = editor.window;
	if (editor.length == LINE_BYTES - 1) {
		editor.too_long = true;
		return;
	}
	memmove(editor.text + editor.cursor + 1, editor.text + editor.cursor, editor.length - editor.cursor);
	editor.text[editor.cursor++] = c;
	editor.length++;
	scroll();
	if (editor.cursor == editor.length && editor.window == window)
		put_shown(editor.cursor - 1, editor.cursor);
	else
		redraw();
}

/* Takes [from, to) away; the cursor stands at one of its ends. */
static void erase(size_t from, size_t to)
{
	size_t window = editor.window;
	bool last = editor.cursor == editor.length && to - from == 1;
	if (from == to)
		return;
	memmove(editor.text + from, editor.text + to, editor.length - to);
	editor.length -= to - from;
	editor.cursor = from;
	scroll();
	if (last && editor.window == window)
		put("\b \b", 3);
	else
		redraw();
}

static void clear_line(void)
{
	editor.too_long = false;
	if (editor.length == 0)
		return;
	editor.length = editor.cursor = editor.window = 0;
	redraw();
}

static size_t word_before(void)
{
	size_t at = editor.cursor;
	while (at && editor.text[at - 1] == ' ')
		at--;
	while (at && editor.text[at - 1] != ' ')
		at--;
	return at;
}

static size_t word_after(void)
{
	size_t at = editor.cursor;
	while (at < editor.length && editor.text[at] == ' ')
		at++;
	while (at < editor.length && editor.text[at] != ' ')
		at++;
	return at;
}

/* --- history ----------------------------------------------------------------------------------------------- */

/* `steps` lines further back, or forth; the line that was being typed waits at the end. */
static void browse(int steps)
{
	unsigned int wanted = editor.browsed + (unsigned int)steps;
	const char *line = wanted ? history_line(wanted) : editor.draft;
	if ((steps < 0 && editor.browsed == 0) || !line)
		return;
	if (editor.browsed == 0) {
		memcpy(editor.draft, editor.text, editor.length);
		editor.draft[editor.length] = 0;
	}
	editor.browsed = wanted;
	editor.length = editor.cursor = strlen(line);
	editor.window = 0;
	memcpy(editor.text, line, editor.length);
	show_change();
}

/* --- completion -------------------------------------------------------------------------------------------- */

static size_t common_length(const struct completions *found)
{
	size_t length = strlen(found->names[0]);
	for (size_t i = 1; i < found->count; i++)
		while (!name_begins(found->names[i], found->names[0], length))
			length--;
	return length;
}

static void list(const struct completions *found)
{
	unsigned int width = 0, column = 0;
	for (size_t i = 0; i < found->count; i++)
		if (strlen(found->names[i]) + 2 > width)
			width = (unsigned int)strlen(found->names[i]) + 2;
	for (size_t i = 0; i < found->count; i++) {
		if (column == 0)
			say("\n");
		say("  %s", found->names[i]);
		column += width + 2;
		if (column + width + 2 > SCREEN_COLUMNS || i + 1 == found->count)
			column = 0;
		else
			for (size_t pad = strlen(found->names[i]); pad < width; pad++)
				say(" ");
	}
	say("\n");
	redraw();
}

/* The word becomes what all candidates have in common; where that is nothing new they are listed. */
static void complete_word(complete_function *complete)
{
	static struct completions found;
	size_t typed, common;
	found.count = 0;
	complete(editor.text, editor.cursor, &found);
	if (!found.count)
		return;
	typed = editor.cursor - found.start;
	common = common_length(&found);
	if (found.count > 1 && common <= typed) {
		list(&found);
		return;
	}
	if (editor.length - typed + common + 1 >= LINE_BYTES)
		return;
	erase(found.start, editor.cursor);
	for (size_t i = 0; i < common; i++)
		insert(found.names[0][i]);
	if (found.count == 1 && editor.cursor == editor.length)
		insert(' ');
}

/* --- keys -------------------------------------------------------------------------------------------------- */

static void delete_at_cursor(void)
{
	if (editor.cursor == editor.length)
		return;
	editor.cursor++;
	erase(editor.cursor - 1, editor.cursor);
}

/* The end of ESC [ ... or of ESC O: arrows, Home, End, Delete. */
static void control_sequence(uint8_t final)
{
	enum { HOME = 1, DELETE_KEY = 3, END = 4, HOME_OF_RXVT = 7, END_OF_RXVT = 8 };
	switch (final) {
	case 'A':
		browse(1);
		break;
	case 'B':
		browse(-1);
		break;
	case 'C':
		move(editor.cursor < editor.length ? editor.cursor + 1 : editor.cursor);
		break;
	case 'D':
		move(editor.cursor ? editor.cursor - 1 : 0);
		break;
	case 'H':
		move(0);
		break;
	case 'F':
		move(editor.length);
		break;
	case '~':
		if (editor.parameter == HOME || editor.parameter == HOME_OF_RXVT)
			move(0);
		else if (editor.parameter == END || editor.parameter == END_OF_RXVT)
			move(editor.length);
		else if (editor.parameter == DELETE_KEY)
			delete_at_cursor();
		break;
	}
}

static void alt_key(uint8_t key)
{
	switch (key) {
	case 'b':
		move(word_before());
		break;
	case 'f':
		move(word_after());
		break;
	case 'd': {
		size_t from = editor.cursor;
		editor.cursor = word_after();
		erase(from, editor.cursor);
		break;
	}
	}
}

/* Whether the byte belongs to an escape sequence. A control character never does: it ends a cut one. */
static bool escape_takes(uint8_t byte)
{
	enum escape_state state = editor.escape;
	editor.escape = NO_ESCAPE;
	if (byte < ' ' || byte >= DELETE || state == NO_ESCAPE)
		return false;
	switch (state) {
	case AFTER_ESCAPE:
		editor.parameter = 0;
		if (byte == '[')
			editor.escape = IN_CONTROL_SEQUENCE;
		else if (byte == 'O')
			editor.escape = IN_SINGLE_SHIFT;
		else
			alt_key(byte);
		return true;
	case IN_CONTROL_SEQUENCE:
		if (byte >= '@') {
			control_sequence(byte);
			return true;
		}
		if (byte >= '0' && byte <= '9')
			editor.parameter = (editor.parameter * 10 + (byte - '0')) & 0xffff;
		editor.escape = IN_CONTROL_SEQUENCE;
		return true;
	default:
		control_sequence(byte);
		return true;
	}
}

static void control_key(uint8_t key, complete_function *complete)
{
	switch (key) {
	case CTRL_A:
		move(0);
		break;
	case CTRL_E:
		move(editor.length);
		break;
	case CTRL_B:
		move(editor.cursor ? editor.cursor - 1 : 0);
		break;
	case CTRL_F:
		move(editor.cursor < editor.length ? editor.cursor + 1 : editor.cursor);
		break;
	case CTRL_H:
	case DELETE:
		erase(editor.cursor ? editor.cursor - 1 : 0, editor.cursor);
		break;
	case CTRL_D:
		delete_at_cursor();
		break;
	case CTRL_K:
		if (editor.cursor < editor.length) {
			editor.length = editor.cursor;
			redraw();
		}
		break;
	case CTRL_U:
		clear_line();
		break;
	case CTRL_W:
		erase(word_before(), editor.cursor);
		break;
	case CTRL_L:
		put("\x1b[H\x1b[2J", 7);
		redraw();
		break;
	case CTRL_P:
		browse(1);
		break;
	case CTRL_N:
		browse(-1);
		break;
	case TAB:
		complete_word(complete);
		break;
	case ESCAPE:
		editor.escape = AFTER_ESCAPE;
		break;
	}
}

/* --- lines ------------------------------------------------------------------------------------------------- */

static bool is_ascii(void)
{
	for (size_t i = 0; i < editor.length; i++)
		if (editor.text[i] == FOREIGN)
			return false;
	return true;
}

/* The log has the line whole, also where the screen showed a part of it. */
static enum line_event end_line(void)
{
	if (editor.length > WINDOW) {
		put("\r" CONSOLE_PROMPT, sizeof(CONSOLE_PROMPT));
		put_shown(0, editor.length);
	}
	print("\n");
	editor.text[editor.length] = 0;
	if (editor.too_long)
		return LINE_TOO_LONG;
	if (!is_ascii())
		return LINE_NOT_ASCII;
	history_add(editor.text);
	return LINE_READY;
}

static void begin_line(char *line)
{
	editor.text = line;
	editor.length = editor.cursor = editor.window = 0;
	editor.too_long = false;
	editor.browsed = 0;
	editor.escape = NO_ESCAPE;
	print(CONSOLE_PROMPT);
}

static enum line_event read_keys(complete_function *complete)
{
	for (;;) {
		uint8_t byte = serial_read();
		bool after_cr = last_was_cr;
		last_was_cr = byte == CR;
		if (byte == LF && after_cr)
			continue;
		if (byte == CONSOLE_FRAME && editor.length == 0)
			return LINE_FRAME;
		if (escape_takes(byte))
			continue;
		if (byte == CR || byte == LF)
			return end_line();
		if (byte == CTRL_C) {
			print("^C\n");
			return LINE_ABANDONED;
		}
		if (byte >= FIRST_NOT_ASCII)
			insert(FOREIGN);
		else if (byte >= ' ' && byte != DELETE)
			insert((char)byte);
		else
			control_key(byte, complete);
	}
}

enum line_event line_read(char line[LINE_BYTES], complete_function *complete)
{
	enum line_event event;
	begin_line(line);
	event = read_keys(complete);
	if (event != LINE_READY)
		line[0] = 0;
	return event;
}
