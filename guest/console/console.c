#include "console/console.h"

#include "console/commands.h"
#include "console/fault_view.h"
#include "console/line_editor.h"
#include "console/text.h"
#include "cpu/traps.h"
#include "monitor/payload.h"
#include "monitor/script.h"

static void serve_frame(void)
{
	struct script script;
	say("\n"); /* the first record starts a line of its own */
	if (frame_receive(&script))
		script_run(&script);
}

static void serve(enum line_event event, char *line)
{
	switch (event) {
	case LINE_READY:
		command_line(line);
		break;
	case LINE_ABANDONED:
		break;
	case LINE_TOO_LONG:
		say("that line is longer than %u characters: nothing was done\n", LINE_BYTES - 1);
		break;
	case LINE_NOT_ASCII:
		say("what is shown as '?' is not ASCII: nothing was done\n");
		break;
	case LINE_FRAME:
		serve_frame();
		break;
	}
}

void console_run(void)
{
	static struct recovery recovery;
	static char line[LINE_BYTES];
	/* After a fault in a command: on to the next prompt. */
	if (recovery_set(&recovery))
		fault_show();
	trap_recovery = &recovery;
	for (;;)
		serve(line_read(line, command_complete), line);
}
