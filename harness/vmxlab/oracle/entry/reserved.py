"""Rules about reserved bits: controls by the capability MSRs, and MSRs whose fields are loaded."""

from __future__ import annotations

from collections.abc import Iterable

from vmxlab.oracle.entry.rule import NotChecked, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import EFER
from vmxlab.structures import ControlCapability

EFER_DEFINED = EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE
PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})

# IA32_DEBUGCTL (Vol. 4, Table 2-2): bits 63:16 and 5:3 are reserved on all processors; 2 and 15:6 on some.
_DEBUGCTL_RESERVED = ~0xFFC7
_DEBUGCTL_SOMETIMES = 0xFFC4
# IA32_PERF_GLOBAL_CTRL: how many counters there are CPUID leaf 0AH says; 63:49 and 47:40 are none.
_PERF_RESERVED = ~((1 << 48) | ((1 << 40) - 1))
# IA32_S_CET and IA32_U_CET (Vol. 1, 17.2): 9:6 are reserved.
_CET_RESERVED = 0x3C0
_CET_SUPPRESS, _CET_TRACKER = 1 << 10, 1 << 11


def reserved_controls(table: RuleTable, controls: ControlSet) -> None:
    """The rule that a set of controls has only values that its capability MSR allows."""

    def capability(vmcs: Vmcs) -> ControlCapability:
        return vmcs.capability(lambda: vmcs.capabilities.control(controls))

    table.add(
        f"{controls.field.name.lower().replace('_', '-')}-reserved",
        f"Each of the {controls.value} has a setting that {controls.msr.name}"
        f"{f' ({controls.true_msr.name})' if controls.true_msr else ''} allows.",
        lambda vmcs: capability(vmcs).allows(vmcs.controls(controls)),
        [controls.field],
        when=[] if controls.activated_by is None else [controls.activated_by],
        detail=lambda vmcs: wrong_bits(capability(vmcs), vmcs.controls(controls)),
    )


def wrong_cr0(vmcs: Vmcs, field: Field, free: int) -> str:
    """The bits of CR0 but `free` that VMX operation does not support, by name; "" where there are none."""
    return wrong_bits(vmcs.capability(lambda: vmcs.capabilities.cr0), vmcs[field], free)


def wrong_cr4(vmcs: Vmcs, field: Field) -> str:
    """The bits of CR4 that VMX operation does not support, by name; "" where there are none."""
    return wrong_bits(vmcs.capability(lambda: vmcs.capabilities.cr4), vmcs[field])


def wrong_bits(capability: ControlCapability, value: int, free: int = 0) -> str:
    """Each bit that the capability does not allow, by name; `free` are bits that it is not asked about."""
    return "; ".join(item.rule for item in capability.check(value & ~free | capability.adjust(value) & free))


def efer_reserved(table: RuleTable, field: Field, when: Iterable[BitFlags]) -> None:
    """Bits reserved in IA32_EFER are 0."""
    table.add(
        f"{field.name.lower().replace('_', '-')}-reserved",
        "Bits reserved in IA32_EFER (63:12, 9 and 7:1) are 0.",
        lambda vmcs: not vmcs[field] & ~int(EFER_DEFINED),
        [field],
        when=when,
    )


def pat(table: RuleTable, field: Field, when: Iterable[BitFlags]) -> None:
    """The value is one that WRMSR would take for IA32_PAT."""
    table.add(
        f"{field.name.lower().replace('_', '-')}-types",
        "Each of the 8 bytes of IA32_PAT is 0 (UC), 1 (WC), 4 (WT), 5 (WP), 6 (WB) or 7 (UC-).",
        lambda vmcs: PAT_TYPES.issuperset(vmcs[field].to_bytes(8, "little")),
        [field],
        when=when,
    )


def perf_global_ctrl(table: RuleTable, field: Field, when: Iterable[BitFlags]) -> None:
    """Bits reserved in IA32_PERF_GLOBAL_CTRL are 0; which those are, the processor says."""

    def holds(vmcs: Vmcs) -> bool:
        value = vmcs[field]
        if value & _PERF_RESERVED or not value:
            return not value
        raise NotChecked("how many performance counters there are (CPUID leaf 0AH) is not known")

    table.add(
        f"{field.name.lower().replace('_', '-')}-reserved",
        "Bits reserved in IA32_PERF_GLOBAL_CTRL are 0.",
        holds,
        [field],
        when=when,
    )


def debugctl(table: RuleTable, field: Field, when: Iterable[BitFlags]) -> None:
    """Bits reserved in IA32_DEBUGCTL are 0; some of them are the processor's own matter."""

    table.add(
        f"{field.name.lower().replace('_', '-')}-reserved",
        "Bits reserved in IA32_DEBUGCTL are 0.",
        lambda vmcs: debugctl_holds(vmcs[field]),
        [field],
        when=when,
    )


def debugctl_holds(value: int) -> bool:
    """Whether a value sets no reserved bit. NotChecked for bits that some processors have."""
    if value & _DEBUGCTL_RESERVED:
        return False
    if value & _DEBUGCTL_SOMETIMES:
        raise NotChecked(
            f"whether the processor has bits {value & _DEBUGCTL_SOMETIMES:#x} of IA32_DEBUGCTL is not known"
        )
    return True


def cet(table: RuleTable, field: Field, when: Iterable[BitFlags]) -> None:
    """IA32_S_CET: reserved bits, and SUPPRESS with TRACKER."""

    def reserved(vmcs: Vmcs) -> bool:
        return not vmcs[field] & _CET_RESERVED

    def tracker(vmcs: Vmcs) -> bool:
        both = _CET_SUPPRESS | _CET_TRACKER
        return vmcs[field] & both != both

    def canonical(vmcs: Vmcs) -> bool:
        return vmcs.canonical(vmcs[field])

    name = field.name.lower().replace("_", "-")
    for suffix, sentence, holds in (
        ("reserved", "Bits 9:6 of IA32_S_CET are 0.", reserved),
        ("tracker", "Bits 10 (SUPPRESS) and 11 (TRACKER) of IA32_S_CET are not both 1.", tracker),
        ("canonical", "IA32_S_CET is canonical: its bits 63:12 are the legacy bitmap's address.", canonical),
    ):
        table.add(f"{name}-{suffix}", sentence, holds, [field], when=when)


def canonical_address(
    table: RuleTable, field: Field, what: str, when: Iterable[BitFlags] = (), unless: Iterable[BitFlags] = ()
) -> None:
    """The field holds a canonical address."""
    table.add(
        f"{field.name.lower().replace('_', '-')}-canonical",
        f"{what} is a canonical address.",
        lambda vmcs: vmcs.canonical(vmcs[field]),
        [field],
        when=when,
        unless=unless,
    )
