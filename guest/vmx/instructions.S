/*
 * vmx/instructions.h in assembly: C can't say "run this, and here is where a fault goes on".
 * Arguments and result as the System V ABI has them; each clobbers RAX, RCX, RDX and the flags.
 * A fault resumes at `faulted` with the outcome in RAX (cpu/traps.c).
 */
	.text
	.code64

	.macro	may_fault instruction:vararg
.Linstruction\@:
	\instruction
	.pushsection .fixups, "a"
	.quad	.Linstruction\@, faulted
	.popsection
	.endm

	.macro	function name
	.balign	16
	.globl	\name
\name:
	.endm

function vmx_vmxon
	may_fault vmxon (%rdi)
	jmp	from_flags

function vmx_vmxoff
	may_fault vmxoff
	jmp	from_flags

function vmx_vmclear
	may_fault vmclear (%rdi)
	jmp	from_flags

function vmx_vmptrld
	may_fault vmptrld (%rdi)
	jmp	from_flags

function vmx_vmptrst
	may_fault vmptrst (%rdi)
	jmp	from_flags

function vmx_vmread
	may_fault vmread %rdi, %rcx
	mov	%rcx, (%rsi)            /* MOV leaves the flags alone */
	jmp	from_flags

function vmx_vmwrite
	may_fault vmwrite %rsi, %rdi
	jmp	from_flags

function vmx_invept
	may_fault invept (%rsi), %rdi
	jmp	from_flags

function vmx_invvpid
	may_fault invvpid (%rsi), %rdi
	jmp	from_flags

function vmx_vmcall
	xor	%eax, %eax              /* an L0 that takes it for a call of its own leaves the flags alone */
	may_fault vmcall
	jmp	from_flags

/* SDM Vol. 3C, 31.2: CF=1 VMfailInvalid, ZF=1 VMfailValid, neither VMsucceed. */
from_flags:
	mov	$1, %eax                /* VMX_FAIL_INVALID */
	jc	1f
	mov	$2, %eax                /* VMX_FAIL_VALID */
	jz	1f
	xor	%eax, %eax              /* VMX_SUCCEED */
1:
faulted:
	ret

function try_rdmsr
	mov	%edi, %ecx
	may_fault rdmsr
	shl	$32, %rdx
	or	%rdx, %rax
	mov	%rax, (%rsi)
	xor	%eax, %eax
	ret

function try_wrmsr
	mov	%edi, %ecx
	mov	%esi, %eax
	mov	%rsi, %rdx
	shr	$32, %rdx
	may_fault wrmsr
	xor	%eax, %eax
	ret

function try_write_cr0
	may_fault mov %rdi, %cr0
	xor	%eax, %eax
	ret

function try_write_cr4
	may_fault mov %rdi, %cr4
	xor	%eax, %eax
	ret

/* Reads and writes of each size. */
	.macro	accesses bits:req, move:req, register:req
function try_read\bits
	may_fault \move (%rdi), %\register
	\move	%\register, (%rsi)
	xor	%eax, %eax
	ret

function try_write\bits
	mov	%rsi, %rcx
	may_fault \move %\register, (%rdi)
	xor	%eax, %eax
	ret
	.endm

	accesses 8, movb, cl
	accesses 16, movw, cx
	accesses 32, movl, ecx
	accesses 64, movq, rcx

	.section .note.GNU-stack, "", @progbits
