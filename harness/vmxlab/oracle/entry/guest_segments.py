"""Checks on guest segment registers (SDM Vol. 3C, 27.3.1.2).

"Usable" is bit 16 of the access rights being 0. CS is checked as if it were usable always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmxlab.oracle.entry.rule import Area, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0

TABLE = RuleTable(Area.GUEST_STATE, "27.3.1.2")
rule = TABLE.rule

_CODE_AND_DATA = ("CS", "SS", "DS", "ES", "FS", "GS")
_DATA = ("DS", "ES", "FS", "GS")
_UNRESTRICTED = SecondaryControls.UNRESTRICTED_GUEST
_CODE_TYPES = (9, 11, 13, 15)
_READ_WRITE_ACCESSED = 3
_VIRTUAL_8086_RIGHTS = 0xF3
_BUSY_TSS_16, _BUSY_TSS = 3, 11
_LDT = 2


@dataclass(frozen=True, slots=True)
class _Rights:
    """Access rights of a segment register (Table 25-2)."""

    raw: int

    @property
    def type(self) -> int:
        return self.raw & 0xF

    @property
    def s(self) -> bool:
        return bool(self.raw >> 4 & 1)

    @property
    def dpl(self) -> int:
        return self.raw >> 5 & 3

    @property
    def present(self) -> bool:
        return bool(self.raw >> 7 & 1)

    @property
    def long(self) -> bool:
        return bool(self.raw >> 13 & 1)

    @property
    def default_big(self) -> bool:
        return bool(self.raw >> 14 & 1)

    @property
    def granularity(self) -> bool:
        return bool(self.raw >> 15 & 1)

    @property
    def usable(self) -> bool:
        return not self.raw >> 16 & 1


def _field(register: str, part: str) -> Field:
    return Field[f"GUEST_{register}_{part}"]


def _rights(vmcs: Vmcs, register: str) -> _Rights:
    return _Rights(vmcs[_field(register, "ACCESS_RIGHTS")])


def _checked(vmcs: Vmcs, register: str) -> bool:
    """Whether the register's access rights count."""
    return register in ("CS", "TR") or _rights(vmcs, register).usable


def _each(
    registers: tuple[str, ...],
    name: str,
    sentence: str,
    holds: Callable[[Vmcs, str], bool],
    *parts: str,
    more: tuple[Field, ...] = (),
) -> None:
    """The same rule for several registers; `parts` are the fields of each that it reads."""
    for register in registers:

        def one(vmcs: Vmcs, register: str = register) -> bool:
            return holds(vmcs, register)

        TABLE.add(
            f"guest-{register.lower()}-{name}",
            sentence.format(register),
            one,
            [*(_field(register, part) for part in parts), *more],
        )


# --- selectors ---------------------------------------------------------------------------------------------


@rule(Field.GUEST_TR_SELECTOR)
def guest_tr_selector_ti(vmcs: Vmcs) -> bool:
    """TI (bit 2) of the TR selector is 0."""
    return not vmcs[Field.GUEST_TR_SELECTOR] & 4


@rule(Field.GUEST_LDTR_SELECTOR, Field.GUEST_LDTR_ACCESS_RIGHTS)
def guest_ldtr_selector_ti(vmcs: Vmcs) -> bool:
    """TI (bit 2) of the LDTR selector is 0, if LDTR is usable."""
    return not _rights(vmcs, "LDTR").usable or not vmcs[Field.GUEST_LDTR_SELECTOR] & 4


@rule(Field.GUEST_SS_SELECTOR, Field.GUEST_CS_SELECTOR, Field.GUEST_RFLAGS, unless=[_UNRESTRICTED])
def guest_ss_selector_rpl(vmcs: Vmcs) -> bool:
    """RPL of the SS selector is that of CS; not in virtual-8086 mode, nor for an unrestricted guest."""
    return vmcs.virtual_8086 or not (vmcs[Field.GUEST_SS_SELECTOR] ^ vmcs[Field.GUEST_CS_SELECTOR]) & 3


# --- bases and limits --------------------------------------------------------------------------------------

_each(
    _CODE_AND_DATA,
    "base-virtual-8086",
    "In virtual-8086 mode the base of {} is its selector shifted left by 4.",
    lambda vmcs, r: not vmcs.virtual_8086 or vmcs[_field(r, "BASE")] == vmcs[_field(r, "SELECTOR")] << 4,
    "BASE",
    "SELECTOR",
    more=(Field.GUEST_RFLAGS,),
)
_each(
    ("TR", "FS", "GS"),
    "base-canonical",
    "The base of {} is a canonical address.",
    lambda vmcs, r: vmcs.canonical(vmcs[_field(r, "BASE")]),
    "BASE",
)
_each(
    ("LDTR",),
    "base-canonical",
    "The base of {} is a canonical address, if it is usable.",
    lambda vmcs, r: not _checked(vmcs, r) or vmcs.canonical(vmcs[_field(r, "BASE")]),
    "BASE",
    "ACCESS_RIGHTS",
)
_each(
    ("CS",),
    "base-upper-half",
    "Bits 63:32 of the base of {} are 0.",
    lambda vmcs, r: not vmcs[_field(r, "BASE")] >> 32,
    "BASE",
)
_each(
    ("SS", "DS", "ES"),
    "base-upper-half",
    "Bits 63:32 of the base of {} are 0, if it is usable.",
    lambda vmcs, r: not _checked(vmcs, r) or not vmcs[_field(r, "BASE")] >> 32,
    "BASE",
    "ACCESS_RIGHTS",
)
_each(
    _CODE_AND_DATA,
    "limit-virtual-8086",
    "In virtual-8086 mode the limit of {} is FFFFH.",
    lambda vmcs, r: not vmcs.virtual_8086 or vmcs[_field(r, "LIMIT")] == 0xFFFF,
    "LIMIT",
    more=(Field.GUEST_RFLAGS,),
)

# --- access rights of CS, SS, DS, ES, FS, GS ---------------------------------------------------------------

_each(
    _CODE_AND_DATA,
    "rights-virtual-8086",
    "In virtual-8086 mode the access rights of {} are F3H.",
    lambda vmcs, r: not vmcs.virtual_8086 or vmcs[_field(r, "ACCESS_RIGHTS")] == _VIRTUAL_8086_RIGHTS,
    "ACCESS_RIGHTS",
    more=(Field.GUEST_RFLAGS,),
)


def _rights_rule(
    registers: tuple[str, ...],
    name: str,
    sentence: str,
    holds: Callable[[Vmcs, str, _Rights], bool],
    *parts: str,
    more: tuple[Field, ...] = (),
) -> None:
    """A rule on access rights, outside of virtual-8086 mode, for registers that are usable (CS: always)."""

    def checked(vmcs: Vmcs, register: str) -> bool:
        if vmcs.virtual_8086 or not _checked(vmcs, register):
            return True
        return holds(vmcs, register, _rights(vmcs, register))

    _each(registers, name, sentence, checked, "ACCESS_RIGHTS", *parts, more=(Field.GUEST_RFLAGS, *more))


def _limit_fits_granularity_0(vmcs: Vmcs, register: str) -> bool:
    rights = _rights(vmcs, register)
    return not rights.granularity or vmcs[_field(register, "LIMIT")] & 0xFFF == 0xFFF


def _limit_fits_granularity_1(vmcs: Vmcs, register: str) -> bool:
    return _rights(vmcs, register).granularity or not vmcs[_field(register, "LIMIT")] >> 20


def _cs_type(vmcs: Vmcs, register: str, rights: _Rights) -> bool:
    if rights.type == _READ_WRITE_ACCESSED:
        return vmcs.on(_UNRESTRICTED)
    return rights.type in _CODE_TYPES


def _cs_dpl(vmcs: Vmcs, register: str, rights: _Rights) -> bool:
    ss = _rights(vmcs, "SS").dpl
    if rights.type == _READ_WRITE_ACCESSED and vmcs.on(_UNRESTRICTED):
        return rights.dpl == 0
    if rights.type in (9, 11):
        return rights.dpl == ss
    return rights.type not in (13, 15) or rights.dpl <= ss


def _data_dpl(vmcs: Vmcs, register: str, rights: _Rights) -> bool:
    if vmcs.on(_UNRESTRICTED) or rights.type > 11:
        return True
    return rights.dpl >= vmcs[_field(register, "SELECTOR")] & 3


_rights_rule(
    ("CS",),
    "type",
    "The type of {} is 9, 11, 13 or 15 (accessed code); or 3 (read/write accessed data) for an unrestricted "
    "guest.",
    _cs_type,
)
_rights_rule(("SS",), "type", "The type of {} is 3 or 7, if it is usable.", lambda v, r, a: a.type in (3, 7))
_rights_rule(
    _DATA,
    "type-accessed",
    "The type of {} has bit 0 (accessed), if it is usable.",
    lambda v, r, a: a.type & 1 == 1,
)
_rights_rule(
    _DATA,
    "type-readable",
    "If {} is usable and its type a code segment (bit 3), it is readable (bit 1).",
    lambda v, r, a: not a.type & 8 or bool(a.type & 2),
)
_rights_rule(
    _CODE_AND_DATA, "s", "Bit 4 (S) of the access rights of {} is 1, if it is usable.", lambda v, r, a: a.s
)
_rights_rule(
    ("CS",),
    "dpl",
    "DPL of {} is that of SS for types 9 and 11, at most that of SS for 13 and 15, and 0 for type 3.",
    _cs_dpl,
    more=(Field.GUEST_SS_ACCESS_RIGHTS,),
)


@rule(Field.GUEST_SS_ACCESS_RIGHTS, Field.GUEST_SS_SELECTOR, Field.GUEST_RFLAGS, unless=[_UNRESTRICTED])
def guest_ss_dpl_is_rpl(vmcs: Vmcs) -> bool:
    """DPL of SS is the RPL of its selector, but for an unrestricted guest."""
    return vmcs.virtual_8086 or _rights(vmcs, "SS").dpl == vmcs[Field.GUEST_SS_SELECTOR] & 3


@rule(Field.GUEST_SS_ACCESS_RIGHTS, Field.GUEST_CS_ACCESS_RIGHTS, Field.GUEST_CR0, Field.GUEST_RFLAGS)
def guest_ss_dpl_zero(vmcs: Vmcs) -> bool:
    """DPL of SS is 0 where the type of CS is 3 or CR0.PE is 0."""
    if vmcs.virtual_8086:
        return True
    must_be_zero = _rights(vmcs, "CS").type == _READ_WRITE_ACCESSED or not vmcs[Field.GUEST_CR0] & CR0.PE
    return not must_be_zero or _rights(vmcs, "SS").dpl == 0


_rights_rule(
    _DATA,
    "dpl",
    "DPL of {} is not less than the RPL of its selector, if it is usable, its type is 0 to 11, and the guest "
    "is not unrestricted.",
    _data_dpl,
    "SELECTOR",
)
_rights_rule(
    _CODE_AND_DATA,
    "present",
    "Bit 7 (P) of the access rights of {} is 1, if it is usable.",
    lambda v, r, a: a.present,
)
_rights_rule(
    _CODE_AND_DATA,
    "rights-reserved",
    "Bits 11:8 of the access rights of {} are 0, if it is usable.",
    lambda v, r, a: not a.raw >> 8 & 0xF,
)
_rights_rule(
    ("CS",),
    "default-big",
    "Bit 14 (D/B) of the access rights of {} is 0 in IA-32e mode with bit 13 (L) 1.",
    lambda v, r, a: not (v.ia32e and a.long and a.default_big),
)
_rights_rule(
    _CODE_AND_DATA,
    "granularity-0",
    "Bit 15 (G) of {} is 0, if it is usable and any of bits 11:0 of its limit is 0.",
    lambda v, r, a: _limit_fits_granularity_0(v, r),
    "LIMIT",
)
_rights_rule(
    _CODE_AND_DATA,
    "granularity-1",
    "Bit 15 (G) of {} is 1, if it is usable and any of bits 31:20 of its limit is 1.",
    lambda v, r, a: _limit_fits_granularity_1(v, r),
    "LIMIT",
)
_rights_rule(
    _CODE_AND_DATA,
    "rights-upper",
    "Bits 31:17 of the access rights of {} are 0, if it is usable.",
    lambda v, r, a: not a.raw >> 17,
)

# --- access rights of TR and LDTR --------------------------------------------------------------------------


@rule(Field.GUEST_TR_ACCESS_RIGHTS)
def guest_tr_type(vmcs: Vmcs) -> bool:
    """The type of TR is 11 (busy TSS); or 3 (16-bit busy TSS) outside of IA-32e mode."""
    kind = _rights(vmcs, "TR").type
    return kind == _BUSY_TSS or (kind == _BUSY_TSS_16 and not vmcs.ia32e)


@rule(Field.GUEST_TR_ACCESS_RIGHTS)
def guest_tr_usable(vmcs: Vmcs) -> bool:
    """Bit 16 (unusable) of the access rights of TR is 0."""
    return _rights(vmcs, "TR").usable


@rule(Field.GUEST_LDTR_ACCESS_RIGHTS)
def guest_ldtr_type(vmcs: Vmcs) -> bool:
    """The type of LDTR is 2 (LDT), if it is usable."""
    rights = _rights(vmcs, "LDTR")
    return not rights.usable or rights.type == _LDT


for _name, _sentence, _holds in (
    ("s", "Bit 4 (S) of the access rights of {} is 0", lambda vmcs, r: not _rights(vmcs, r).s),
    ("present", "Bit 7 (P) of the access rights of {} is 1", lambda vmcs, r: _rights(vmcs, r).present),
    (
        "rights-reserved",
        "Bits 11:8 of the access rights of {} are 0",
        lambda vmcs, r: not _rights(vmcs, r).raw >> 8 & 0xF,
    ),
    (
        "rights-upper",
        "Bits 31:17 of the access rights of {} are 0",
        lambda vmcs, r: not _rights(vmcs, r).raw >> 17,
    ),
    (
        "granularity-0",
        "Bit 15 (G) of {} is 0, if any of bits 11:0 of its limit is 0",
        _limit_fits_granularity_0,
    ),
    (
        "granularity-1",
        "Bit 15 (G) of {} is 1, if any of bits 31:20 of its limit is 1",
        _limit_fits_granularity_1,
    ),
):
    _parts = ("ACCESS_RIGHTS", "LIMIT") if _name.startswith("granularity") else ("ACCESS_RIGHTS",)

    def _if_usable(vmcs: Vmcs, register: str, holds: Callable[[Vmcs, str], bool] = _holds) -> bool:
        return not _checked(vmcs, register) or holds(vmcs, register)

    _each(("TR",), _name, f"{_sentence}.", _if_usable, *_parts)
    _each(("LDTR",), _name, f"{_sentence}, if it is usable.", _if_usable, *_parts)
