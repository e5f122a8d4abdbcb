#include "monitor/vmcs_report.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "monitor/records.h"
#include "vmx/instructions.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum { FIELDS_IN_A_RECORD = 24, REGION_BYTES = 4096, REVISION_MASK = 0x7fffffff };

static const uint16_t fields[] = {VMCS_WRITABLE_FIELDS};
static bool present[sizeof(fields) / sizeof(fields[0])];

/*
 * Asks which fields the processor has: to VMREAD them is the only way. What it lacks fails and sets the
 * VM-instruction error, which a case may want to read in its own VMCS, so another one is asked; once, as the
 * answer is the processor's. False where that can't be done.
 */
static bool know_fields(void)
{
	static _Alignas(REGION_BYTES) uint32_t region[REGION_BYTES / sizeof(uint32_t)];
	static bool known;
	uint64_t basic, current, other = (uintptr_t)region, value;
	if (known)
		return true;
	if (!vmx_capability(MSR_IA32_VMX_BASIC, &basic) || vmx_vmptrst(&current) != VMX_SUCCEED)
		return false;
	region[0] = (uint32_t)basic & REVISION_MASK;
	if (vmx_vmclear(&other) != VMX_SUCCEED || vmx_vmptrld(&other) != VMX_SUCCEED)
		return false;
	for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
		present[i] = vmx_vmread(fields[i], &value) == VMX_SUCCEED;
	known = vmx_vmptrld(&current) == VMX_SUCCEED && vmx_vmclear(&other) == VMX_SUCCEED;
	return known;
}

void report_vmcs(void)
{
	unsigned int reported = 0;
	if (!know_fields())
		return;
	for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
		uint64_t value;
		if (!present[i] || vmx_vmread(fields[i], &value) != VMX_SUCCEED)
			continue;
		if (reported % FIELDS_IN_A_RECORD == 0) {
			if (reported)
				record_end();
			record_begin("vmcs");
		}
		record_field(fields[i], value);
		reported++;
	}
	if (reported)
		record_end();
}
