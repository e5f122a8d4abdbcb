"""The VMX capability MSRs one by one (SDM Vol. 3D, Appendix A), each a table of its fields.

What they say together, such as which controls a processor allows, is in `capabilities`.
"""

from __future__ import annotations

from typing import ClassVar

from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import ActivityState, MemoryType
from vmxlab.structures.register import Bit, Bits, Register


class VmxBasic(Register):
    """IA32_VMX_BASIC: the basics (SDM Vol. 3D, A.1).

    Bit 58 came with FRED, in editions later than the one this project cites.
    """

    __slots__ = ()
    MSR = Msr.IA32_VMX_BASIC

    VMX_MEMORY_TYPE_WRITE_BACK: ClassVar[int] = 6
    """What `mem_type` is on every processor so far: write-back. 0 would be uncacheable."""

    revision_id = Bits(30, 0, "VMCS revision identifier")
    region_size = Bits(44, 32, "size in bytes of the VMXON region and of a VMCS region")
    is_32bit_address = Bit(48, "VMX structures only below 4 GiB")
    dual_monitor = Bit(49, "dual-monitor treatment of SMIs and SMM")
    mem_type = Bits(53, 50, "memory type of the VMCS and of what it points to")
    io_exit_info = Bit(54, "VM-exit instruction information for INS and OUTS")
    vmx_flex_controls = Bit(55, "default1 controls that may be 0, and the TRUE capability MSRs")
    error_code_any_vector = Bit(
        56, "injecting a hardware exception with or without error code, whatever the vector"
    )
    nested_exception = Bit(58, "VMX nested-exception support")

    @property
    def memory_type(self) -> MemoryType | int:
        """`mem_type` by name, or the number where the manual has none."""
        return memory_type(self.mem_type)


class VmxMisc(Register):
    """IA32_VMX_MISC: miscellaneous data (SDM Vol. 3D, A.6)."""

    __slots__ = ()
    MSR = Msr.IA32_VMX_MISC

    preemption_timer_shift = Bits(4, 0, "TSC bit whose changes the VMX-preemption timer counts")
    stores_efer_lma = Bit(5, 'VM exits that store IA32_EFER.LMA into the "IA-32e mode guest" control')
    activity_hlt = Bit(6, "activity state HLT")
    activity_shutdown = Bit(7, "activity state shutdown")
    activity_wait_for_sipi = Bit(8, "activity state wait-for-SIPI")
    processor_trace = Bit(14, "Intel PT in VMX operation")
    rdmsr_smbase = Bit(15, "RDMSR of IA32_SMBASE in SMM")
    cr3_target_count = Bits(24, 16, "CR3-target values")
    max_msr_list = Bits(27, 25, "recommended length of MSR lists, as N of 512 * (N + 1)")
    smm_monitor_vmxoff = Bit(28, "IA32_SMM_MONITOR_CTL[2], by which VMXOFF leaves SMIs blocked or not")
    vmwrite_any_field = Bit(29, "VMWRITE to any field, VM-exit information included")
    zero_length_injection = Bit(30, "injecting a software event with instruction length 0")
    mseg_revision_id = Bits(63, 32, "MSEG revision identifier")

    @property
    def preemption_timer_tsc_ticks(self) -> int:
        """TSC ticks for each count of the VMX-preemption timer: 2**preemption_timer_shift."""
        return 1 << self.preemption_timer_shift

    @property
    def recommended_msr_count(self) -> int:
        """How many MSRs a VM-entry or VM-exit list should have at most: 512 * (N + 1)."""
        return 512 * (self.max_msr_list + 1)

    @property
    def activity_states(self) -> frozenset[ActivityState]:
        """The activity states a VM entry may establish; active always."""
        return frozenset(
            state for state in ActivityState if state is ActivityState.ACTIVE or self.raw >> (5 + state) & 1
        )


class VmcsEnum(Register):
    """IA32_VMX_VMCS_ENUM: the highest index of any VMCS field (SDM Vol. 3D, A.9)."""

    __slots__ = ()
    MSR = Msr.IA32_VMX_VMCS_ENUM

    highest_index = Bits(9, 1, "highest index of a VMCS field encoding")


class EptVpidCap(Register):
    """IA32_VMX_EPT_VPID_CAP: what EPT, INVEPT and INVVPID can do (SDM Vol. 3D, A.10)."""

    __slots__ = ()
    MSR = Msr.IA32_VMX_EPT_VPID_CAP

    execute_only = Bit(0, "execute-only translations by EPT")
    page_walk_length_4 = Bit(6, "EPT page-walk length 4")
    page_walk_length_5 = Bit(7, "EPT page-walk length 5")
    memory_type_uc = Bit(8, "memory type UC for the EPT paging structures")
    memory_type_wb = Bit(14, "memory type WB for the EPT paging structures")
    page_2m = Bit(16, "EPT pages of 2 MiB")
    page_1g = Bit(17, "EPT pages of 1 GiB")
    invept = Bit(20, "INVEPT")
    accessed_dirty = Bit(21, "accessed and dirty flags for EPT")
    advanced_exit_information = Bit(22, "advanced VM-exit information for EPT violations")
    supervisor_shadow_stack = Bit(23, "supervisor shadow-stack control by EPT")
    invept_single_context = Bit(25, "INVEPT type 1, single-context")
    invept_all_context = Bit(26, "INVEPT type 2, all-context")
    invvpid = Bit(32, "INVVPID")
    invvpid_individual_address = Bit(40, "INVVPID type 0, individual-address")
    invvpid_single_context = Bit(41, "INVVPID type 1, single-context")
    invvpid_all_context = Bit(42, "INVVPID type 2, all-context")
    invvpid_single_context_retaining_globals = Bit(43, "INVVPID type 3, single-context retaining globals")
    max_hlat_prefix_size = Bits(53, 48, "HLAT prefix")


class VmFunc(Register):
    """IA32_VMX_VMFUNC: the VM functions that may be enabled (SDM Vol. 3D, A.11)."""

    __slots__ = ()
    MSR = Msr.IA32_VMX_VMFUNC

    eptp_switching = Bit(0, "VM function 0, EPTP switching")

    def allows(self, function: int) -> bool:
        """Whether the bit of this VM function (0 to 63) may be 1 in the VM-function controls."""
        return 0 <= function < 64 and bool(self.raw >> function & 1)


def memory_type(value: int) -> MemoryType | int:
    """A memory type by name, or the number where the manual has none (2, 3, 7 and up)."""
    try:
        return MemoryType(value)
    except ValueError:
        return value
