/*
 * The monitor's segments: flat 64-bit code and data, and the TSS that VM entry demands of a host
 * (SDM Vol. 3C, 27.2.3: the host TR selector may not be 0).
 */
#ifndef CPU_GDT_H
#define CPU_GDT_H

/* vmxlab.image.layout reads these selectors' values from the names here. */
#define SELECTOR_CODE 0x08
#define SELECTOR_DATA 0x10
#define SELECTOR_TSS 0x18

#ifndef __ASSEMBLER__
/* Makes GDT and TSS and loads them. */
void gdt_init(void);

/* Loads GDTR, TR and the segment registers again, whatever a VM exit put there. */
void gdt_reload(void);
#endif

#endif
