/* The cases that came with the image. */
#include <stdint.h>

#include "console/command.h"
#include "console/operands.h"
#include "console/state_view.h"
#include "console/text.h"
#include "lib/memory.h"
#include "monitor/cases.h"
#include "monitor/payload.h"
#include "monitor/script.h"

/* How many there are; 0 is said. */
static uint32_t cases_here(void)
{
	uint32_t cases = cases_available();
	if (!cases)
		say("this image holds no cases\n");
	return cases;
}

/* A number, or a name or a part of one; the first that fits is it. */
static bool is_wanted(const char *word, uint32_t number, const char *name)
{
	uint64_t value;
	if (word[0] >= '0' && word[0] <= '9')
		return number_operand(word, &value) && value == number;
	return name_contains(name, word, strlen(word));
}

static bool run_cases(unsigned int count, char *words[])
{
	struct script script;
	(void)count;
	(void)words;
	if (!cases_here())
		return true;
	for (uint32_t number = 0; payload_next(&script); number++) {
		char name[NAME_BYTES + 1];
		script_name(&script, name);
		say("  %3u  %s\n", number, *name ? name : "-");
	}
	return true;
}

/* Each script may be a difference to the one before: those in front are decoded too. */
static bool run_load(unsigned int count, char *words[])
{
	const char *wanted = count ? words[1] : "0";
	struct script script;
	if (!cases_here())
		return true;
	for (uint32_t number = 0; payload_next(&script); number++) {
		char name[NAME_BYTES + 1];
		script_name(&script, name);
		if (!is_wanted(wanted, number, name))
			continue;
		say("case %u%s%s %s\n", number, *name ? ", " : "", name,
		    script_set_up(&script) ? "is set up; 'launch' enters it"
					   : "failed on the way to its entry");
		state_say();
		return true;
	}
	say("there is no case '%s'; 'cases' lists them\n", wanted);
	return true;
}

static bool run_run(unsigned int count, char *words[])
{
	uint32_t cases = cases_here();
	uint64_t number = 0;
	if (!cases)
		return true;
	if (count && !limited_operand(words[1], "a case", cases - 1, &number))
		return false;
	cases_run((uint32_t)number, count ? 1 : cases);
	return true;
}

const struct command case_commands[] = {
	{"cases", "", "the image's cases", 0, 0, false, run_cases, NULL, NULL},
	{"load", "[N|NAME]", "set a case up, as far as its entry", 0, 1, true, run_load, NULL,
	 "Its memory, VMXON, VMCLEAR, VMPTRLD, all VMWRITEs and L2's registers. What was set up before is\n"
	 "undone. At the prompt each exit comes back to you: the case's reactions don't answer it.\n"},
	{"run", "[N]", "run the image's cases, or one of them", 0, 1, false, run_run, NULL, NULL},
	{0},
};
