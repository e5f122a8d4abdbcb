#include "cpu/traps.h"

#include <stddef.h>

#include "cpu/apic.h"
#include "cpu/descriptor_table.h"
#include "cpu/gdt.h"
#include "cpu/registers.h"
#include "lib/serial.h"
#include "monitor/records.h"
#include "protocol.h"
#include "vmx/instructions.h"
#include "vmx_facts.h"

enum {
	VECTORS = 256,
	STUB_BYTES = 16,
	FIRST_INTERRUPT = 32,
	DOUBLE_FAULT_IST = 1,
	GATE_INTERRUPT = 0x8e, /* present, DPL 0, 64-bit interrupt gate */
};

/* SDM Vol. 3A, 6.14.1: 64-bit gate. */
struct gate {
	uint16_t offset_low;
	uint16_t selector;
	uint8_t ist;
	uint8_t type;
	uint16_t offset_middle;
	uint32_t offset_high;
	uint32_t reserved;
};

struct fixup {
	uint64_t instruction;
	uint64_t resume;
};

extern const uint8_t trap_stubs[];
extern const struct fixup fixups_start[], fixups_end[];

/* Not static: the harness takes this address for the host-state area. */
struct gate monitor_idt[VECTORS] __attribute__((aligned(16)));
struct recovery *trap_recovery;
struct trap_seen trap_last;
bool trap_events_wanted;

void traps_init(void)
{
	for (unsigned int vector = 0; vector < VECTORS; vector++) {
		uint64_t stub = (uintptr_t)trap_stubs + vector * STUB_BYTES;
		monitor_idt[vector] = (struct gate){
			.offset_low = (uint16_t)stub,
			.selector = SELECTOR_CODE,
			.ist = vector == VECTOR_DF ? DOUBLE_FAULT_IST : 0,
			.type = GATE_INTERRUPT,
			.offset_middle = (uint16_t)(stub >> 16),
			.offset_high = (uint32_t)(stub >> 32),
		};
	}
	traps_reload();
}

void traps_reload(void)
{
	struct descriptor_table_register idtr = {sizeof(monitor_idt) - 1, (uintptr_t)monitor_idt};
	asm volatile("lidt %0" : : "m"(idtr));
}

static const struct fixup *find_fixup(uint64_t rip)
{
	for (const struct fixup *fixup = fixups_start; fixup < fixups_end; fixup++)
		if (fixup->instruction == rip)
			return fixup;
	return NULL;
}

static void report(const char *kind, const struct trap_frame *frame)
{
	record_begin(kind);
	record_number("vector", frame->vector);
	record_number("code", frame->error_code);
	record_number("rip", frame->rip);
	record_number("rsp", frame->rsp);
	record_number("rflags", frame->rflags);
	record_number("cr2", read_cr2());
	record_end();
}

static bool take_event(uint64_t vector)
{
	if (!trap_events_wanted || (vector != VECTOR_NMI && vector < FIRST_INTERRUPT))
		return false;
	if (vector >= FIRST_INTERRUPT)
		apic_write(APIC_EOI, 0);
	return true;
}

/* Called from cpu/trap_entry.S. */
void trap_handle(struct trap_frame *frame)
{
	const struct fixup *fixup = find_fixup(frame->rip);
	if (take_event(frame->vector))
		return;
	if (fixup) {
		frame->rip = fixup->resume;
		frame->rax = vmx_fault((uint8_t)frame->vector, (uint32_t)frame->error_code);
		return;
	}
	if (!trap_recovery || frame->vector == VECTOR_DF) {
		report("panic", frame);
		serial_drain();
		for (;;)
			asm volatile("cli; hlt");
	}
	trap_last = (struct trap_seen){*frame, read_cr0(), read_cr2(), read_cr3(), read_cr4()};
	report("fault", frame);
	recovery_go(trap_recovery);
}
