/* The operand of LGDT and LIDT in 64-bit mode (SDM Vol. 2A, LGDT/LIDT). */
#ifndef CPU_DESCRIPTOR_TABLE_H
#define CPU_DESCRIPTOR_TABLE_H

#include <stdint.h>

struct descriptor_table_register {
	uint16_t limit;
	uint64_t base;
} __attribute__((packed));

#endif
