/*
 * The last kilobyte of the carrier's boot ROM: it enters Linux, which the emulator has put into RAM already,
 * by the kernel's PVH entry (Xen, docs/misc/pvh: EBX holds the physical address of hvm_start_info, paging
 * off, flat segments). The numbers in `carrier_table` are filled in by vmxlab.engines.carrier.
 *
 * Bochs 2.7 gives RAM to a machine in blocks of 128 KiB, each at its first use, one after the other. It
 * loads an image from a file in one piece, past the end of the only block that it has taken for it. What was
 * loaded is found in its place only if the image's blocks are the first ones that are used, in their order;
 * so each is touched once before anything else is.
 */
#define TOUCH_STEP_SHIFT 16     /* 64 KiB: no block is passed over, should they be smaller elsewhere */

#include "boot/flat_mode.inc"

	.section .rom, "ax"

	.globl carrier_table
carrier_table:                  /* offset 0 of the stub: vmxlab.engines.carrier.image */
	.ascii	"VMXLABCR"
image_base:	.long 0         /* physical address in RAM */
image_bytes:	.long 0
kernel_entry:	.long 0
start_info:	.long 0

	enter_flat_mode carrier_table
	mov	image_base, %esi
	mov	image_bytes, %ecx
	shr	$TOUCH_STEP_SHIFT, %ecx
	inc	%ecx
1:	testl	%eax, (%esi)
	add	$(1 << TOUCH_STEP_SHIFT), %esi
	loop	1b
	mov	start_info, %ebx
	jmp	*kernel_entry

	reset_vector

	.section .note.GNU-stack, "", @progbits
