/*
 * The last kilobyte of an image's boot ROM: it copies the monitor and the payload from the ROM into RAM and
 * jumps to the monitor's 32-bit entry. No firmware runs. The numbers in `rom_table` are filled in by the
 * harness when it packs an image (vmxlab.image.rom); the stub holds no address of its own.
 */
#include "boot/flat_mode.inc"
#include "boot/warm_start.h"

	.section .rom, "ax"

	.globl rom_table
rom_table:                      /* offset 0 of the stub: vmxlab.image.rom.ROM_TABLE */
	.ascii	"VMXLABRM"
monitor_source:	.long 0         /* physical address in the ROM */
monitor_bytes:	.long 0         /* multiple of 4 */
monitor_target:	.long 0         /* physical address in RAM */
monitor_entry:	.long 0
payload_source:	.long 0
payload_bytes:	.long 0         /* multiple of 4; 0: none */
payload_target:	.long 0
	.long	0

	enter_flat_mode rom_table
	cmpl	$WARM_START_MAGIC, WARM_START
	jne	1f
	jmp	*(WARM_START + 4)       /* an INIT that the monitor counts on */
1:
	mov	monitor_source, %esi
	mov	monitor_target, %edi
	mov	monitor_bytes, %ecx
	shr	$2, %ecx
	rep movsl
	mov	payload_target, %edi
	movl	$0, (%edi)      /* no payload of an earlier boot is taken for ours */
	mov	payload_source, %esi
	mov	payload_bytes, %ecx
	shr	$2, %ecx
	rep movsl
	mov	$0x4d524c56, %eax       /* "VLRM": BOOT_MAGIC_ROM in boot/boot.h */
	xor	%ebx, %ebx
	jmp	*monitor_entry

	reset_vector

	.section .note.GNU-stack, "", @progbits
