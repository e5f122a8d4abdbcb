"""Registers and their bits: CR0, CR4, EFER, RFLAGS, DR6, DR7, general registers, vectors, guest states.

SDM Vol. 1, 3.4 (general registers, RFLAGS); Vol. 3A, 2.2.1 (EFER), 2.5 (control registers), 6.3.1 (vectors),
12.11 (memory types); Vol. 3B, 18.2 (debug registers); Vol. 3C, 24.7 (IA32_FEATURE_CONTROL), 25.4.2 (activity
and interruptibility), 31.3 (types of INVEPT and INVVPID).
"""

from __future__ import annotations

from enum import IntEnum

from vmxlab.sdm.flags import BitFlags

# In the order of their numbers in instruction encodings, exit qualifications and instruction information
# (Vol. 2A, Table 3-1; Vol. 3C, Table 28-3). One index means one register everywhere in this project.
GENERAL_REGISTERS: tuple[str, ...] = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
)

# As numbered in the VM-exit instruction-information field (Vol. 3C, Table 28-8).
SEGMENT_REGISTERS: tuple[str, ...] = ("es", "cs", "ss", "ds", "fs", "gs")


class CR0(BitFlags):
    """Control register 0 (Vol. 3A, 2.5)."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class CR4(BitFlags):
    """Control register 4 (Vol. 3A, 2.5)."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    KL = 1 << 19
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24
    UINTR = 1 << 25
    LASS = 1 << 27
    LAM_SUP = 1 << 28
    FRED = 1 << 32  # later than the edition cited


class EFER(BitFlags):
    """IA32_EFER (Vol. 3A, 2.2.1)."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11


class RFLAGS(BitFlags):
    """RFLAGS (Vol. 1, 3.4.3). Bit 1 is always 1; IOPL is the two bits 13:12."""

    CF = 1 << 0
    FIXED1 = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL0 = 1 << 12
    IOPL1 = 1 << 13
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class DR6(BitFlags):
    """Debug status register (Vol. 3B, 18.2.3). BLD and RTM are active low: 0 tells of the condition."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11
    BD = 1 << 13
    BS = 1 << 14
    BT = 1 << 15
    RTM = 1 << 16


class DR7(BitFlags):
    """Debug control register (Vol. 3B, 18.2.4), without the R/W and LEN fields of bits 31:16."""

    L0 = 1 << 0
    G0 = 1 << 1
    L1 = 1 << 2
    G1 = 1 << 3
    L2 = 1 << 4
    G2 = 1 << 5
    L3 = 1 << 6
    G3 = 1 << 7
    LE = 1 << 8
    GE = 1 << 9
    FIXED1 = 1 << 10
    RTM = 1 << 11
    GD = 1 << 13


class Vector(IntEnum):
    """Vectors of exceptions and of NMI (Vol. 3A, Table 6-1)."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21

    @property
    def has_error_code(self) -> bool:
        """Whether delivery of the exception pushes an error code."""
        return self in _WITH_ERROR_CODE


_WITH_ERROR_CODE = frozenset(
    {Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC, Vector.CP}
)


class ActivityState(IntEnum):
    """What the logical processor does while the guest runs (Vol. 3C, 25.4.2)."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


class InterruptibilityState(BitFlags):
    """Which events are blocked (Vol. 3C, Table 25-3)."""

    BLOCKING_BY_STI = 1 << 0
    BLOCKING_BY_MOV_SS = 1 << 1
    BLOCKING_BY_SMI = 1 << 2
    BLOCKING_BY_NMI = 1 << 3
    ENCLAVE_INTERRUPTION = 1 << 4


class PendingDebugExceptions(BitFlags):
    """Debug exceptions that are recognised and not delivered yet (Vol. 3C, Table 25-4)."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    ENABLED_BREAKPOINT = 1 << 12
    BS = 1 << 14
    RTM = 1 << 16


class MemoryType(IntEnum):
    """Memory types as encoded in MTRRs, EPT entries and IA32_VMX_BASIC (Vol. 3A, 12.11)."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6


class FeatureControlFlags(BitFlags):
    """IA32_FEATURE_CONTROL (Vol. 3C, 24.7; Vol. 4, Table 2-2). Bits 14:8 are the SENTER local functions."""

    LOCKED = 1 << 0
    VMXON_ENABLED_INSIDE_SMX = 1 << 1
    VMXON_ENABLED_OUTSIDE_SMX = 1 << 2
    SENTER_GLOBAL_ENABLE = 1 << 15
    SGX_LAUNCH_CONTROL_ENABLE = 1 << 17
    SGX_GLOBAL_ENABLE = 1 << 18
    LMCE_ON = 1 << 20


class InveptType(IntEnum):
    """Types of INVEPT (Vol. 3C, 31.3, INVEPT)."""

    SINGLE_CONTEXT = 1
    GLOBAL = 2


class InvvpidType(IntEnum):
    """Types of INVVPID (Vol. 3C, 31.3, INVVPID)."""

    INDIVIDUAL_ADDRESS = 0
    SINGLE_CONTEXT = 1
    ALL_CONTEXTS = 2
    SINGLE_CONTEXT_RETAINING_GLOBALS = 3
