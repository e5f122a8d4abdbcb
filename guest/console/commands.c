#include "console/commands.h"

#include <stdint.h>

#include "console/command.h"
#include "console/text.h"
#include "lib/memory.h"
#include "vmx/operation.h"

/* Words are separated by spaces, so no line has more. */
enum { MAX_WORDS = LINE_BYTES / 2 };

static bool run_help(unsigned int count, char *words[]);

static const struct command help_commands[] = {
	{.name = "help",
	 .operands = "[COMMAND]",
	 .summary = "this list, or one command's usage",
	 .maximum = 1,
	 .run = run_help,
	 .details =
		 "Tab completes commands and names; arrows and Ctrl-P, Ctrl-N go through the history;\n"
		 "Ctrl-C abandons a line. Numbers: 96, 0x60, -1. Names: in whatever case, and any part of\n"
		 "one that no other name has.\n"},
	{0},
};

static const struct command_group groups[] = {
	{"help", help_commands},
	{"VMX", vmx_commands},
	{"VM entries and exits", run_commands},
	{"memory", memory_commands},
	{"bitmaps", bitmap_commands},
	{"EPT", ept_commands},
	{"cases", case_commands},
	{"the machine", machine_commands},
	{0},
};

/* Whatever begins so; a command's whole name goes before longer ones. */
static const struct command *find(const char *name)
{
	for (const struct command_group *group = groups; group->title; group++)
		for (const struct command *command = group->commands; command->name; command++)
			if (strcmp(name, command->name) == 0)
				return command;
	return NULL;
}

static void say_usage(const struct command *command, unsigned int width)
{
	unsigned int length = (unsigned int)(strlen(command->name) + strlen(command->operands) + 1);
	say("%s%s%s", command->name, *command->operands ? " " : "", command->operands);
	for (length -= !*command->operands; length < width; length++)
		say(" ");
	say("  %s\n", command->summary);
}

static void say_unknown(const char *name)
{
	say("there is no command '%s'; 'help' lists them\n", name);
}

static bool help_for(const char *name)
{
	const struct command *command = find(name);
	if (!command) {
		say_unknown(name);
		return true;
	}
	say_usage(command, 0);
	if (command->details)
		say("%s", command->details);
	return true;
}

static bool run_help(unsigned int count, char *words[])
{
	enum { USAGE_WIDTH = 33 };
	if (count)
		return help_for(words[1]);
	for (const struct command_group *group = groups; group->title; group++) {
		if (group != groups)
			say("%s\n", group->title);
		for (const struct command *command = group->commands; command->name; command++) {
			say("  ");
			say_usage(command, USAGE_WIDTH);
		}
	}
	return true;
}

static void run_command(unsigned int count, char *words[])
{
	const struct command *command = find(words[0]);
	if (!command) {
		say_unknown(words[0]);
		return;
	}
	if (command->needs_vmx && !vmx_present()) {
		say("this processor has no VMX (CPUID.1:ECX.VMX[5] is 0)\n");
		return;
	}
	if (count < command->minimum || count > command->maximum || !command->run(count, words)) {
		say("usage: ");
		say_usage(command, 0);
	}
}

/* Splits at spaces, in place. */
static unsigned int split(char *line, char *words[MAX_WORDS])
{
	unsigned int count = 0;
	while (*line) {
		while (*line == ' ')
			*line++ = 0;
		if (!*line)
			break;
		words[count++] = line;
		while (*line && *line != ' ')
			line++;
	}
	return count;
}

void command_line(char *line)
{
	static char *words[MAX_WORDS];
	unsigned int count = split(line, words);
	if (count)
		run_command(count - 1, words);
}

static void offer(struct completions *found, const char *name, const char *word, size_t length, bool whole)
{
	enum { MOST = sizeof(found->names) / sizeof(found->names[0]) };
	if (found->count < MOST && (whole ? name_begins : name_contains)(name, word, length))
		found->names[found->count++] = name;
}

static void offer_commands(struct completions *found, const char *word, size_t length)
{
	for (const struct command_group *group = groups; group->title; group++)
		for (const struct command *command = group->commands; command->name; command++)
			offer(found, command->name, word, length, true);
}

static const struct command *command_of(const char *text, size_t length)
{
	char name[LINE_BYTES];
	size_t end = 0;
	while (end < length && text[end] != ' ')
		end++;
	memcpy(name, text, end);
	name[end] = 0;
	return find(name);
}

void command_complete(const char *text, size_t length, struct completions *found)
{
	const struct command *command;
	size_t begin = 0;
	while (begin < length && text[begin] == ' ')
		begin++;
	text += begin;
	length -= begin;
	found->start = length;
	while (found->start && text[found->start - 1] != ' ')
		found->start--;
	if (found->start == 0) {
		offer_commands(found, text, length);
		found->start = begin;
		return;
	}
	command = command_of(text, length);
	length -= found->start;
	text += found->start;
	found->start += begin;
	if (!command)
		return;
	if (command->run == run_help) {
		offer_commands(found, text, length);
		return;
	}
	/* A name's beginning; where none begins so, a part of it. */
	for (int whole = 1; command->completes && whole >= 0 && !found->count; whole--)
		for (size_t i = 0; i < command->completes->count; i++)
			offer(found, command->completes->list[i].text, text, length, whole);
}
