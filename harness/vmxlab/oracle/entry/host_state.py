"""Checks on the host-state area (SDM Vol. 3C, 27.2.2 to 27.2.4)."""

from __future__ import annotations

from vmxlab.oracle.entry import reserved
from vmxlab.oracle.entry.rule import Area, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import EntryControls, ExitControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, CR4, EFER

REGISTERS = RuleTable(Area.HOST_STATE, "27.2.2")
SEGMENTS = RuleTable(Area.HOST_STATE, "27.2.3")
ADDRESS_SPACE = RuleTable(Area.HOST_STATE, "27.2.4")
TABLES = (REGISTERS, SEGMENTS, ADDRESS_SPACE)

_Exit = ExitControls
_SELECTORS = ("ES", "CS", "SS", "DS", "FS", "GS", "TR")
# A VM exit does not change these two bits of CR0, so they are never checked.
_UNCHANGED = CR0.NW | CR0.CD


def _wrong_cr0(vmcs: Vmcs) -> str:
    return reserved.wrong_cr0(vmcs, Field.HOST_CR0, int(_UNCHANGED))


def _wrong_cr4(vmcs: Vmcs) -> str:
    return reserved.wrong_cr4(vmcs, Field.HOST_CR4)


@REGISTERS.rule(Field.HOST_CR0, detail=_wrong_cr0)
def host_cr0_fixed(vmcs: Vmcs) -> bool:
    """CR0 has only bits that VMX operation supports: IA32_VMX_CR0_FIXED0 and _FIXED1, but for NW and CD."""
    return not _wrong_cr0(vmcs)


@REGISTERS.rule(Field.HOST_CR4, detail=_wrong_cr4)
def host_cr4_fixed(vmcs: Vmcs) -> bool:
    """CR4 has only bits that VMX operation supports: IA32_VMX_CR4_FIXED0 and _FIXED1."""
    return not _wrong_cr4(vmcs)


@REGISTERS.rule(Field.HOST_CR4, Field.HOST_CR0)
def host_cet_needs_wp(vmcs: Vmcs) -> bool:
    """Where CR4.CET is 1, CR0.WP is 1."""
    return not vmcs[Field.HOST_CR4] & CR4.CET or bool(vmcs[Field.HOST_CR0] & CR0.WP)


@REGISTERS.rule(Field.HOST_CR3)
def host_cr3_width(vmcs: Vmcs) -> bool:
    """CR3 sets no bit beyond the physical-address width."""
    return not vmcs[Field.HOST_CR3] >> _maxphyaddr(vmcs)


def _maxphyaddr(vmcs: Vmcs) -> int:
    # CR3 is no address in the VMCS: IA32_VMX_BASIC[48] says nothing about it.
    return vmcs.environment.maxphyaddr or vmcs.physical_width


for _name in ("ESP", "EIP"):
    reserved.canonical_address(
        REGISTERS, Field[f"HOST_IA32_SYSENTER_{_name}"], f"IA32_SYSENTER_{_name} of the host"
    )
reserved.perf_global_ctrl(REGISTERS, Field.HOST_IA32_PERF_GLOBAL_CTRL, [_Exit.LOAD_IA32_PERF_GLOBAL_CTRL])
reserved.pat(REGISTERS, Field.HOST_IA32_PAT, [_Exit.LOAD_IA32_PAT])
reserved.efer_reserved(REGISTERS, Field.HOST_IA32_EFER, [_Exit.LOAD_IA32_EFER])


@REGISTERS.rule(Field.HOST_IA32_EFER, when=[_Exit.LOAD_IA32_EFER])
def host_efer_lma(vmcs: Vmcs) -> bool:
    """IA32_EFER.LMA is what "host address-space size" is."""
    return bool(vmcs[Field.HOST_IA32_EFER] & EFER.LMA) == vmcs.on(_Exit.HOST_ADDRESS_SPACE_SIZE)


@REGISTERS.rule(Field.HOST_IA32_EFER, when=[_Exit.LOAD_IA32_EFER])
def host_efer_lme(vmcs: Vmcs) -> bool:
    """IA32_EFER.LME is what "host address-space size" is."""
    return bool(vmcs[Field.HOST_IA32_EFER] & EFER.LME) == vmcs.on(_Exit.HOST_ADDRESS_SPACE_SIZE)


reserved.cet(REGISTERS, Field.HOST_IA32_S_CET, [_Exit.LOAD_CET_STATE])
reserved.canonical_address(
    REGISTERS,
    Field.HOST_IA32_INTERRUPT_SSP_TABLE_ADDR,
    "IA32_INTERRUPT_SSP_TABLE_ADDR of the host",
    when=[_Exit.LOAD_CET_STATE],
)


@REGISTERS.rule(Field.HOST_SSP, when=[_Exit.LOAD_CET_STATE])
def host_ssp_alignment(vmcs: Vmcs) -> bool:
    """Bits 1:0 of SSP are 0."""
    return not vmcs[Field.HOST_SSP] & 3


reserved.canonical_address(REGISTERS, Field.HOST_SSP, "SSP of the host", when=[_Exit.LOAD_CET_STATE])


@REGISTERS.rule(Field.HOST_IA32_PKRS, when=[_Exit.LOAD_PKRS])
def host_pkrs_reserved(vmcs: Vmcs) -> bool:
    """Bits 63:32 of IA32_PKRS are 0."""
    return not vmcs[Field.HOST_IA32_PKRS] >> 32


# --- 27.2.3: segment and descriptor-table registers --------------------------------------------------------


def _selector_rule(register: str) -> None:
    field = Field[f"HOST_{register}_SELECTOR"]
    SEGMENTS.add(
        f"host-{register.lower()}-selector-rpl-ti",
        f"RPL (bits 1:0) and TI (bit 2) of the {register} selector are 0.",
        lambda vmcs: not vmcs[field] & 7,
        [field],
    )


for _name in _SELECTORS:
    _selector_rule(_name)


@SEGMENTS.rule(Field.HOST_CS_SELECTOR)
def host_cs_is_not_null(vmcs: Vmcs) -> bool:
    """The CS selector is not 0."""
    return vmcs[Field.HOST_CS_SELECTOR] != 0


@SEGMENTS.rule(Field.HOST_TR_SELECTOR)
def host_tr_is_not_null(vmcs: Vmcs) -> bool:
    """The TR selector is not 0."""
    return vmcs[Field.HOST_TR_SELECTOR] != 0


@SEGMENTS.rule(Field.HOST_SS_SELECTOR, unless=[_Exit.HOST_ADDRESS_SPACE_SIZE])
def host_ss_is_not_null(vmcs: Vmcs) -> bool:
    """For a 32-bit host the SS selector is not 0."""
    return vmcs[Field.HOST_SS_SELECTOR] != 0


for _name in ("FS", "GS", "GDTR", "IDTR", "TR"):
    reserved.canonical_address(SEGMENTS, Field[f"HOST_{_name}_BASE"], f"The base of {_name} of the host")


# --- 27.2.4: address-space size ----------------------------------------------------------------------------


@ADDRESS_SPACE.rule()
def ia32e_mode_guest_needs_long_mode(vmcs: Vmcs) -> bool:
    """Where IA32_EFER.LMA is 0 at VM entry, "IA-32e mode guest" is 0."""
    return vmcs.environment.efer_lma or not vmcs.on(EntryControls.IA32E_MODE_GUEST)


@ADDRESS_SPACE.rule()
def host_address_space_size_agrees(vmcs: Vmcs) -> bool:
    """ "Host address-space size" is what IA32_EFER.LMA is at VM entry."""
    return vmcs.environment.efer_lma == vmcs.on(_Exit.HOST_ADDRESS_SPACE_SIZE)


@ADDRESS_SPACE.rule(unless=[_Exit.HOST_ADDRESS_SPACE_SIZE])
def ia32e_mode_guest_needs_64_bit_host(vmcs: Vmcs) -> bool:
    """Where "host address-space size" is 0, "IA-32e mode guest" is 0."""
    return not vmcs.on(EntryControls.IA32E_MODE_GUEST)


@ADDRESS_SPACE.rule(Field.HOST_CR4, unless=[_Exit.HOST_ADDRESS_SPACE_SIZE])
def host_pcide_needs_64_bit_host(vmcs: Vmcs) -> bool:
    """Where "host address-space size" is 0, CR4.PCIDE is 0."""
    return not vmcs[Field.HOST_CR4] & CR4.PCIDE


@ADDRESS_SPACE.rule(Field.HOST_RIP, unless=[_Exit.HOST_ADDRESS_SPACE_SIZE])
def host_rip_32_bit(vmcs: Vmcs) -> bool:
    """Where "host address-space size" is 0, bits 63:32 of RIP are 0."""
    return not vmcs[Field.HOST_RIP] >> 32


@ADDRESS_SPACE.rule(Field.HOST_CR4, when=[_Exit.HOST_ADDRESS_SPACE_SIZE])
def host_pae(vmcs: Vmcs) -> bool:
    """Where "host address-space size" is 1, CR4.PAE is 1."""
    return bool(vmcs[Field.HOST_CR4] & CR4.PAE)


reserved.canonical_address(
    ADDRESS_SPACE, Field.HOST_RIP, "RIP of the host", when=[_Exit.HOST_ADDRESS_SPACE_SIZE]
)


def _cet_32_bit(field: Field, what: str) -> None:
    ADDRESS_SPACE.add(
        f"{field.name.lower().replace('_', '-')}-32-bit",
        f'Where "host address-space size" is 0, bits 63:32 of {what} are 0.',
        lambda vmcs: not vmcs[field] >> 32,
        [field],
        when=[_Exit.LOAD_CET_STATE],
        unless=[_Exit.HOST_ADDRESS_SPACE_SIZE],
    )


_cet_32_bit(Field.HOST_IA32_S_CET, "IA32_S_CET")
_cet_32_bit(Field.HOST_SSP, "SSP")
