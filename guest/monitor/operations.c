#include "monitor/operations.h"

#include "cpu/apic.h"
#include "cpu/registers.h"
#include "lib/memory.h"
#include "lib/serial.h"
#include "monitor/exits.h"
#include "monitor/l1_state.h"
#include "monitor/records.h"
#include "monitor/vmcs_report.h"
#include "protocol.h"
#include "vmx/entry.h"
#include "vmx/operation.h"
#include "vmx_facts.h"

enum { FILL_CHUNK_BYTES = 8192 };

static void report_outcome(const char *operation, vmx_outcome outcome)
{
	if (outcome == VMX_SUCCEED) {
		record_success(operation);
		return;
	}
	record_begin("vmx");
	record_word("op", operation);
	record_outcome(outcome);
	record_end();
}

static void op_fill(struct reader *script)
{
	uint64_t address = take64(script);
	uint32_t bytes = take32(script);
	uint8_t value = take8(script);
	while (bytes && !script->overrun) {
		uint32_t chunk = bytes < FILL_CHUNK_BYTES ? bytes : FILL_CHUNK_BYTES;
		memset(at_physical(address), value, chunk);
		serial_poll(); /* the records of the case before leave meanwhile */
		address += chunk;
		bytes -= chunk;
	}
}

static void op_data(struct reader *script)
{
	uint64_t address = take64(script);
	uint32_t bytes = take32(script);
	const uint8_t *data = take(script, bytes);
	if (!script->overrun)
		memcpy(at_physical(address), data, bytes);
}

/* first, first + stride, ...: a page table in a few bytes. */
static void op_sequence(struct reader *script)
{
	uint64_t *entry = at_physical(take64(script));
	uint32_t count = take32(script);
	uint64_t value = take64(script), stride = take64(script);
	if (script->overrun)
		return;
	for (; count; count--, value += stride)
		*entry++ = value;
}

/* The revision identifier is the processor's: an image is not made for one processor (SDM Vol. 3C, 25.2). */
static void op_revision(struct reader *script)
{
	uint32_t *region = at_physical(take64(script));
	uint32_t flags = take32(script);
	uint64_t basic = 0;
	vmx_capability(MSR_IA32_VMX_BASIC, &basic);
	if (!script->overrun)
		*region = ((uint32_t)basic & 0x7fffffffu) | flags;
}

static void op_vmwrites(struct reader *script, vmx_outcome *last_failure)
{
	uint32_t total = take16(script), written = 0;
	vmx_outcome outcome;
	*last_failure = VMX_SUCCEED;
	for (uint32_t i = 0; i < total && !script->overrun; i++) {
		uint32_t field = take32(script);
		outcome = vmx_vmwrite(field, take64(script));
		if (outcome == VMX_SUCCEED) {
			written++;
			continue;
		}
		*last_failure = outcome;
		record_begin("vmx");
		record_word("op", "vmwrite");
		record_number("field", field);
		record_outcome(outcome);
		record_end();
	}
	if (written)
		record_successes("vmwrite", written);
}

static vmx_outcome op_vmread(struct reader *script)
{
	uint64_t value = 0;
	uint32_t field = take32(script);
	vmx_outcome outcome = vmx_vmread(field, &value);
	record_begin("vmx");
	record_word("op", "vmread");
	record_number("field", field);
	if (outcome == VMX_SUCCEED)
		record_number("value", value);
	record_outcome(outcome);
	record_end();
	return outcome;
}

static vmx_outcome op_vmptrst(void)
{
	uint64_t pointer = 0;
	vmx_outcome outcome = vmx_vmptrst(&pointer);
	record_begin("vmx");
	record_word("op", "vmptrst");
	if (outcome == VMX_SUCCEED)
		record_number("value", pointer);
	record_outcome(outcome);
	record_end();
	return outcome;
}

static vmx_outcome op_msr(struct reader *script, bool write)
{
	uint32_t msr = take32(script);
	uint64_t value = write ? take64(script) : 0;
	vmx_outcome outcome = write ? try_wrmsr(msr, value) : try_rdmsr(msr, &value);
	record_begin("vmx");
	record_word("op", write ? "wrmsr" : "rdmsr");
	record_number("msr", msr);
	if (!write && outcome == VMX_SUCCEED)
		record_number("value", value);
	record_outcome(outcome);
	record_end();
	return outcome;
}

static void op_cpuid(struct reader *script)
{
	uint32_t number = take32(script);
	struct cpuid leaf = cpuid_subleaf(number, take32(script));
	record_begin("vmx");
	record_word("op", "cpuid");
	record_number("eax", leaf.eax);
	record_number("ebx", leaf.ebx);
	record_number("ecx", leaf.ecx);
	record_number("edx", leaf.edx);
	record_outcome(VMX_SUCCEED);
	record_end();
}

static void op_apic_write(struct reader *script)
{
	uint32_t offset = take32(script), value = take32(script);
	if (script->overrun)
		return;
	record_success("apic-write"); /* an INIT may leave no later chance to say so */
	apic_write(offset, value);
}

static void op_apic_read(struct reader *script)
{
	uint32_t offset = take32(script);
	if (script->overrun)
		return;
	record_begin("vmx");
	record_word("op", "apic-read");
	record_number("register", offset);
	record_number("value", apic_read(offset));
	record_outcome(VMX_SUCCEED);
	record_end();
}

static vmx_outcome op_second_processor(struct reader *script)
{
	uint32_t program = take32(script);
	vmx_outcome outcome = VMX_FAIL_INVALID;
	if (script->overrun)
		return outcome;
	if (l1_start_second_processor(program))
		outcome = VMX_SUCCEED;
	report_outcome("second-processor", outcome);
	return outcome;
}

static vmx_outcome op_invalidate(struct reader *script, bool vpid)
{
	uint64_t type = take64(script);
	struct vmx_invalidation descriptor;
	vmx_outcome outcome;
	descriptor.low = take64(script);
	descriptor.high = take64(script);
	outcome = vpid ? vmx_invvpid(type, &descriptor) : vmx_invept(type, &descriptor);
	report_outcome(vpid ? "invvpid" : "invept", outcome);
	return outcome;
}

/* VMXON, VMCLEAR, VMPTRLD: an address as operand. */
static vmx_outcome op_region(struct reader *script, enum op op)
{
	uint64_t region = take64(script);
	vmx_outcome outcome;
	switch (op) {
	case OP_VMXON:
		outcome = l1_vmxon(region);
		report_outcome("vmxon", outcome);
		return outcome;
	case OP_VMCLEAR:
		outcome = l1_vmclear(region);
		report_outcome("vmclear", outcome);
		return outcome;
	default:
		outcome = l1_vmptrld(region);
		report_outcome("vmptrld", outcome);
		return outcome;
	}
}

static vmx_outcome op_vmxoff(void)
{
	vmx_outcome outcome = l1_vmxoff();
	report_outcome("vmxoff", outcome);
	return outcome;
}

static vmx_outcome op_control_register(struct reader *script, bool cr4)
{
	uint64_t value = take64(script);
	vmx_outcome outcome = cr4 ? try_write_cr4(value) : try_write_cr0(value);
	report_outcome(cr4 ? "mov-cr4" : "mov-cr0", outcome);
	return outcome;
}

static vmx_outcome op_vmcall(void)
{
	vmx_outcome outcome = vmx_vmcall();
	report_outcome("vmcall", outcome);
	return outcome;
}

static void op_registers(struct reader *script)
{
	uint16_t mask = take16(script);
	for (unsigned int i = 0; i < GENERAL_REGISTERS; i++)
		if (mask & 1u << i)
			l2_registers[i] = take64(script);
}

static vmx_outcome op_snapshot(struct reader *script)
{
	vmx_outcome outcome = report_snapshot(take8(script));
	if (outcome != VMX_SUCCEED)
		report_outcome("snapshot", outcome);
	return outcome;
}

static void op_memory(struct reader *script)
{
	uint64_t address = take64(script);
	uint32_t bytes = take32(script);
	while (bytes && !script->overrun) {
		uint32_t chunk = bytes < MEMORY_RECORD_BYTES ? bytes : MEMORY_RECORD_BYTES;
		record_begin("memory");
		record_number("at", address);
		record_nonzero("left", bytes - chunk); /* the next record goes on with so many bytes */
		record_bytes("data", at_physical(address), chunk);
		record_end();
		address += chunk;
		bytes -= chunk;
	}
}

bool operation_execute(struct reader *script, enum op op, vmx_outcome *outcome)
{
	switch (op) {
	case OP_FILL:
		op_fill(script);
		return true;
	case OP_DATA:
		op_data(script);
		return true;
	case OP_SEQUENCE:
		op_sequence(script);
		return true;
	case OP_REVISION:
		op_revision(script);
		return true;
	case OP_VMXON:
	case OP_VMCLEAR:
	case OP_VMPTRLD:
		*outcome = op_region(script, op);
		return true;
	case OP_VMXOFF:
		*outcome = op_vmxoff();
		return true;
	case OP_VMPTRST:
		*outcome = op_vmptrst();
		return true;
	case OP_VMREAD:
		*outcome = op_vmread(script);
		return true;
	case OP_VMWRITES:
		op_vmwrites(script, outcome);
		return true;
	case OP_INVEPT:
	case OP_INVVPID:
		*outcome = op_invalidate(script, op == OP_INVVPID);
		return true;
	case OP_VMCALL:
		*outcome = op_vmcall();
		return true;
	case OP_RDMSR:
	case OP_WRMSR:
		*outcome = op_msr(script, op == OP_WRMSR);
		return true;
	case OP_CR0:
	case OP_CR4:
		*outcome = op_control_register(script, op == OP_CR4);
		return true;
	case OP_CPUID:
		op_cpuid(script);
		return true;
	case OP_APIC_USED:
		l1_use_apic();
		return true;
	case OP_APIC_WRITE:
		op_apic_write(script);
		return true;
	case OP_APIC_READ:
		op_apic_read(script);
		return true;
	case OP_SECOND_PROCESSOR:
		*outcome = op_second_processor(script);
		return true;
	case OP_REGISTERS:
		op_registers(script);
		return true;
	case OP_MEMORY:
		op_memory(script);
		return true;
	case OP_SKIP:
		exits_skip_instruction();
		return true;
	case OP_SNAPSHOT:
		*outcome = op_snapshot(script);
		return true;
	default:
		return false;
	}
}
