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
	mov	vmx_registers_from(%rip), %r15
	mov	8*0(%r15), %rax
	mov	8*1(%r15), %rcx
	mov	8*2(%r15), %rdx
	mov	8*3(%r15), %rbx
	mov	8*5(%r15), %rbp
	mov	8*6(%r15), %rsi
	mov	8*7(%r15), %rdi
	mov	8*8(%r15), %r8
	mov	8*9(%r15), %r9
	mov	8*10(%r15), %r10
	mov	8*11(%r15), %r11
	mov	8*12(%r15), %r12
	mov	8*13(%r15), %r13
	mov	8*14(%r15), %r14
	mov	8*15(%r15), %r15
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
	cmpb	$0, vmx_keep_host_state(%rip)
	jne	1f
	call	vmx_restore_monitor
1:	mov	$4, %eax                /* VMX_ENTERED */
	jmp	leave_enter

	.pushsection .fixups, "a"
	.quad	launch, leave_enter
	.quad	resume, leave_enter
	.popsection

	.data
	.balign	8
	.globl	vmx_registers_from
vmx_registers_from:
	.quad	l2_registers

	.bss
	.balign	8
	.globl	l2_registers
l2_registers:
	.skip	8 * 16
monitor_rsp:
	.skip	8
	.globl	vmx_keep_host_state
vmx_keep_host_state:
	.skip	1

	.section .note.GNU-stack, "", @progbits
