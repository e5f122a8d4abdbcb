"""Pairs of cases for the rules on guest state; see `entry_pairs`."""

from __future__ import annotations

from typing import Any

from vmxlab import Field, Mode
from vmxlab.cases.guest_state import guest_state
from vmxlab.sdm.controls import EntryControls, SecondaryControls
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS

from .entry_pairs import Pair, Processor, Settings, bits, fixed, merged, pair, with_field
from .entry_pairs_state import (
    canonical_pair,
)

_UNRESTRICTED = {"enable": (SecondaryControls.UNRESTRICTED_GUEST, SecondaryControls.ENABLE_EPT)}
_PROTECTED: Settings = {"mode": Mode.PROTECTED}
_REAL: Settings = {"mode": Mode.REAL}
_ALL = (1 << 64) - 1
_LONG_EFER = int(EFER.LME | EFER.LMA)


def baseline(processor: Processor, field: Field, mode: Mode = Mode.LONG) -> int:
    return guest_state(mode, processor.target.capabilities, with_ept=True)[field]


# --- control registers, debug registers, MSRs --------------------------------------------------------------
@pair("guest-cr0-fixed")
def _(processor: Processor) -> Pair:
    cr0 = baseline(processor, Field.GUEST_CR0)
    upper = with_field(Field.GUEST_CR0, *(cr0 | 1 << i for i in range(32, 64)), cr0 & ~CR0.NE)
    unpaged = with_field(Field.GUEST_CR0, cr0 & ~CR0.PG, cr0 & ~(CR0.PG | CR0.PE), **_PROTECTED)
    good = with_field(Field.GUEST_CR0, cr0, cr0 | CR0.WP | CR0.AM)
    free = with_field(Field.GUEST_CR0, cr0 & ~CR0.PG, mode=Mode.PROTECTED, **_UNRESTRICTED)
    return Pair(upper + unpaged, good + free)


@pair("guest-paging-needs-protection")
def _(processor: Processor) -> Pair:
    cr0 = baseline(processor, Field.GUEST_CR0, Mode.REAL)
    return Pair(with_field(Field.GUEST_CR0, cr0 | CR0.PG, **_REAL), with_field(Field.GUEST_CR0, cr0, **_REAL))


@pair("guest-cr4-fixed")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.cr4
    cr4 = baseline(processor, Field.GUEST_CR4)
    cr0 = baseline(processor, Field.GUEST_CR0) | CR0.WP
    wrong = bits(can.allowed0 | ~can.allowed1 & _ALL)
    free = [bit for bit in bits(can.allowed1 & ~can.allowed0) if bit not in (CR4.PAE, CR4.CET, CR4.LA57)]
    return Pair(
        with_field(Field.GUEST_CR4, *(cr4 ^ bit for bit in wrong), fields={Field.GUEST_CR0: cr0}),
        with_field(Field.GUEST_CR4, *(cr4 | bit for bit in free)),
    )


fixed(
    "guest-ia32-debugctl-reserved",
    with_field(Field.GUEST_IA32_DEBUGCTL, *(1 << i for i in (3, 4, 5, *range(16, 64)))),
    with_field(Field.GUEST_IA32_DEBUGCTL, 0, 1, 2, 3),
)


@pair("ia32e-mode-guest-needs-paging")
def _(processor: Processor) -> Pair:
    cr0 = baseline(processor, Field.GUEST_CR0)
    return Pair(
        with_field(Field.GUEST_CR0, cr0 & ~CR0.PG, **_UNRESTRICTED),
        with_field(Field.GUEST_CR0, cr0, **_UNRESTRICTED),
    )


@pair("ia32e-mode-guest-needs-pae")
def _(processor: Processor) -> Pair:
    cr4 = baseline(processor, Field.GUEST_CR4)
    return Pair(with_field(Field.GUEST_CR4, cr4 & ~CR4.PAE), with_field(Field.GUEST_CR4, cr4))


@pair("guest-pcide-needs-ia32e-mode")
def _(processor: Processor) -> Pair:
    needs: Settings = {"needs": (CR4.PCIDE,)}
    return Pair(
        with_field(
            Field.GUEST_CR4,
            baseline(processor, Field.GUEST_CR4, Mode.PROTECTED) | CR4.PCIDE,
            **_PROTECTED,
            **needs,
        ),
        with_field(Field.GUEST_CR4, baseline(processor, Field.GUEST_CR4) | CR4.PCIDE, **needs),
    )


@pair("guest-cr3-width")
def _(processor: Processor) -> Pair:
    cr3 = baseline(processor, Field.GUEST_CR3)
    return Pair(
        with_field(Field.GUEST_CR3, *(cr3 | bit for bit in processor.beyond)),
        with_field(Field.GUEST_CR3, cr3),
    )


fixed(
    "guest-dr7-upper-half",
    with_field(Field.GUEST_DR7, *(0x400 | 1 << i for i in range(32, 64))),
    with_field(Field.GUEST_DR7, 0x400, 0),
)
for _name in ("ESP", "EIP"):
    canonical_pair(f"guest-ia32-sysenter-{_name.lower()}-canonical", Field[f"GUEST_IA32_SYSENTER_{_name}"])
_EFER = {"enable": (EntryControls.LOAD_IA32_EFER,)}
fixed(
    "guest-efer-lma",
    with_field(Field.GUEST_IA32_EFER, 0, **_EFER)
    + with_field(Field.GUEST_IA32_EFER, _LONG_EFER, **_PROTECTED, **_EFER),
    with_field(Field.GUEST_IA32_EFER, _LONG_EFER, **_EFER)
    + with_field(Field.GUEST_IA32_EFER, 0, **_PROTECTED, **_EFER),
)
fixed(
    "guest-efer-lme",
    with_field(Field.GUEST_IA32_EFER, int(EFER.LMA), **_EFER)
    + with_field(Field.GUEST_IA32_EFER, int(EFER.LME), **_PROTECTED, **_EFER),
    with_field(Field.GUEST_IA32_EFER, int(EFER.LME), **_REAL, **_EFER),
)
_BNDCFGS = {"enable": (EntryControls.LOAD_IA32_BNDCFGS,)}
fixed(
    "guest-bndcfgs-reserved",
    with_field(Field.GUEST_IA32_BNDCFGS, *(1 << i for i in range(2, 12)), **_BNDCFGS),
    with_field(Field.GUEST_IA32_BNDCFGS, 0, 3, **_BNDCFGS),
)
canonical_pair(
    "guest-bndcfgs-canonical", Field.GUEST_IA32_BNDCFGS, good=(0, 0x1000), alignment=0x1000, **_BNDCFGS
)
fixed(
    "guest-uinv-reserved",
    with_field(Field.GUEST_UINV, *(1 << i for i in range(8, 16)), enable=(EntryControls.LOAD_UINV,)),
    with_field(Field.GUEST_UINV, 0, 0xFF, enable=(EntryControls.LOAD_UINV,)),
)

# --- segment registers -------------------------------------------------------------------------------------
_CODE_AND_DATA = ("CS", "SS", "DS", "ES", "FS", "GS")
_CODE, _DATA, _UNUSABLE = 0xA09B, 0xC093, 1 << 16


def seg(register: str, **parts: int) -> dict[Field, int]:
    """Fields of a segment register."""
    return {Field[f"GUEST_{register}_{part.upper()}"]: value for part, value in parts.items()}


def rights(register: str, *values: int, **settings: Any) -> list[Settings]:
    """Cases with a segment register's access rights."""
    return with_field(Field[f"GUEST_{register}_ACCESS_RIGHTS"], *values, **settings)


def ring(cpl: int) -> dict[Field, int]:
    """Code and stack of a privilege level."""
    return {
        **seg("CS", selector=0x08 | cpl, access_rights=_CODE | cpl << 5),
        **seg("SS", selector=0x10 | cpl, access_rights=_DATA | cpl << 5),
    }


def virtual_8086(mode: Mode = Mode.PROTECTED, **more: dict[Field, int]) -> Settings:
    """Virtual-8086 mode: HLT is #GP(0) there."""
    fields: dict[Field, int] = {Field.GUEST_RFLAGS: int(RFLAGS.VM | RFLAGS.FIXED1), Field.GUEST_RIP: 0}
    for register in _CODE_AND_DATA:
        selector = 0x800 if register == "CS" else 0
        fields |= seg(register, selector=selector, base=selector << 4, limit=0xFFFF, access_rights=0xF3)
    return {"mode": mode, "fields": {**fields, **more.get("fields", {})}}


fixed(
    "guest-tr-selector-ti",
    with_field(Field.GUEST_TR_SELECTOR, 0x1C, 4),
    with_field(Field.GUEST_TR_SELECTOR, 0x18, 3),
)
_LDTR = seg("LDTR", selector=0x20, base=0, limit=0xFFF, access_rights=0x82)
_NO_LDTR = seg("LDTR", access_rights=_UNUSABLE)
fixed(
    "guest-ldtr-selector-ti",
    [{"fields": {**_LDTR, **seg("LDTR", selector=0x24)}}],
    [{"fields": _LDTR}, {"fields": {**_NO_LDTR, **seg("LDTR", selector=4)}}],
)
fixed(
    "guest-ss-selector-rpl",
    [{"fields": seg("CS", selector=0x08 | rpl)} for rpl in (1, 2, 3)],
    [
        {"fields": ring(3)},
        merged(_UNRESTRICTED, fields=seg("SS", selector=0x13)),
        virtual_8086(fields=seg("SS", selector=1, base=16)),
    ],
)
for _register in _CODE_AND_DATA:
    _low = _register.lower()
    fixed(
        f"guest-{_low}-base-virtual-8086",
        [virtual_8086(fields=seg(_register, base=base)) for base in (1, 0x10, 0x10_0000)],
        [virtual_8086()],
    )
    fixed(
        f"guest-{_low}-limit-virtual-8086",
        [virtual_8086(fields=seg(_register, limit=limit)) for limit in (0, 0xFFFE, 0x1_0000, 0xFFFF_FFFF)],
        [virtual_8086()],
    )
    fixed(
        f"guest-{_low}-rights-virtual-8086",
        [
            virtual_8086(fields=seg(_register, access_rights=0xF3 ^ bit))
            for bit in bits(0x1F0FF)
            if bit != 0x60
        ],
        [virtual_8086()],
    )
for _register in ("TR", "FS", "GS"):
    canonical_pair(f"guest-{_register.lower()}-base-canonical", Field[f"GUEST_{_register}_BASE"])
canonical_pair("guest-ldtr-base-canonical", Field.GUEST_LDTR_BASE, fields=_LDTR)
_UPPER = tuple(1 << i for i in range(32, 64))
fixed(
    "guest-cs-base-upper-half",
    with_field(Field.GUEST_CS_BASE, *_UPPER),
    with_field(Field.GUEST_CS_BASE, 0, 0xFFFF_FFFF),
)
for _register in ("SS", "DS", "ES"):
    _base = Field[f"GUEST_{_register}_BASE"]
    fixed(
        f"guest-{_register.lower()}-base-upper-half",
        with_field(_base, *_UPPER),
        with_field(_base, 0xFFFF_FFFF)
        + with_field(_base, 1 << 32, fields=seg(_register, access_rights=_UNUSABLE)),
    )


def _rights_of(register: str) -> int:
    return _CODE if register == "CS" else _DATA


def _is_bad(register: str, name: str, values: list[int], *good: Settings, **settings: Any) -> None:
    """Access rights that break a rule; and the same of an unusable register, which is not looked at."""
    also = [] if register == "CS" else rights(register, *(value | _UNUSABLE for value in values), **settings)
    base = rights(register, _rights_of(register), **settings)
    fixed(f"guest-{register.lower()}-{name}", rights(register, *values, **settings), [*base, *also, *good])


for _register in _CODE_AND_DATA:
    _base_rights = _rights_of(_register)
    _is_bad(_register, "s", [_base_rights & ~0x10])
    _is_bad(_register, "present", [_base_rights & ~0x80])
    _is_bad(_register, "rights-reserved", [_base_rights | 1 << i for i in range(8, 12)])
    _is_bad(_register, "rights-upper", [_base_rights | 1 << i for i in range(17, 32)])
    _limit = Field[f"GUEST_{_register}_LIMIT"]
    _coarse = seg(_register, access_rights=_base_rights)
    _fine = seg(_register, access_rights=_base_rights & ~(1 << 15))
    fixed(
        f"guest-{_register.lower()}-granularity-0",
        with_field(_limit, *(0xFFFF_FFFF ^ 1 << i for i in range(12)), fields=_coarse),
        with_field(_limit, 0xFFF, 0xFFFF_FFFF, fields=_coarse) + with_field(_limit, 0xF_FFFE, fields=_fine),
    )
    fixed(
        f"guest-{_register.lower()}-granularity-1",
        with_field(_limit, *(0xFFF | 1 << i for i in range(20, 32)), fields=_fine),
        with_field(_limit, 0xF_FFFF, fields=_fine),
    )


def types(base: int, *kinds: int) -> list[int]:
    return [base & ~0xF | kind for kind in kinds]


_CS_TYPES = (9, 11, 13, 15)
fixed(
    "guest-cs-type",
    rights("CS", *types(_CODE, *(kind for kind in range(16) if kind not in _CS_TYPES)))
    + rights("CS", *types(0x9B, 1, 2, 4, 7, 8, 10), **_REAL),
    rights("CS", *types(_CODE, *_CS_TYPES)) + rights("CS", *types(0x9B, 3, 9, 11, 13, 15), **_REAL),
)
_is_bad(
    "SS",
    "type",
    types(_DATA, *(kind for kind in range(16) if kind not in (3, 7))),
    *rights("SS", *types(_DATA, 3, 7)),
)
for _register in ("DS", "ES", "FS", "GS"):
    _is_bad(
        _register,
        "type-accessed",
        types(_DATA, 0, 2, 4, 6, 10, 14),
        *rights(_register, *types(_DATA, 1, 3, 5, 7, 11, 15)),
    )
    _is_bad(_register, "type-readable", types(_DATA, 9, 13))
    _field = Field[f"GUEST_{_register}_SELECTOR"]
    fixed(
        f"guest-{_register.lower()}-dpl",
        [
            {"fields": seg(_register, selector=0x10 | rpl, access_rights=value | dpl << 5)}
            for value in types(_DATA, 1, 3, 5, 7, 11)
            for dpl, rpl in ((0, 1), (0, 3), (2, 3))
        ],
        [
            {"fields": seg(_register, selector=0x13, access_rights=_DATA | 0x60)},
            {"fields": seg(_register, selector=0x13, access_rights=types(_DATA, 15)[0])},
            merged(_UNRESTRICTED, fields=seg(_register, selector=0x13)),
            {"fields": seg(_register, selector=0x13, access_rights=_UNUSABLE)},
        ],
    )
# Where RPL of CS and SS may differ, DPL of SS is what counts.
_RPL_IS_FREE = merged(_UNRESTRICTED, fields=seg("CS", selector=0x0B))
_UNRESTRICTED_DATA_CS = {"mode": Mode.PROTECTED, **_UNRESTRICTED}
fixed(
    "guest-cs-dpl",
    rights("CS", *(value | dpl << 5 for value in types(_CODE, *_CS_TYPES) for dpl in (1, 2, 3)))
    + [{"fields": {**ring(3), **seg("CS", access_rights=value)}} for value in types(_CODE, 9, 11)]
    + rights("CS", *(0xC093 | dpl << 5 for dpl in (1, 2, 3)), **_UNRESTRICTED_DATA_CS)
    + [merged(_UNRESTRICTED, fields=seg("CS", selector=0x09, access_rights=_CODE | 0x20))],
    [{"fields": ring(3)}, {"fields": ring(1)}, _RPL_IS_FREE]
    + [{"fields": {**ring(3), **seg("CS", access_rights=_CODE | 4 | dpl << 5)}} for dpl in range(4)]
    + rights("CS", 0xC093, **_UNRESTRICTED_DATA_CS),
)
fixed(
    "guest-ss-dpl-is-rpl",
    [
        {"fields": {**seg("CS", access_rights=_CODE | 4), **seg("SS", access_rights=_DATA | dpl << 5)}}
        for dpl in (1, 2, 3)
    ]
    + [{"fields": {**seg("CS", selector=0x08 | rpl), **seg("SS", selector=0x10 | rpl)}} for rpl in (1, 2, 3)]
    + [{"fields": {**seg("CS", selector=0x0B), **seg("SS", selector=0x13, access_rights=_UNUSABLE)}}],
    [{"fields": ring(2)}, {"fields": {**ring(3), **seg("CS", access_rights=_CODE | 4)}}],
)
fixed(
    "guest-ss-dpl-zero",
    [
        merged(
            _UNRESTRICTED_DATA_CS,
            fields={**seg("CS", access_rights=0xC093), **seg("SS", access_rights=_DATA | 0x20)},
        ),
        merged(_REAL, fields={**seg("CS", access_rights=0x93), **seg("SS", access_rights=0xB3)}),
        merged(_REAL, fields={**seg("CS", access_rights=0xFB), **seg("SS", access_rights=0xF3)}),
    ],
    [merged(_UNRESTRICTED_DATA_CS, fields=seg("CS", access_rights=0xC093)), _REAL],
)
fixed(
    "guest-cs-default-big",
    rights("CS", _CODE | 1 << 14),
    rights("CS", _CODE) + rights("CS", 0xC09B, **_PROTECTED) + rights("CS", 0xE09B, **_PROTECTED),
)

# --- TR and LDTR -------------------------------------------------------------------------------------------
_TSS = 0x8B
fixed(
    "guest-tr-type",
    rights("TR", *types(_TSS, *(kind for kind in range(16) if kind != 11)))
    + rights("TR", *types(_TSS, 0, 1, 2, 9, 10, 15), **_PROTECTED),
    rights("TR", _TSS) + rights("TR", *types(_TSS, 3, 11), **_PROTECTED),
)
fixed("guest-tr-usable", rights("TR", _TSS | _UNUSABLE, _TSS | _UNUSABLE, **_PROTECTED), rights("TR", _TSS))
fixed(
    "guest-ldtr-type",
    rights("LDTR", *types(0x82, *(kind for kind in range(16) if kind != 2)), fields=_LDTR),
    [{"fields": _LDTR}, *rights("LDTR", _UNUSABLE | 131, fields=_LDTR)],
)
for _register, _value, _fields in (("TR", _TSS, {}), ("LDTR", 0x82, _LDTR)):
    _low, _limit = f"guest-{_register.lower()}", Field[f"GUEST_{_register}_LIMIT"]
    _coarse = {**_fields, **seg(_register, access_rights=_value | 1 << 15)}
    for _name, _bad in (
        ("s", [_value | 0x10]),
        ("present", [_value & ~0x80]),
        ("rights-reserved", [_value | 1 << i for i in range(8, 12)]),
        ("rights-upper", [_value | 1 << i for i in range(17, 32)]),
    ):
        fixed(
            f"{_low}-{_name}",
            rights(_register, *_bad, fields=_fields),
            rights(
                _register, _value, *([bad | _UNUSABLE for bad in _bad] if _fields else []), fields=_fields
            ),
        )
    fixed(
        f"{_low}-granularity-0",
        with_field(_limit, *(0xFFFF_FFFF ^ 1 << i for i in range(12)), fields=_coarse),
        with_field(_limit, 0xFFF, fields=_coarse),
    )
    fixed(
        f"{_low}-granularity-1",
        with_field(_limit, *(0xFFF | 1 << i for i in range(20, 32)), fields=_fields),
        with_field(_limit, 0xF_FFFF, fields=_fields),
    )
