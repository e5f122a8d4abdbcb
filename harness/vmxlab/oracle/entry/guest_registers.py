"""Checks on guest control registers, debug registers and MSRs (SDM Vol. 3C, 27.3.1.1)."""

from __future__ import annotations

from vmxlab.oracle.entry import reserved
from vmxlab.oracle.entry.rule import Area, NotChecked, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import EntryControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, CR4, EFER

TABLE = RuleTable(Area.GUEST_STATE, "27.3.1.1")
rule = TABLE.rule

_Entry = EntryControls
# A VM entry does not change these two bits of CR0, so they are never checked.
_UNCHANGED = CR0.NW | CR0.CD
_BNDCFGS_RESERVED = 0xFFC


def _wrong_cr0(vmcs: Vmcs) -> str:
    free = _UNCHANGED
    if vmcs.on(SecondaryControls.UNRESTRICTED_GUEST):
        free |= CR0.PE | CR0.PG
    return reserved.wrong_cr0(vmcs, Field.GUEST_CR0, int(free))


def _wrong_cr4(vmcs: Vmcs) -> str:
    return reserved.wrong_cr4(vmcs, Field.GUEST_CR4)


@rule(Field.GUEST_CR0, detail=_wrong_cr0)
def guest_cr0_fixed(vmcs: Vmcs) -> bool:
    """CR0 has only bits that VMX operation supports: IA32_VMX_CR0_FIXED0 and _FIXED1, but for NW and CD; PE
    and PG are free for an unrestricted guest.
    """
    return not _wrong_cr0(vmcs)


@rule(Field.GUEST_CR0)
def guest_paging_needs_protection(vmcs: Vmcs) -> bool:
    """Where CR0.PG is 1, CR0.PE is 1."""
    value = vmcs[Field.GUEST_CR0]
    return not value & CR0.PG or bool(value & CR0.PE)


@rule(Field.GUEST_CR4, detail=_wrong_cr4)
def guest_cr4_fixed(vmcs: Vmcs) -> bool:
    """CR4 has only bits that VMX operation supports: IA32_VMX_CR4_FIXED0 and _FIXED1."""
    return not _wrong_cr4(vmcs)


@rule(Field.GUEST_CR4, Field.GUEST_CR0)
def guest_cet_needs_wp(vmcs: Vmcs) -> bool:
    """Where CR4.CET is 1, CR0.WP is 1."""
    return not vmcs[Field.GUEST_CR4] & CR4.CET or bool(vmcs[Field.GUEST_CR0] & CR0.WP)


reserved.debugctl(TABLE, Field.GUEST_IA32_DEBUGCTL, [_Entry.LOAD_DEBUG_CONTROLS])


@rule(Field.GUEST_CR0, when=[_Entry.IA32E_MODE_GUEST])
def ia32e_mode_guest_needs_paging(vmcs: Vmcs) -> bool:
    """In IA-32e mode CR0.PG is 1."""
    return bool(vmcs[Field.GUEST_CR0] & CR0.PG)


@rule(Field.GUEST_CR4, when=[_Entry.IA32E_MODE_GUEST])
def ia32e_mode_guest_needs_pae(vmcs: Vmcs) -> bool:
    """In IA-32e mode CR4.PAE is 1."""
    return bool(vmcs[Field.GUEST_CR4] & CR4.PAE)


@rule(Field.GUEST_CR4, unless=[_Entry.IA32E_MODE_GUEST])
def guest_pcide_needs_ia32e_mode(vmcs: Vmcs) -> bool:
    """Outside of IA-32e mode CR4.PCIDE is 0."""
    return not vmcs[Field.GUEST_CR4] & CR4.PCIDE


@rule(Field.GUEST_CR3)
def guest_cr3_width(vmcs: Vmcs) -> bool:
    """CR3 sets no bit beyond the physical-address width."""
    return not vmcs[Field.GUEST_CR3] >> (vmcs.environment.maxphyaddr or vmcs.physical_width)


@rule(Field.GUEST_DR7, when=[_Entry.LOAD_DEBUG_CONTROLS])
def guest_dr7_upper_half(vmcs: Vmcs) -> bool:
    """Bits 63:32 of DR7 are 0."""
    return not vmcs[Field.GUEST_DR7] >> 32


for _name in ("ESP", "EIP"):
    reserved.canonical_address(
        TABLE, Field[f"GUEST_IA32_SYSENTER_{_name}"], f"IA32_SYSENTER_{_name} of the guest"
    )
reserved.cet(TABLE, Field.GUEST_IA32_S_CET, [_Entry.LOAD_CET_STATE])
reserved.canonical_address(
    TABLE,
    Field.GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR,
    "IA32_INTERRUPT_SSP_TABLE_ADDR of the guest",
    when=[_Entry.LOAD_CET_STATE],
)
reserved.perf_global_ctrl(TABLE, Field.GUEST_IA32_PERF_GLOBAL_CTRL, [_Entry.LOAD_IA32_PERF_GLOBAL_CTRL])
reserved.pat(TABLE, Field.GUEST_IA32_PAT, [_Entry.LOAD_IA32_PAT])
reserved.efer_reserved(TABLE, Field.GUEST_IA32_EFER, [_Entry.LOAD_IA32_EFER])


@rule(Field.GUEST_IA32_EFER, when=[_Entry.LOAD_IA32_EFER])
def guest_efer_lma(vmcs: Vmcs) -> bool:
    """IA32_EFER.LMA is what "IA-32e mode guest" is."""
    return bool(vmcs[Field.GUEST_IA32_EFER] & EFER.LMA) == vmcs.ia32e


@rule(Field.GUEST_IA32_EFER, Field.GUEST_CR0, when=[_Entry.LOAD_IA32_EFER])
def guest_efer_lme(vmcs: Vmcs) -> bool:
    """Where CR0.PG is 1, IA32_EFER.LME is what IA32_EFER.LMA is."""
    efer = vmcs[Field.GUEST_IA32_EFER]
    paging = vmcs[Field.GUEST_CR0] & CR0.PG
    return not paging or bool(efer & EFER.LME) == bool(efer & EFER.LMA)


@rule(Field.GUEST_IA32_BNDCFGS, when=[_Entry.LOAD_IA32_BNDCFGS])
def guest_bndcfgs_reserved(vmcs: Vmcs) -> bool:
    """Bits 11:2 of IA32_BNDCFGS are 0."""
    return not vmcs[Field.GUEST_IA32_BNDCFGS] & _BNDCFGS_RESERVED


@rule(Field.GUEST_IA32_BNDCFGS, when=[_Entry.LOAD_IA32_BNDCFGS])
def guest_bndcfgs_canonical(vmcs: Vmcs) -> bool:
    """The address in bits 63:12 of IA32_BNDCFGS is canonical."""
    return vmcs.canonical(vmcs[Field.GUEST_IA32_BNDCFGS] & ~0xFFF)


def _by_processor(field: Field, what: str, control: EntryControls) -> None:
    def holds(vmcs: Vmcs) -> bool:
        if vmcs[field]:
            raise NotChecked(f"which bits of {what} the processor has (by CPUID) is not known")
        return True

    TABLE.add(
        f"{field.name.lower().replace('_', '-')}-reserved",
        f"Bits reserved in {what} are 0.",
        holds,
        [field],
        when=[control],
    )


_by_processor(Field.GUEST_IA32_RTIT_CTL, "IA32_RTIT_CTL", _Entry.LOAD_IA32_RTIT_CTL)
_by_processor(Field.GUEST_IA32_LBR_CTL, "IA32_LBR_CTL", _Entry.LOAD_GUEST_IA32_LBR_CTL)


@rule(Field.GUEST_IA32_PKRS, when=[_Entry.LOAD_PKRS])
def guest_pkrs_reserved(vmcs: Vmcs) -> bool:
    """Bits 63:32 of IA32_PKRS are 0."""
    return not vmcs[Field.GUEST_IA32_PKRS] >> 32


@rule(Field.GUEST_UINV, when=[_Entry.LOAD_UINV])
def guest_uinv_reserved(vmcs: Vmcs) -> bool:
    """Bits 15:8 of UINV are 0."""
    return not vmcs[Field.GUEST_UINV] >> 8
