#include "monitor/capability_report.h"

#include <stdint.h>

#include "lib/format.h"
#include "monitor/records.h"
#include "vmx/operation.h"

void report_capabilities(void)
{
	record_begin("caps");
	for (const uint32_t *msr = vmx_capability_msrs; *msr; msr++) {
		char key[5] = "m";
		uint64_t value;
		if (!vmx_capability(*msr, &value))
			continue;
		format_digits(key + 1, *msr, 3);
		record_number(key, value);
	}
	record_end();
}
