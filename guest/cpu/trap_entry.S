/*
 * One stub for each vector: pushes a uniform frame (struct trap_frame) and calls trap_handle(frame).
 * Clobbers nothing: every general register is saved and restored.
 */
#define VECTORS 256
#define STUB_BYTES 16

	.text
	.code64
	.balign	STUB_BYTES
	.globl	trap_stubs
trap_stubs:                     /* the stub of vector v is at trap_stubs + v * STUB_BYTES */
	.set	vector, 0
	.rept	VECTORS
	.balign	STUB_BYTES
	/* #DF, #TS, #NP, #SS, #GP, #PF, #AC and #CP push an error code (SDM Vol. 3A, table 6-1). */
	.if	!(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
	pushq	$0
	.endif
	pushq	$vector
	jmp	trap_common
	.set	vector, vector + 1
	.endr

trap_common:
	push	%rax
	push	%rcx
	push	%rdx
	push	%rbx
	push	%rbp
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	cld
	mov	%rsp, %rdi
	call	trap_handle
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rbp
	pop	%rbx
	pop	%rdx
	pop	%rcx
	pop	%rax
	add	$16, %rsp               /* vector and error code */
	iretq

/* void nmi_unblock(void): an IRET to its caller (SDM Vol. 3A, 6.7.1). */
	.globl	nmi_unblock
nmi_unblock:
	pop	%rax
	mov	%rsp, %rdx
	mov	%ss, %ecx
	push	%rcx
	push	%rdx
	pushfq
	mov	%cs, %ecx
	push	%rcx
	push	%rax
	iretq

/* int recovery_set(struct recovery *): returns 0, and 1 once more for each recovery_go. */
	.globl	recovery_set
recovery_set:
	mov	%rbx, 0(%rdi)
	mov	%rbp, 8(%rdi)
	mov	%r12, 16(%rdi)
	mov	%r13, 24(%rdi)
	mov	%r14, 32(%rdi)
	mov	%r15, 40(%rdi)
	lea	8(%rsp), %rax
	mov	%rax, 48(%rdi)
	mov	(%rsp), %rax
	mov	%rax, 56(%rdi)
	xor	%eax, %eax
	ret

	.globl	recovery_go
recovery_go:
	mov	0(%rdi), %rbx
	mov	8(%rdi), %rbp
	mov	16(%rdi), %r12
	mov	24(%rdi), %r13
	mov	32(%rdi), %r14
	mov	40(%rdi), %r15
	mov	48(%rdi), %rsp
	mov	$1, %eax
	jmp	*56(%rdi)

	.section .note.GNU-stack, "", @progbits
