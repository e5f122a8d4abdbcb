/*
 * Where a SIPI starts the second processor: real mode, at a page below 1 MiB that the trampoline is copied to
 * (cpu/second_processor.c). From there into flat 32-bit protected mode, and to the program.
 * Clobbers everything.
 */
#include "vmx_facts.h"

#define SELECTOR_FLAT_CODE 0x08
#define SELECTOR_FLAT_DATA 0x10

	.text
	.code16
	.globl	second_processor_trampoline
second_processor_trampoline:
	cli
	mov	%cs, %ax
	mov	%ax, %ds
	lgdtl	second_processor_gdtr - second_processor_trampoline
	mov	%cr0, %eax
	and	$~(CR0_CD | CR0_NW), %eax
	or	$CR0_PE, %eax
	mov	%eax, %cr0
	ljmpl	$SELECTOR_FLAT_CODE, $arrive
	.balign	4
second_processor_gdtr:
	.word	second_processor_gdt_end - second_processor_gdt - 1
	.long	second_processor_gdt
	.globl	second_processor_trampoline_end
second_processor_trampoline_end:

	.code32
arrive:
	mov	$SELECTOR_FLAT_DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	%eax, %fs
	mov	%eax, %gs
	mov	$stack_top, %esp
	mov	second_processor_program, %eax
	movl	$1, second_processor_arrived
	/* Interruptible: a host that runs it in a turn of its own has to get the processor back. */
	sti
	jmp	*%eax

	.globl	second_processor_parked
second_processor_parked:
	cli
1:	hlt
	jmp	1b

	.section .rodata
	.balign	8
second_processor_gdt:
	.quad	0
	.quad	0x00cf9b000000ffff      /* SELECTOR_FLAT_CODE, accessed */
	.quad	0x00cf93000000ffff      /* SELECTOR_FLAT_DATA, accessed */
second_processor_gdt_end:

	.bss
	.balign	16
	.skip	1024
stack_top:
	.globl	second_processor_program
second_processor_program:
	.skip	4
	.globl	second_processor_arrived
second_processor_arrived:
	.skip	4

	.section .note.GNU-stack, "", @progbits
