#include "cpu/gdt.h"

#include <stdint.h>

#include "cpu/descriptor_table.h"
#include "protocol.h"

enum {
	DESCRIPTOR_TSS_AVAILABLE = 0x9,
	DESCRIPTOR_PRESENT = 0x80,
	DOUBLE_FAULT_STACK_BYTES = 4096,
};

/* SDM Vol. 3A, 8.7: 64-bit TSS. */
struct tss {
	uint32_t reserved0;
	uint64_t rsp[3];
	uint64_t reserved1;
	uint64_t ist[7];
	uint64_t reserved2;
	uint16_t reserved3;
	uint16_t io_map_base;
} __attribute__((packed));

_Static_assert(sizeof(struct tss) == 104, "a 64-bit TSS has 104 bytes");

/* Not static: the harness takes these addresses for the host-state area. */
struct tss monitor_tss __attribute__((aligned(16)));
uint64_t monitor_gdt[5] __attribute__((aligned(16))) = {
	0,
	0x00af9b000000ffff, /* SELECTOR_CODE: 64-bit code, accessed */
	0x00cf93000000ffff, /* SELECTOR_DATA: data, accessed */
	0,                  /* SELECTOR_TSS: 16 bytes, made by tss_descriptor() */
	0,
};

static uint8_t double_fault_stack[DOUBLE_FAULT_STACK_BYTES] __attribute__((aligned(16)));

/* Always as an available TSS: LTR wants one, and marks it busy. */
static void tss_descriptor(void)
{
	uint64_t base = (uintptr_t)&monitor_tss;
	uint64_t limit = sizeof(monitor_tss) - 1;
	uint64_t type = DESCRIPTOR_PRESENT | DESCRIPTOR_TSS_AVAILABLE;
	monitor_gdt[SELECTOR_TSS / 8] =
		limit | (base & 0xffffff) << 16 | type << 40 | (base >> 24 & 0xff) << 56;
	monitor_gdt[SELECTOR_TSS / 8 + 1] = base >> 32;
}

void gdt_init(void)
{
	monitor_tss.ist[0] = (uintptr_t)(double_fault_stack + DOUBLE_FAULT_STACK_BYTES);
	monitor_tss.io_map_base = sizeof(monitor_tss);
	gdt_reload();
}

void gdt_reload(void)
{
	struct descriptor_table_register gdtr = {sizeof(monitor_gdt) - 1, (uintptr_t)monitor_gdt};
	tss_descriptor();
	asm volatile("lgdt %0\n\t"
		     "pushq %1\n\t"
		     "leaq 1f(%%rip), %%rax\n\t"
		     "pushq %%rax\n\t"
		     "lretq\n"
		     "1:\n\t"
		     "movl %2, %%eax\n\t"
		     "movl %%eax, %%ds\n\t"
		     "movl %%eax, %%es\n\t"
		     "movl %%eax, %%ss\n\t"
		     "movl %%eax, %%fs\n\t"
		     "movl %%eax, %%gs\n\t"
		     "ltr %w3"
		     :
		     : "m"(gdtr), "i"(SELECTOR_CODE), "i"(SELECTOR_DATA), "r"(SELECTOR_TSS)
		     : "rax", "memory");
}
