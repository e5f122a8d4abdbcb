/*
 * The monitor's 32-bit entry: flat protected mode, paging off, interrupts off, EAX tells the loader
 * (boot/boot.h). Clears the BSS, maps the first 4 GiB one to one with 2 MiB pages, enters 64-bit mode
 * (SDM Vol. 3A, 10.8.5) and calls monitor_main(eax).
 */
#include "boot/warm_start.h"
#include "vmx_facts.h"

#define PDE_2MIB_PRESENT_WRITE 0x83
#define PTE_PRESENT_WRITE 0x03

	.section .text.start32, "ax"
	.code32
	.globl	start32
start32:
	cli
	cld
	mov	%eax, %ebp
	mov	$monitor_file_end, %edi
	mov	$monitor_end, %ecx
	sub	%edi, %ecx
	shr	$2, %ecx
	xor	%eax, %eax
	rep stosl
	mov	$monitor_stack_top, %esp

	/* Four page directories, one after the other, cover 4 GiB. */
	mov	$monitor_page_directories, %edi
	mov	$PDE_2MIB_PRESENT_WRITE, %eax
1:	mov	%eax, (%edi)
	add	$8, %edi
	add	$0x200000, %eax
	jnc	1b
	mov	$monitor_pdpt, %edi
	mov	$(monitor_page_directories + PTE_PRESENT_WRITE), %eax
	mov	$4, %ecx
2:	mov	%eax, (%edi)
	add	$8, %edi
	add	$0x1000, %eax
	loop	2b
	movl	$(monitor_pdpt + PTE_PRESENT_WRITE), monitor_pml4
	mov	$monitor_main, %ebx

enter_64_bit_mode:              /* to EBX, with EDI = EBP */
	mov	$CR4_PAE, %eax
	mov	%eax, %cr4
	mov	$monitor_pml4, %eax
	mov	%eax, %cr3
	mov	$MSR_IA32_EFER, %ecx
	mov	$(EFER_LME), %eax
	xor	%edx, %edx
	wrmsr
	mov	$(CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_PE), %eax
	mov	%eax, %cr0
	lgdt	start_gdtr
	ljmp	$0x08, $start64

	.code64
start64:
	mov	%ebp, %edi
	mov	%ebx, %ebx              /* the upper halves are undefined so far */
	xor	%eax, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	%eax, %fs
	mov	%eax, %gs
	call	*%rbx
	ud2                             /* nothing returns here */

	/* After an INIT (boot/warm_start.h): the page tables are there, the stack is in use. */
	.code32
	.globl	start32_warm
start32_warm:
	movl	$0, WARM_START
	mov	$warm_stack_top, %esp
	mov	warm_start_recovery, %ebp
	mov	$recovery_go, %ebx
	jmp	enter_64_bit_mode

	.section .rodata
	.balign	8
start_gdt:
	.quad	0
	.quad	0x00af9b000000ffff      /* 08H: 64-bit code; cpu/gdt.c makes the one that stays */
start_gdtr:
	.word	. - start_gdt - 1
	.long	start_gdt

	.bss
	.balign	4096
	.globl	monitor_pml4
monitor_pml4:
	.skip	4096
monitor_pdpt:
	.skip	4096
monitor_page_directories:
	.skip	4 * 4096
	.skip	32768
monitor_stack_top:
	.skip	64
warm_stack_top:

	/*
	 * HOST_RSP of every case, unless the case says otherwise. It is used only where a VM exit goes to another
	 * place than vmx_exit_entry: a fault there is handled on it, and the frames of the monitor, which goes on
	 * at its recovery point then, must not lie below.
	 */
	.balign	16
	.skip	8192
	.globl	monitor_exit_stack_top
monitor_exit_stack_top:

	.section .note.GNU-stack, "", @progbits
