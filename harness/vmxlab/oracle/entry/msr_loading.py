"""Loading of MSRs on VM entry (SDM Vol. 3C, 27.4): each entry of the VM-entry MSR-load area.

What WRMSR would refuse depends on the MSR and on the processor. Known here are MSRs that take any value, that
take canonical addresses or memory types, that have reserved bits on every processor, and that are read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vmxlab.oracle.entry import reserved
from vmxlab.oracle.entry.addresses import MSR_ENTRY_BYTES
from vmxlab.oracle.entry.rule import Area, NotChecked, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import EntryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, EFER

TABLE = RuleTable(Area.MSR_LOADING, "27.4")
rule = TABLE.rule

_FIELDS = (Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT)
_X2APIC = range(0x800, 0x900)
_CAPABILITY_MSRS = range(Msr.IA32_VMX_BASIC, Msr.IA32_VMX_EXIT_CTLS2 + 1)
_SHADOW_STACK_POINTERS = range(Msr.IA32_PL0_SSP, Msr.IA32_PL3_SSP + 1)
_MOST_ENTRIES = 4096
"""So many does the largest IA32_VMX_MISC[27:25] recommend; with more the behaviour is undefined (A.6)."""


def _entries(vmcs: Vmcs) -> Iterator[tuple[int, int, int]]:
    """MSR, reserved half and value of each entry; what goes wrong meanwhile is about that entry."""
    count = vmcs[Field.ENTRY_MSR_LOAD_COUNT]
    if count > _MOST_ENTRIES:
        raise NotChecked(f"{count} entries are more than any processor recommends")
    for number in range(count):
        vmcs.msr_entry = number + 1
        at = vmcs[Field.ENTRY_MSR_LOAD_ADDRESS] + number * MSR_ENTRY_BYTES
        vmcs.msr_loaded = vmcs.read(at, 4)
        yield vmcs.msr_loaded, vmcs.read(at + 4, 4), vmcs.read(at + 8, 8)


@rule(*_FIELDS)
def loaded_msr_reserved(vmcs: Vmcs) -> bool:
    """Bits 63:32 of an entry are 0."""
    return all(not upper for _, upper, _ in _entries(vmcs))


@rule(*_FIELDS)
def loaded_msr_is_no_segment_base(vmcs: Vmcs) -> bool:
    """No entry loads IA32_FS_BASE or IA32_GS_BASE."""
    return all(msr not in (Msr.IA32_FS_BASE, Msr.IA32_GS_BASE) for msr, _, _ in _entries(vmcs))


@rule(*_FIELDS)
def loaded_msr_is_no_x2apic_msr(vmcs: Vmcs) -> bool:
    """No entry loads an MSR in the range 800H to 8FFH (that of x2APIC mode)."""
    return all(msr not in _X2APIC for msr, _, _ in _entries(vmcs))


@rule(*_FIELDS)
def loaded_msr_is_no_smm_msr(vmcs: Vmcs) -> bool:
    """Outside of SMM no entry loads IA32_SMM_MONITOR_CTL, which can be written in SMM only."""
    if vmcs.environment.in_smm:
        return True
    return all(msr != Msr.IA32_SMM_MONITOR_CTL for msr, _, _ in _entries(vmcs))


@rule(*_FIELDS, Field.GUEST_CR0, Field.GUEST_IA32_EFER)
def loaded_msr_takes_its_value(vmcs: Vmcs) -> bool:
    """WRMSR in ring 0 would take each entry's value for its MSR."""
    for msr, upper, value in _entries(vmcs):
        if upper or msr in _BY_OTHER_RULES or msr in _X2APIC:
            return True  # the other rules: nothing behind this entry is loaded
        if not _takes(vmcs, msr, value):
            return False
    return True


_BY_OTHER_RULES = (Msr.IA32_FS_BASE, Msr.IA32_GS_BASE, Msr.IA32_SMM_MONITOR_CTL)


def _takes(vmcs: Vmcs, msr: int, value: int) -> bool:
    """Whether WRMSR would not be #GP(0) (Vol. 4, ch. 2). NotChecked where that is the processor's matter."""
    if msr in _CAPABILITY_MSRS or msr in _READ_ONLY:
        return False
    if msr in _TAKES:
        return _TAKES[msr](vmcs, value)
    if msr in _SHADOW_STACK_POINTERS and (value & 3 or not vmcs.canonical(value)):
        return False
    raise NotChecked(f"whether WRMSR would take {value:#x} for MSR {msr:#x} is not known")


def _efer(vmcs: Vmcs, value: int) -> bool:
    """Reserved bits; and with paging, LME can't be changed (LMA is ignored, Vol. 3A, 2.2.1)."""
    if value & ~int(reserved.EFER_DEFINED):
        return False
    if not vmcs[Field.GUEST_CR0] & CR0.PG:
        return True
    if vmcs.on(EntryControls.LOAD_IA32_EFER):
        lme = bool(vmcs[Field.GUEST_IA32_EFER] & EFER.LME)
    else:
        lme = vmcs.ia32e
    return bool(value & EFER.LME) == lme


def _lower_half(vmcs: Vmcs, value: int) -> bool:
    return not value >> 32


def _canonical(vmcs: Vmcs, value: int) -> bool:
    return vmcs.canonical(value)


_READ_ONLY = frozenset({Msr.IA32_MTRRCAP, Msr.IA32_MCG_CAP})
_TAKES: Mapping[int, Callable[[Vmcs, int], bool]] = {
    Msr.IA32_TSC: lambda vmcs, value: True,
    Msr.IA32_STAR: lambda vmcs, value: True,
    Msr.IA32_PAT: lambda vmcs, value: reserved.PAT_TYPES.issuperset(value.to_bytes(8, "little")),
    Msr.IA32_EFER: _efer,
    Msr.IA32_DEBUGCTL: lambda vmcs, value: reserved.debugctl_holds(value),
    Msr.IA32_TSC_AUX: _lower_half,
    **dict.fromkeys(
        (
            Msr.IA32_LSTAR,
            Msr.IA32_CSTAR,
            Msr.IA32_KERNEL_GS_BASE,
            Msr.IA32_SYSENTER_ESP,
            Msr.IA32_SYSENTER_EIP,
            Msr.IA32_DS_AREA,
        ),
        _canonical,
    ),
}
