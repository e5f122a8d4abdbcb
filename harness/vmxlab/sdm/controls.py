"""VM-execution, VM-exit and VM-entry controls (SDM Vol. 3C, 25.6.1, 25.6.2, 25.7.1, 25.8.1).

Seven sets of bits, each with its VMCS field and the capability MSR that says which bits may be 0 and 1
(Vol. 3D, A.3 to A.5). Bits marked "later" stand in editions after the one this package cites
(see `vmxlab.sdm.EDITION`). Bits that no edition names are kept as they are.
"""

from __future__ import annotations

from enum import Enum

from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr


class PinControls(BitFlags):
    """Pin-based VM-execution controls (Table 25-5)."""

    EXTERNAL_INTERRUPT_EXITING = 1 << 0
    NMI_EXITING = 1 << 3
    VIRTUAL_NMIS = 1 << 5
    ACTIVATE_PREEMPTION_TIMER = 1 << 6
    PROCESS_POSTED_INTERRUPTS = 1 << 7


class PrimaryControls(BitFlags):
    """Primary processor-based VM-execution controls (Table 25-6)."""

    INTERRUPT_WINDOW_EXITING = 1 << 2
    USE_TSC_OFFSETTING = 1 << 3
    HLT_EXITING = 1 << 7
    INVLPG_EXITING = 1 << 9
    MWAIT_EXITING = 1 << 10
    RDPMC_EXITING = 1 << 11
    RDTSC_EXITING = 1 << 12
    CR3_LOAD_EXITING = 1 << 15
    CR3_STORE_EXITING = 1 << 16
    ACTIVATE_TERTIARY_CONTROLS = 1 << 17
    CR8_LOAD_EXITING = 1 << 19
    CR8_STORE_EXITING = 1 << 20
    USE_TPR_SHADOW = 1 << 21
    NMI_WINDOW_EXITING = 1 << 22
    MOV_DR_EXITING = 1 << 23
    UNCONDITIONAL_IO_EXITING = 1 << 24
    USE_IO_BITMAPS = 1 << 25
    MONITOR_TRAP_FLAG = 1 << 27
    USE_MSR_BITMAPS = 1 << 28
    MONITOR_EXITING = 1 << 29
    PAUSE_EXITING = 1 << 30
    ACTIVATE_SECONDARY_CONTROLS = 1 << 31


class SecondaryControls(BitFlags):
    """Secondary processor-based VM-execution controls (Table 25-7)."""

    VIRTUALIZE_APIC_ACCESSES = 1 << 0
    ENABLE_EPT = 1 << 1
    DESCRIPTOR_TABLE_EXITING = 1 << 2
    ENABLE_RDTSCP = 1 << 3
    VIRTUALIZE_X2APIC_MODE = 1 << 4
    ENABLE_VPID = 1 << 5
    WBINVD_EXITING = 1 << 6
    UNRESTRICTED_GUEST = 1 << 7
    APIC_REGISTER_VIRTUALIZATION = 1 << 8
    VIRTUAL_INTERRUPT_DELIVERY = 1 << 9
    PAUSE_LOOP_EXITING = 1 << 10
    RDRAND_EXITING = 1 << 11
    ENABLE_INVPCID = 1 << 12
    ENABLE_VM_FUNCTIONS = 1 << 13
    VMCS_SHADOWING = 1 << 14
    ENABLE_ENCLS_EXITING = 1 << 15
    RDSEED_EXITING = 1 << 16
    ENABLE_PML = 1 << 17
    EPT_VIOLATION_VE = 1 << 18
    CONCEAL_VMX_FROM_PT = 1 << 19
    ENABLE_XSAVES = 1 << 20
    PASID_TRANSLATION = 1 << 21
    MODE_BASED_EXECUTE_CONTROL_FOR_EPT = 1 << 22
    SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT = 1 << 23
    PT_USES_GUEST_PHYSICAL_ADDRESSES = 1 << 24
    USE_TSC_SCALING = 1 << 25
    ENABLE_USER_WAIT_AND_PAUSE = 1 << 26
    ENABLE_PCONFIG = 1 << 27
    ENABLE_ENCLV_EXITING = 1 << 28
    VMM_BUS_LOCK_DETECTION = 1 << 30
    INSTRUCTION_TIMEOUT = 1 << 31


class TertiaryControls(BitFlags):
    """Tertiary processor-based VM-execution controls, 64 bits (Table 25-8)."""

    LOADIWKEY_EXITING = 1 << 0
    ENABLE_HLAT = 1 << 1
    EPT_PAGING_WRITE_CONTROL = 1 << 2
    GUEST_PAGING_VERIFICATION = 1 << 3
    IPI_VIRTUALIZATION = 1 << 4
    SEAM_GUEST_PHYSICAL_ADDRESS_WIDTH = 1 << 5  # later
    ENABLE_MSR_LIST_INSTRUCTIONS = 1 << 6
    VIRTUALIZE_IA32_SPEC_CTRL = 1 << 7
    APIC_TIMER_VIRTUALIZATION = 1 << 8  # later
    ENABLE_PBNDKB = 1 << 9  # later
    PEBS_USES_GUEST_PHYSICAL_ADDRESSES = 1 << 12  # later


class ExitControls(BitFlags):
    """Primary VM-exit controls (Table 25-13)."""

    SAVE_DEBUG_CONTROLS = 1 << 2
    HOST_ADDRESS_SPACE_SIZE = 1 << 9
    LOAD_IA32_PERF_GLOBAL_CTRL = 1 << 12
    ACKNOWLEDGE_INTERRUPT_ON_EXIT = 1 << 15
    SAVE_IA32_PAT = 1 << 18
    LOAD_IA32_PAT = 1 << 19
    SAVE_IA32_EFER = 1 << 20
    LOAD_IA32_EFER = 1 << 21
    SAVE_PREEMPTION_TIMER_VALUE = 1 << 22
    CLEAR_IA32_BNDCFGS = 1 << 23
    CONCEAL_VMX_FROM_PT = 1 << 24
    CLEAR_IA32_RTIT_CTL = 1 << 25
    CLEAR_IA32_LBR_CTL = 1 << 26
    CLEAR_UINV = 1 << 27
    LOAD_CET_STATE = 1 << 28
    LOAD_PKRS = 1 << 29
    SAVE_IA32_PERF_GLOBAL_CTRL = 1 << 30
    ACTIVATE_SECONDARY_CONTROLS = 1 << 31


class SecondaryExitControls(BitFlags):
    """Secondary VM-exit controls, 64 bits (Table 25-14)."""

    SAVE_FRED = 1 << 0  # later
    LOAD_FRED = 1 << 1  # later
    LOAD_IA32_SPEC_CTRL = 1 << 2  # later
    PREMATURELY_BUSY_SHADOW_STACK = 1 << 3


class EntryControls(BitFlags):
    """VM-entry controls (Table 25-16)."""

    LOAD_DEBUG_CONTROLS = 1 << 2
    IA32E_MODE_GUEST = 1 << 9
    ENTRY_TO_SMM = 1 << 10
    DEACTIVATE_DUAL_MONITOR = 1 << 11
    LOAD_IA32_PERF_GLOBAL_CTRL = 1 << 13
    LOAD_IA32_PAT = 1 << 14
    LOAD_IA32_EFER = 1 << 15
    LOAD_IA32_BNDCFGS = 1 << 16
    CONCEAL_VMX_FROM_PT = 1 << 17
    LOAD_IA32_RTIT_CTL = 1 << 18
    LOAD_UINV = 1 << 19
    LOAD_CET_STATE = 1 << 20
    LOAD_GUEST_IA32_LBR_CTL = 1 << 21
    LOAD_PKRS = 1 << 22
    LOAD_FRED = 1 << 23  # later
    LOAD_IA32_SPEC_CTRL = 1 << 24  # later
    ALLOW_SEAM_GUEST_TELEMETRY = 1 << 25  # later


def _bits(*ranges: int | tuple[int, int]) -> int:
    # The manual lists the default1 class as "1, 4-6, 8": read here as it stands there.
    mask = 0
    for item in ranges:
        low, high = item if isinstance(item, tuple) else (item, item)
        mask |= (1 << high + 1) - (1 << low)
    return mask


class ControlSet(Enum):
    """The seven sets of controls, with where each is written and where the processor says what it may hold.

    `flags`     the class of its bits
    `field`     its VMCS field
    `msr`       the capability MSR; of 32-bit sets allowed 0-settings in bits 31:0 and allowed 1-settings in
                bits 63:32; of 64-bit sets all 64 bits are allowed 1-settings and any bit may be 0
                (Vol. 3D, A.3.4, A.4.2)
    `true_msr`  the MSR to read instead where IA32_VMX_BASIC[55] is 1, or None
    `default1`  the default1 class: bits the first processors report as fixed to 1 (Vol. 3D, A.2; the lists
                are in Vol. 3C, 25.6.1, 25.6.2, 25.7.1, 25.8.1)
    `activated_by`  the control without which this set acts as if 0, or None
    """

    flags: type[BitFlags]
    field: Field
    msr: Msr
    true_msr: Msr | None
    default1: int
    activated_by: BitFlags | None

    def __new__(
        cls,
        label: str,
        flags: type[BitFlags],
        field: Field,
        msr: Msr,
        true_msr: Msr | None,
        default1: int,
        activated_by: BitFlags | None,
    ) -> ControlSet:
        """Make a member whose value is its label."""
        member = object.__new__(cls)
        member._value_ = label
        member.flags = flags
        member.field = field
        member.msr = msr
        member.true_msr = true_msr
        member.default1 = default1
        member.activated_by = activated_by
        return member

    PIN = (
        "pin-based VM-execution controls",
        PinControls,
        Field.PIN_BASED_CONTROLS,
        Msr.IA32_VMX_PINBASED_CTLS,
        Msr.IA32_VMX_TRUE_PINBASED_CTLS,
        _bits(1, 2, 4),
        None,
    )
    PRIMARY = (
        "primary processor-based VM-execution controls",
        PrimaryControls,
        Field.PRIMARY_PROCESSOR_BASED_CONTROLS,
        Msr.IA32_VMX_PROCBASED_CTLS,
        Msr.IA32_VMX_TRUE_PROCBASED_CTLS,
        _bits(1, (4, 6), 8, (13, 16), 26),
        None,
    )
    SECONDARY = (
        "secondary processor-based VM-execution controls",
        SecondaryControls,
        Field.SECONDARY_PROCESSOR_BASED_CONTROLS,
        Msr.IA32_VMX_PROCBASED_CTLS2,
        None,
        0,
        PrimaryControls.ACTIVATE_SECONDARY_CONTROLS,
    )
    TERTIARY = (
        "tertiary processor-based VM-execution controls",
        TertiaryControls,
        Field.TERTIARY_PROCESSOR_BASED_CONTROLS,
        Msr.IA32_VMX_PROCBASED_CTLS3,
        None,
        0,
        PrimaryControls.ACTIVATE_TERTIARY_CONTROLS,
    )
    EXIT = (
        "primary VM-exit controls",
        ExitControls,
        Field.EXIT_CONTROLS,
        Msr.IA32_VMX_EXIT_CTLS,
        Msr.IA32_VMX_TRUE_EXIT_CTLS,
        _bits((0, 8), 10, 11, 13, 14, 16, 17),
        None,
    )
    SECONDARY_EXIT = (
        "secondary VM-exit controls",
        SecondaryExitControls,
        Field.SECONDARY_EXIT_CONTROLS,
        Msr.IA32_VMX_EXIT_CTLS2,
        None,
        0,
        ExitControls.ACTIVATE_SECONDARY_CONTROLS,
    )
    ENTRY = (
        "VM-entry controls",
        EntryControls,
        Field.ENTRY_CONTROLS,
        Msr.IA32_VMX_ENTRY_CTLS,
        Msr.IA32_VMX_TRUE_ENTRY_CTLS,
        _bits((0, 8), 12),
        None,
    )

    @property
    def bits(self) -> int:
        """How wide the set is: 32, or 64 for the tertiary and the secondary VM-exit controls."""
        return self.field.bits

    @property
    def allowed1_only(self) -> bool:
        """Whether all 64 bits of `msr` are allowed 1-settings, so that any bit may be 0 (64-bit sets)."""
        return self.bits == 64

    @classmethod
    def of(cls, flag: BitFlags) -> ControlSet:
        """The set that a control flag belongs to; TypeError for any other kind of flag."""
        for member in cls:
            if type(flag) is member.flags:
                return member
        raise TypeError(f"{flag!r} is no VM-execution, VM-exit or VM-entry control")
