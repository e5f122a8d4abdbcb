/*
 * The VMX instructions, and those others that may fault, each with one comparable outcome
 * (SDM Vol. 3C, 31.2: VMsucceed, VMfailInvalid, VMfailValid; or a fault). vmx/instructions.S holds them.
 */
#ifndef VMX_INSTRUCTIONS_H
#define VMX_INSTRUCTIONS_H

#include <stdbool.h>
#include <stdint.h>

enum vmx_outcome_kind {
	VMX_SUCCEED = 0,
	VMX_FAIL_INVALID = 1, /* CF=1: no current VMCS */
	VMX_FAIL_VALID = 2,   /* ZF=1: the VM-instruction error field says why */
	VMX_FAULT = 3,
	VMX_ENTERED = 4, /* vmx_enter only: L2 ran, or the entry failed late; the exit reason tells */
};

/* An outcome in one register: bits 7:0 kind; for a fault 15:8 vector and 63:32 error code. */
typedef uint64_t vmx_outcome;

static inline enum vmx_outcome_kind vmx_outcome_kind(vmx_outcome outcome)
{
	return (enum vmx_outcome_kind)(uint8_t)outcome;
}

static inline uint8_t vmx_outcome_vector(vmx_outcome outcome)
{
	return (uint8_t)(outcome >> 8);
}

static inline uint32_t vmx_outcome_error_code(vmx_outcome outcome)
{
	return (uint32_t)(outcome >> 32);
}

static inline vmx_outcome vmx_fault(uint8_t vector, uint32_t error_code)
{
	return VMX_FAULT | (uint64_t)vector << 8 | (uint64_t)error_code << 32;
}

/* The 128-bit descriptor of INVEPT and INVVPID (SDM Vol. 3C, 31.3). */
struct vmx_invalidation {
	uint64_t low, high;
};

vmx_outcome vmx_vmxon(const uint64_t *region);
vmx_outcome vmx_vmxoff(void);
vmx_outcome vmx_vmclear(const uint64_t *region);
vmx_outcome vmx_vmptrld(const uint64_t *region);
vmx_outcome vmx_vmptrst(uint64_t *region);
vmx_outcome vmx_vmread(uint64_t field, uint64_t *value);
vmx_outcome vmx_vmwrite(uint64_t field, uint64_t value);
vmx_outcome vmx_invept(uint64_t type, const struct vmx_invalidation *descriptor);
vmx_outcome vmx_invvpid(uint64_t type, const struct vmx_invalidation *descriptor);
vmx_outcome vmx_vmcall(void);

/* The same for instructions that only succeed or fault. */
vmx_outcome try_rdmsr(uint32_t msr, uint64_t *value);
vmx_outcome try_wrmsr(uint32_t msr, uint64_t value);
vmx_outcome try_write_cr0(uint64_t value);
vmx_outcome try_write_cr4(uint64_t value);
vmx_outcome try_read8(const void *address, uint8_t *value);
vmx_outcome try_read16(const void *address, uint16_t *value);
vmx_outcome try_read32(const void *address, uint32_t *value);
vmx_outcome try_read64(const void *address, uint64_t *value);
vmx_outcome try_write8(void *address, uint8_t value);
vmx_outcome try_write16(void *address, uint16_t value);
vmx_outcome try_write32(void *address, uint32_t value);
vmx_outcome try_write64(void *address, uint64_t value);

#endif
