"""A VMCS as the oracle sees it: which fields the processor has, and what is known of their values.

SDM Vol. 3D, Appendix B (the footnotes of its tables say on which control a field depends); Vol. 3C, 25.11.2
(widths and halves of fields).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell
from vmxlab.sdm.controls import (
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    TertiaryControls,
)
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.flags import BitFlags
from vmxlab.structures import Capabilities

_S, _P, _T = SecondaryControls, PrimaryControls, TertiaryControls

# Appendix B: a field exists on processors that allow the 1-setting of one of these controls.
EXISTS_WITH: dict[Field, tuple[BitFlags, ...]] = {
    Field.VPID: (_S.ENABLE_VPID,),
    Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR: (PinControls.PROCESS_POSTED_INTERRUPTS,),
    Field.EPTP_INDEX: (_S.EPT_VIOLATION_VE,),
    Field.GUEST_INTERRUPT_STATUS: (_S.VIRTUAL_INTERRUPT_DELIVERY,),
    Field.PML_INDEX: (_S.ENABLE_PML,),
    Field.MSR_BITMAP: (_P.USE_MSR_BITMAPS,),
    Field.PML_ADDRESS: (_S.ENABLE_PML,),
    Field.VIRTUAL_APIC_ADDRESS: (_P.USE_TPR_SHADOW,),
    Field.APIC_ACCESS_ADDRESS: (_S.VIRTUALIZE_APIC_ACCESSES,),
    Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: (PinControls.PROCESS_POSTED_INTERRUPTS,),
    Field.VM_FUNCTION_CONTROLS: (_S.ENABLE_VM_FUNCTIONS,),
    Field.EPT_POINTER: (_S.ENABLE_EPT,),
    Field.EOI_EXIT_BITMAP_0: (_S.VIRTUAL_INTERRUPT_DELIVERY,),
    Field.EOI_EXIT_BITMAP_1: (_S.VIRTUAL_INTERRUPT_DELIVERY,),
    Field.EOI_EXIT_BITMAP_2: (_S.VIRTUAL_INTERRUPT_DELIVERY,),
    Field.EOI_EXIT_BITMAP_3: (_S.VIRTUAL_INTERRUPT_DELIVERY,),
    Field.VMREAD_BITMAP: (_S.VMCS_SHADOWING,),
    Field.VMWRITE_BITMAP: (_S.VMCS_SHADOWING,),
    Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: (_S.EPT_VIOLATION_VE,),
    Field.XSS_EXITING_BITMAP: (_S.ENABLE_XSAVES,),
    Field.ENCLS_EXITING_BITMAP: (_S.ENABLE_ENCLS_EXITING,),
    Field.ENCLV_EXITING_BITMAP: (_S.ENABLE_ENCLV_EXITING,),
    Field.SUB_PAGE_PERMISSION_TABLE_POINTER: (_S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,),
    Field.TSC_MULTIPLIER: (_S.USE_TSC_SCALING,),
    Field.TERTIARY_PROCESSOR_BASED_CONTROLS: (_P.ACTIVATE_TERTIARY_CONTROLS,),
    Field.SECONDARY_PROCESSOR_BASED_CONTROLS: (_P.ACTIVATE_SECONDARY_CONTROLS,),
    Field.SECONDARY_EXIT_CONTROLS: (ExitControls.ACTIVATE_SECONDARY_CONTROLS,),
    Field.GUEST_PHYSICAL_ADDRESS: (_S.ENABLE_EPT,),
    Field.GUEST_PDPTE0: (_S.ENABLE_EPT,),
    Field.GUEST_PDPTE1: (_S.ENABLE_EPT,),
    Field.GUEST_PDPTE2: (_S.ENABLE_EPT,),
    Field.GUEST_PDPTE3: (_S.ENABLE_EPT,),
    Field.GUEST_IA32_PAT: (EntryControls.LOAD_IA32_PAT, ExitControls.SAVE_IA32_PAT),
    Field.GUEST_IA32_EFER: (EntryControls.LOAD_IA32_EFER, ExitControls.SAVE_IA32_EFER),
    Field.GUEST_IA32_PERF_GLOBAL_CTRL: (EntryControls.LOAD_IA32_PERF_GLOBAL_CTRL,),
    Field.GUEST_IA32_BNDCFGS: (EntryControls.LOAD_IA32_BNDCFGS, ExitControls.CLEAR_IA32_BNDCFGS),
    Field.GUEST_IA32_RTIT_CTL: (EntryControls.LOAD_IA32_RTIT_CTL, ExitControls.CLEAR_IA32_RTIT_CTL),
    Field.GUEST_IA32_LBR_CTL: (EntryControls.LOAD_GUEST_IA32_LBR_CTL,),
    Field.GUEST_IA32_PKRS: (EntryControls.LOAD_PKRS,),
    Field.GUEST_IA32_S_CET: (EntryControls.LOAD_CET_STATE,),
    Field.GUEST_SSP: (EntryControls.LOAD_CET_STATE,),
    Field.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR: (EntryControls.LOAD_CET_STATE,),
    Field.HOST_IA32_PAT: (ExitControls.LOAD_IA32_PAT,),
    Field.HOST_IA32_EFER: (ExitControls.LOAD_IA32_EFER,),
    Field.HOST_IA32_PERF_GLOBAL_CTRL: (ExitControls.LOAD_IA32_PERF_GLOBAL_CTRL,),
    Field.HOST_IA32_PKRS: (ExitControls.LOAD_PKRS,),
    Field.HOST_IA32_S_CET: (ExitControls.LOAD_CET_STATE,),
    Field.HOST_SSP: (ExitControls.LOAD_CET_STATE,),
    Field.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR: (ExitControls.LOAD_CET_STATE,),
    Field.TPR_THRESHOLD: (_P.USE_TPR_SHADOW,),
    Field.PLE_GAP: (_S.PAUSE_LOOP_EXITING,),
    Field.PLE_WINDOW: (_S.PAUSE_LOOP_EXITING,),
    Field.INSTRUCTION_TIMEOUT_CONTROL: (_S.INSTRUCTION_TIMEOUT,),
    Field.VMX_PREEMPTION_TIMER_VALUE: (PinControls.ACTIVATE_PREEMPTION_TIMER,),
    Field.HLAT_POINTER: (_T.ENABLE_HLAT,),
    Field.HLAT_PREFIX_SIZE: (_T.ENABLE_HLAT,),
    Field.PID_POINTER_TABLE_ADDRESS: (_T.IPI_VIRTUALIZATION,),
    Field.LAST_PID_POINTER_INDEX: (_T.IPI_VIRTUALIZATION,),
}

# Fields whose existence the capability MSRs do not tell, or that a later edition defines.
_UNSURE = frozenset(
    f
    for f in Field
    if "FRED" in f.name
    or "PASID" in f.name
    or f.name
    in (
        "SHARED_EPT_POINTER",
        "PCONFIG_EXITING_BITMAP",
        "IA32_SPEC_CTRL_MASK",
        "IA32_SPEC_CTRL_SHADOW",
        "INJECTED_EVENT_DATA",
        "ORIGINAL_EVENT_DATA",
        "MSR_DATA",
        "SEAM_GUEST_KEYID",
        "GUEST_UINV",
    )
)
_CR3_TARGETS = (
    Field.CR3_TARGET_VALUE_0,
    Field.CR3_TARGET_VALUE_1,
    Field.CR3_TARGET_VALUE_2,
    Field.CR3_TARGET_VALUE_3,
)


def full_encoding(encoding: int) -> int:
    """The encoding of the whole field: of a 64-bit one without bit 0, which asks for its upper half."""
    return encoding & ~1


def field_of(encoding: int) -> Field | None:
    """The field that an encoding names; None where Appendix B has none."""
    try:
        found = Field(full_encoding(encoding))
    except ValueError:
        return None
    return None if encoding & 1 and found.bits != 64 else found


def exists(encoding: int, capabilities: Capabilities) -> bool:
    """Whether the processor has the field that VMREAD and VMWRITE name so. Raises CannotTell.

    An encoding that no table of Appendix B has may belong to a later processor's field.
    """
    found = field_of(encoding)
    if encoding & 1 and found is not None and found.width != 1:
        return False
    if found is None:
        return _unlisted(encoding, capabilities)
    if found is Field.EPTP_LIST_ADDRESS:
        return bool(capabilities.vmfunc.eptp_switching)
    if found in _UNSURE:
        raise CannotTell(f"whether the processor has the VMCS field {found.name}")
    if found in _CR3_TARGETS:
        return _CR3_TARGETS.index(found) < capabilities.misc.cr3_target_count
    needed = EXISTS_WITH.get(found)
    return needed is None or any(capabilities.supports(flag) for flag in needed)


def _unlisted(encoding: int, capabilities: Capabilities) -> bool:
    # Reserved bits (31:15 and 12) make an encoding that no field can have (25.11.2, table 25-21); so does an
    # index beyond IA32_VMX_VMCS_ENUM (A.9).
    if encoding & ~0x6FFF or encoding >> 1 & 0x1FF > capabilities.vmcs_enum.highest_index:
        return False
    raise CannotTell(f"whether the processor has a VMCS field {encoding:#x}")


def is_read_only(encoding: int) -> bool:
    """Whether it is a VM-exit information field (25.11.2, bits 11:10)."""
    return encoding >> 10 & 3 == FieldType.EXIT_INFORMATION


@dataclass(slots=True)
class ModelVmcs:
    """One VMCS: launch state, and the fields as far as they are known.

    What was never written is not known: VMCLEAR leaves implementation-specific values (25.11.3).
    """

    capabilities: Capabilities
    launched: bool = False
    shadow: bool = False
    values: dict[Field, Bits] = field(default_factory=dict)

    def read(self, encoding: int) -> Bits:
        """What VMREAD gives for a field that exists."""
        found = field_of(encoding)
        assert found is not None
        value = self.values.get(found, NOTHING_KNOWN)
        mask = (1 << found.bits) - 1
        if encoding & 1:
            return Bits(value.value >> 32 & 0xFFFF_FFFF, value.known >> 32 | ~0xFFFF_FFFF & (1 << 64) - 1)
        return Bits(value.value & mask, value.known | ~mask & (1 << 64) - 1)

    def write(self, encoding: int, value: int) -> None:
        """What VMWRITE does to a field that exists: bits beyond its width are ignored (31.3)."""
        found = field_of(encoding)
        assert found is not None
        if encoding & 1:
            upper = Bits((value & 0xFFFF_FFFF) << 32, 0xFFFF_FFFF << 32)
            self.values[found] = self.values.get(found, NOTHING_KNOWN).with_bits(0xFFFF_FFFF << 32, upper)
            return
        self.values[found] = Bits(value & (1 << found.bits) - 1)

    def put(self, where: Field, value: int | Bits) -> None:
        """What the processor itself stores in a field."""
        self.values[where] = value if isinstance(value, Bits) else Bits(value)

    def get(self, where: Field) -> int:
        """A field's value. Raises CannotTell where not all of it is known."""
        value = self.values.get(where, NOTHING_KNOWN)
        if not value.knows((1 << where.bits) - 1):
            raise CannotTell(f"{where.name} was not written, or holds what is not known")
        return value.value

    def get_or(self, where: Field, default: int) -> int:
        """A field's value, or `default` on a processor that does not have it."""
        return self.get(where) if exists(where, self.capabilities) else default

    def has(self, where: Field) -> bool:
        """Whether the field exists, as far as it can be told."""
        try:
            return exists(where, self.capabilities)
        except CannotTell:
            return False

    def secondary(self) -> int:
        """The secondary controls in effect: 0 where they are not activated (25.6.2)."""
        active = self.get(Field.PRIMARY_PROCESSOR_BASED_CONTROLS) & _P.ACTIVATE_SECONDARY_CONTROLS
        return self.get(Field.SECONDARY_PROCESSOR_BASED_CONTROLS) if active else 0

    def tertiary(self) -> int:
        """The tertiary controls in effect."""
        active = self.get(Field.PRIMARY_PROCESSOR_BASED_CONTROLS) & _P.ACTIVATE_TERTIARY_CONTROLS
        return self.get(Field.TERTIARY_PROCESSOR_BASED_CONTROLS) if active else 0
