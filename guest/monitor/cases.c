#include "monitor/cases.h"

#include "monitor/payload.h"
#include "monitor/records.h"
#include "monitor/script.h"

uint32_t cases_available(void)
{
	return payload_cases();
}

/* Each script may be a difference to the one before, so those in front are decoded too. */
void cases_run(uint32_t first, uint32_t count)
{
	struct script script;
	uint32_t ran = 0;
	payload_rewind();
	for (uint32_t i = 0; i < first + count && payload_next(&script); i++) {
		if (i < first)
			continue;
		script_run(&script);
		ran++;
	}
	record_begin("done");
	record_number("cases", ran);
	record_end();
}
