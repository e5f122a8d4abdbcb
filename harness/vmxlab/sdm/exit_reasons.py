"""Why a VM exit happened: basic exit reasons (SDM Vol. 3D, Appendix C) and the flags beside them.

The exit-reason field has 32 bits (Vol. 3C, 25.9.1, Table 25-18): the basic reason in bits 15:0, flags above.
Numbers that no edition known here lists stay plain integers: an unknown exit is shown, it doesn't raise.
Reasons marked "later" stand in editions after the one this package cites (see `vmxlab.sdm.EDITION`).
"""

from __future__ import annotations

from enum import IntEnum


class ExitReason(IntEnum):
    """Basic exit reasons (Vol. 3D, Table C-1). 35, 38, 42, 71, 82 and 83 are not assigned in the manual."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    SIPI = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CONTROL_REGISTER_ACCESS = 28
    MOV_DR = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    ENTRY_FAILURE_GUEST_STATE = 33
    ENTRY_FAILURE_MSR_LOADING = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    ENTRY_FAILURE_MACHINE_CHECK = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR_ACCESS = 46
    LDTR_TR_ACCESS = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PML_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SPP = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID_TRANSLATION_FAILURE = 72
    ENQCMDS_PASID_TRANSLATION_FAILURE = 73
    BUS_LOCK = 74
    INSTRUCTION_TIMEOUT = 75
    SEAMCALL = 76
    TDCALL = 77
    RDMSRLIST = 78
    WRMSRLIST = 79
    URDMSR = 80  # later
    UWRMSR = 81  # later
    RDMSR_IMMEDIATE = 84  # later
    WRMSRNS_IMMEDIATE = 85  # later


# The other bits of the exit-reason field (Vol. 3C, Table 25-18).
BASIC_REASON_MASK = 0xFFFF
SHADOW_STACK_BUSY_BIT = 1 << 25
BUS_LOCK_BIT = 1 << 26
ENCLAVE_MODE_BIT = 1 << 27
PENDING_MTF_BIT = 1 << 28
EXIT_FROM_VMX_ROOT_BIT = 1 << 29
ENTRY_FAILURE_BIT = 1 << 31

FLAG_TEXTS = {
    SHADOW_STACK_BUSY_BIT: "shadow stack prematurely busy",
    BUS_LOCK_BIT: "bus lock asserted",
    ENCLAVE_MODE_BIT: "incident to enclave mode",
    PENDING_MTF_BIT: "pending MTF VM exit",
    EXIT_FROM_VMX_ROOT_BIT: "from VMX root operation",
    ENTRY_FAILURE_BIT: "VM-entry failure",
}


def basic_reason(full: int) -> ExitReason | int:
    """Bits 15:0 of an exit-reason field; a plain int where the manual assigns no such reason."""
    number = full & BASIC_REASON_MASK
    try:
        return ExitReason(number)
    except ValueError:
        return number


def is_entry_failure(full: int) -> bool:
    """Whether the exit-reason field tells of a VM entry that failed, not of a true VM exit (bit 31)."""
    return bool(full & ENTRY_FAILURE_BIT)


def describe_reason(full: int) -> str:
    """An exit-reason field in words, such as "HLT" or "ENTRY_FAILURE_GUEST_STATE (VM-entry failure)"."""
    reason = basic_reason(full)
    name = reason.name if isinstance(reason, ExitReason) else f"reason {reason}"
    flags = [text for bit, text in FLAG_TEXTS.items() if full & bit]
    unnamed = full & ~BASIC_REASON_MASK & ~sum(FLAG_TEXTS)
    if unnamed:
        flags.append(f"unassigned bits {unnamed:#x}")
    return f"{name} ({', '.join(flags)})" if flags else name
