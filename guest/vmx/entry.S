/*
 * vmx_enter(resume): into L2 and back. Clobbers what the ABI lets it: the callee-saved registers are
 * kept on the monitor's stack, which is found again by `monitor_rsp`, not by HOST_RSP: a case may have
 * changed any host-state field.
 */
#define R(n) l2_registers + 8 * (n)(%rip)

	.text
	.code64
	.globl	vmx_enter
vmx_enter:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	mov	%rsp, monitor_rsp(%rip)
	test	%dil, %dil              /* the flags outlive the loads below */
	mov	R(0), %rax
	mov	R(1), %rcx
	mov	R(2), %rdx
	mov	R(3), %rbx
	mov	R(5), %rbp
	mov	R(6), %rsi
	mov	R(7), %rdi
	mov	R(8), %r8
	mov	R(9), %r9
	mov	R(10), %r10
	mov	R(11), %r11
	mov	R(12), %r12
	mov	R(13), %r13
	mov	R(14), %r14
	mov	R(15), %r15
	jnz	1f
launch:	vmlaunch
	jmp	2f
1:
resume:	vmresume
2:	mov	$1, %eax                /* here the instruction failed: VMX_FAIL_INVALID */
	jc	leave_enter
	mov	$2, %eax                /* VMX_FAIL_VALID */
leave_enter:
	mov	monitor_rsp(%rip), %rsp
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

/* HOST_RIP of every case, unless the case says otherwise. */
	.globl	vmx_exit_entry
vmx_exit_entry:
	mov	%rax, R(0)
	mov	%rcx, R(1)
	mov	%rdx, R(2)
	mov	%rbx, R(3)
	mov	%rbp, R(5)
	mov	%rsi, R(6)
	mov	%rdi, R(7)
	mov	%r8, R(8)
	mov	%r9, R(9)
	mov	%r10, R(10)
	mov	%r11, R(11)
	mov	%r12, R(12)
	mov	%r13, R(13)
	mov	%r14, R(14)
	mov	%r15, R(15)
	mov	monitor_rsp(%rip), %rsp
	call	vmx_restore_monitor
	mov	$4, %eax                /* VMX_ENTERED */
	jmp	leave_enter

	.pushsection .fixups, "a"
	.quad	launch, leave_enter
	.quad	resume, leave_enter
	.popsection

	.bss
	.balign	8
	.globl	l2_registers
l2_registers:
	.skip	8 * 16
monitor_rsp:
	.skip	8

	.section .note.GNU-stack, "", @progbits
