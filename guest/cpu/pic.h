/* The 8259 interrupt controllers: silenced. Without firmware nobody else does it. */
#ifndef CPU_PIC_H
#define CPU_PIC_H

#include "cpu/io.h"

static inline void pic_mask_all(void)
{
	enum { PIC_MASTER_DATA = 0x21, PIC_SLAVE_DATA = 0xa1 };
	outb(PIC_MASTER_DATA, 0xff);
	outb(PIC_SLAVE_DATA, 0xff);
}

#endif
