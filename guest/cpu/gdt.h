/*
 * The monitor's segments: flat 64-bit code and data, and the TSS that VM entry demands of a host
 * (SDM Vol. 3C, 27.2.3: the host TR selector may not be 0).
 */
#ifndef CPU_GDT_H
#define CPU_GDT_H

/* Makes GDT and TSS and loads them. */
void gdt_init(void);

/* Loads GDTR, TR and the segment registers again, whatever a VM exit put there. */
void gdt_reload(void);
#endif
