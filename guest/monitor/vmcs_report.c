#include "monitor/vmcs_report.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "monitor/records.h"
#include "vmx/entry.h"
#include "vmx/instructions.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum { FIELDS_IN_A_RECORD = 24, REGION_BYTES = 4096, REVISION_MASK = 0x7fffffff };

static const uint16_t fields[] = {VMCS_WRITABLE_FIELDS, VMCS_EXIT_INFORMATION_FIELDS};
static const uint16_t writable_fields[] = {VMCS_WRITABLE_FIELDS};
enum {
	FIELDS = sizeof(fields) / sizeof(fields[0]),
	WRITABLE_FIELDS = sizeof(writable_fields) / sizeof(writable_fields[0]),
};
static bool present[FIELDS];

/* What the last snapshot said. */
static uint64_t last_fields[FIELDS], last_registers[GENERAL_REGISTERS];

/* So many fields of the record at hand. */
static unsigned int reported;

static bool has_current_vmcs(uint64_t current)
{
	return current != ~0ull; /* SDM Vol. 3C, 31.3, VMPTRST */
}

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
	for (size_t i = 0; i < FIELDS; i++)
		present[i] = vmx_vmread(fields[i], &value) == VMX_SUCCEED;
	known = vmx_vmptrld(&current) == VMX_SUCCEED && vmx_vmclear(&other) == VMX_SUCCEED;
	return known;
}

static void report_field(const char *kind, uint32_t field, uint64_t value)
{
	if (reported % FIELDS_IN_A_RECORD == 0) {
		if (reported)
			record_end();
		record_begin(kind);
	}
	record_field(field, value);
	reported++;
}

static void end_report(void)
{
	if (reported)
		record_end();
	reported = 0;
}

void report_vmcs(void)
{
	if (!know_fields())
		return;
	for (size_t i = 0; i < WRITABLE_FIELDS; i++) {
		uint64_t value;
		if (present[i] && vmx_vmread(fields[i], &value) == VMX_SUCCEED)
			report_field("vmcs", fields[i], value);
	}
	end_report();
}

static void snapshot_fields(bool all)
{
	for (size_t i = 0; i < FIELDS; i++) {
		uint64_t value;
		if (!present[i] || vmx_vmread(fields[i], &value) != VMX_SUCCEED)
			continue;
		if (all || value != last_fields[i])
			report_field("snapshot", fields[i], value);
		last_fields[i] = value;
	}
	end_report();
}

static void snapshot_registers(bool all)
{
	record_begin("snapshot");
	for (unsigned int i = 0; i < GENERAL_REGISTERS; i++) {
		if (i == REGISTER_RSP)
			continue;
		if (all || l2_registers[i] != last_registers[i])
			record_number(record_register_keys[i], l2_registers[i]);
		last_registers[i] = l2_registers[i];
	}
	record_end();
}

vmx_outcome report_snapshot(bool all)
{
	uint64_t current = 0;
	vmx_outcome outcome = vmx_vmptrst(&current);
	if (outcome != VMX_SUCCEED)
		return outcome;
	if (!has_current_vmcs(current) || !know_fields())
		return VMX_FAIL_INVALID;
	snapshot_fields(all);
	snapshot_registers(all);
	return VMX_SUCCEED;
}
