/*
 * The reset vector: the last kilobyte of a boot ROM.
 *
 * The processor starts in real-address mode at FFFFFFF0H with a CS base of FFFF0000H (SDM Vol. 3A, 10.1.4).
 * No firmware runs. This stub enters flat 32-bit protected mode, copies the monitor and the payload from
 * the ROM into RAM and jumps to the monitor's 32-bit entry. The numbers in `rom_table` are filled in by the
 * harness when it packs an image (vmxlab.image.rom); the stub holds no address of its own.
 */
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

	.code16
real_mode_start:
	cli
	lgdtl	%cs:(rom_gdtr - rom_table + ROM_STUB_OFFSET)
	mov	$0x11, %eax     /* CR0.PE and CR0.ET; CD and NW of the reset value are cleared */
	mov	%eax, %cr0
	ljmpl	$0x08, $protected_mode_start

	.code32
protected_mode_start:
	mov	$0x10, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	%eax, %fs
	mov	%eax, %gs
	cld
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

	.balign	8
rom_gdt:
	.quad	0
	.quad	0x00cf9b000000ffff      /* 08H: flat 32-bit code */
	.quad	0x00cf93000000ffff      /* 10H: flat data */
rom_gdtr:
	.word	. - rom_gdt - 1
	.long	rom_gdt

	.org	ROM_STUB_BYTES - 16
	.code16
reset_vector:
	/* CS base + IP: a near jump within the last 64 KiB; a far one would lose the base. */
	jmp	real_mode_start
	.org	ROM_STUB_BYTES

	.section .note.GNU-stack, "", @progbits
