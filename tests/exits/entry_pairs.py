"""For each rule of VM entry: cases that break it alone, and cases just on the good side of it.

A pair is made for a processor: what is just beyond its physical-address width, or one of its reserved bits,
depends on it. Settings are keyword arguments of `Case`; the guest program is HLT.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vmxlab import Case, Field
from vmxlab.cases.controls import compute_controls
from vmxlab.image import layout
from vmxlab.image.compiler import Target
from vmxlab.oracle.entry import RULES
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    TertiaryControls,
)

HLT = b"\xf4"
PAGE = layout.FREE_PAGES
NOT_CANONICAL_48 = (1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63)
CANONICAL_48 = ((1 << 47) - 1, (1 << 64) - (1 << 47))

Settings = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Settings of cases that break a rule, and of cases that do not, on one processor."""

    bad: list[Settings] = field(default_factory=list)
    good: list[Settings] = field(default_factory=list)


@dataclass(frozen=True)
class Processor:
    """What the pairs depend on."""

    target: Target

    @property
    def beyond(self) -> tuple[int, int]:
        """The first and the last bit beyond the physical-address width."""
        return 1 << self.target.physical_address_width, 1 << 63

    @property
    def top(self) -> int:
        """The highest page within the physical-address width."""
        return (1 << self.target.physical_address_width) - 0x1000

    def controls(self, controls: ControlSet, **settings: Any) -> int:
        """What a set of controls is in a case with these settings."""
        return compute_controls(Case(program=HLT, **settings), self.target.capabilities).get(controls, 0)

    def turned(self, controls: ControlSet, bits: int, **settings: Any) -> Settings:
        """Settings with bits of a set of controls turned over, legal or not."""
        value = self.controls(controls, **settings) ^ bits
        return {**settings, "raw_controls": {**settings.get("raw_controls", {}), controls: value}}


MakePair = Callable[[Processor], Pair]
PAIRS: dict[str, MakePair] = {}


def pair(*names: str) -> Callable[[MakePair], MakePair]:
    """The pair of one or more rules."""

    def add(make: MakePair) -> MakePair:
        for name in names:
            assert name not in PAIRS, name
            PAIRS[name] = make
        return make

    return add


def fixed(name: str, bad: Iterable[Settings], good: Iterable[Settings]) -> None:
    """A pair that is the same on all processors."""
    made = Pair(list(bad), list(good))
    pair(name)(lambda processor: made)


def with_field(name: Field, *values: int, **settings: Any) -> list[Settings]:
    """Cases with a field's values."""
    return [merged(settings, fields={name: value}) for value in values]


def merged(settings: Settings, **more: Any) -> Settings:
    """Settings with more of them; fields are put together."""
    result = {**settings, **more}
    if "fields" in settings and "fields" in more:
        result["fields"] = {**settings["fields"], **more["fields"]}
    return result


def bits(value: int) -> Iterator[int]:
    """Each bit that is set."""
    return (1 << i for i in range(value.bit_length()) if value >> i & 1)


def lower(name: Field | str) -> str:
    return (name if isinstance(name, str) else name.name).lower().replace("_", "-")


# --- controls ----------------------------------------------------------------------------------------------
def _reserved_controls(controls: ControlSet, active: Settings) -> None:
    def make(processor: Processor) -> Pair:
        can = processor.target.capabilities.control(controls)
        # A control that other rules are about, too, would break these as well.
        with_rules = [flag for rule in RULES for flag in rule.when if ControlSet.of(flag) is controls]
        if controls is ControlSet.ENTRY:
            with_rules.append(EntryControls.DEACTIVATE_DUAL_MONITOR)
        forced = can.allowed0
        never = (
            ~can.allowed1
            & (1 << controls.bits) - 1
            & ~functools.reduce(operator.or_, map(int, with_rules), 0)
        )
        base = processor.controls(controls, **active)
        good = [{**active, "raw_controls": {controls: base}}]
        bad = [
            {**active, "raw_controls": {controls: base ^ bit}}
            for bit in itertools.chain(bits(forced), bits(never))
        ]
        return Pair(bad, good)

    pair(f"{lower(controls.field)}-reserved")(make)


_reserved_controls(ControlSet.PIN, {})
_reserved_controls(ControlSet.PRIMARY, {})
_reserved_controls(ControlSet.SECONDARY, {"enable": (PrimaryControls.ACTIVATE_SECONDARY_CONTROLS,)})
_reserved_controls(ControlSet.TERTIARY, {"enable": (PrimaryControls.ACTIVATE_TERTIARY_CONTROLS,)})
_reserved_controls(ControlSet.EXIT, {})
_reserved_controls(ControlSet.SECONDARY_EXIT, {"enable": (ExitControls.ACTIVATE_SECONDARY_CONTROLS,)})
_reserved_controls(ControlSet.ENTRY, {})


@pair("cr3-target-count")
def _(processor: Processor) -> Pair:
    most = processor.target.capabilities.misc.cr3_target_count
    return Pair(
        with_field(Field.CR3_TARGET_COUNT, most + 1, 0xFFFF_FFFF), with_field(Field.CR3_TARGET_COUNT, 0, most)
    )


def _address(name: Field, alignment: int = 4096, good: Iterable[int] = (PAGE,), **settings: Any) -> None:
    """Alignment and width of the address of a structure."""
    low = list(bits(alignment - 1))
    good = list(good)

    fixed(
        f"{lower(name)}-alignment",
        with_field(name, *(PAGE + bit for bit in low), **settings),
        with_field(name, *good, **settings),
    )

    @pair(f"{lower(name)}-width")
    def make(processor: Processor) -> Pair:
        return Pair(
            with_field(name, *(PAGE | bit for bit in processor.beyond), **settings),
            with_field(name, *good, **settings),
        )


_Secondary, _Tertiary = SecondaryControls, TertiaryControls
_TPR_SHADOW = PrimaryControls.USE_TPR_SHADOW
_EPT = _Secondary.ENABLE_EPT
for _name in (Field.IO_BITMAP_A, Field.IO_BITMAP_B):
    _address(
        _name, enable=(PrimaryControls.USE_IO_BITMAPS,), disable=(PrimaryControls.UNCONDITIONAL_IO_EXITING,)
    )
_address(Field.MSR_BITMAP, enable=(PrimaryControls.USE_MSR_BITMAPS,))
_address(Field.VIRTUAL_APIC_ADDRESS, enable=(_TPR_SHADOW,))
_address(Field.APIC_ACCESS_ADDRESS, enable=(_Secondary.VIRTUALIZE_APIC_ACCESSES,))
_POSTED = (
    PinControls.PROCESS_POSTED_INTERRUPTS,
    PinControls.EXTERNAL_INTERRUPT_EXITING,
    ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT,
    _Secondary.VIRTUAL_INTERRUPT_DELIVERY,
    _TPR_SHADOW,
)
_address(Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, 64, enable=_POSTED)
_IPI = (_Tertiary.IPI_VIRTUALIZATION, _TPR_SHADOW)
_IPI_FIELDS = {Field.PID_POINTER_TABLE_ADDRESS: PAGE, Field.LAST_PID_POINTER_INDEX: 0}
_address(Field.PML_ADDRESS, enable=(_Secondary.ENABLE_PML, _EPT))
_address(
    Field.SUB_PAGE_PERMISSION_TABLE_POINTER, enable=(_Secondary.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT, _EPT)
)
for _name in (Field.VMREAD_BITMAP, Field.VMWRITE_BITMAP):
    _address(_name, enable=(_Secondary.VMCS_SHADOWING,))
_address(Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS, enable=(_Secondary.EPT_VIOLATION_VE, _EPT))
for _name, _other in (
    (Field.LOW_PASID_DIRECTORY_ADDRESS, Field.HIGH_PASID_DIRECTORY_ADDRESS),
    (Field.HIGH_PASID_DIRECTORY_ADDRESS, Field.LOW_PASID_DIRECTORY_ADDRESS),
):
    _address(_name, enable=(_Secondary.PASID_TRANSLATION,), fields={_other: PAGE})
_address(
    Field.EPTP_LIST_ADDRESS,
    enable=(_Secondary.ENABLE_VM_FUNCTIONS, _EPT),
    fields={Field.VM_FUNCTION_CONTROLS: 1},
)
_address(Field.PID_POINTER_TABLE_ADDRESS, 8, enable=_IPI, fields={Field.LAST_PID_POINTER_INDEX: 0})


@pair("pid-pointer-table-end")
def _(processor: Processor) -> Pair:
    last = Field.LAST_PID_POINTER_INDEX
    settings: Settings = {"enable": _IPI, "fields": {Field.PID_POINTER_TABLE_ADDRESS: processor.top}}
    return Pair(with_field(last, 512, 0xFFFF, **settings), with_field(last, 0, 511, **settings))


fixed(
    "tpr-threshold-reserved",
    with_field(
        Field.TPR_THRESHOLD,
        *(1 << i for i in range(4, 32)),
        enable=(_TPR_SHADOW, _Secondary.VIRTUALIZE_APIC_ACCESSES),
    ),
    with_field(Field.TPR_THRESHOLD, 0, 15, enable=(_TPR_SHADOW, _Secondary.VIRTUALIZE_APIC_ACCESSES)),
)


def _vtpr(threshold: int, vtpr: int, *enable: Any) -> Settings:
    return {
        "enable": (_TPR_SHADOW, *enable),
        "fields": {Field.TPR_THRESHOLD: threshold, Field.VIRTUAL_APIC_ADDRESS: PAGE},
        "memory": {PAGE: bytes(0x80) + bytes([vtpr])},
    }


fixed(
    "tpr-threshold-above-vtpr",
    [_vtpr(1, 0x0F), _vtpr(15, 0xE0), _vtpr(8, 0x70)],
    [_vtpr(0, 0), _vtpr(1, 0x10), _vtpr(15, 0xF0), _vtpr(7, 0x70)],
)


def _needs(name: str, control: Any, *needed: Any, others: tuple[Any, ...] = (), **settings: Any) -> None:
    """`control` is 1 and what it needs is 0; then both are 1."""
    for one in needed:
        rest = tuple(flag for flag in needed if flag is not one)
        bad = {"enable": (control, *rest, *others), "disable": (one,), **settings}
        good = {"enable": (control, *needed, *others), **settings}
        fixed(name, [bad], [good])


_needs("x2apic-mode-needs-tpr-shadow", _Secondary.VIRTUALIZE_X2APIC_MODE, _TPR_SHADOW)
_needs("apic-register-virtualization-needs-tpr-shadow", _Secondary.APIC_REGISTER_VIRTUALIZATION, _TPR_SHADOW)
_needs("virtual-interrupt-delivery-needs-tpr-shadow", _Secondary.VIRTUAL_INTERRUPT_DELIVERY, _TPR_SHADOW)
_needs("ipi-virtualization-needs-tpr-shadow", _Tertiary.IPI_VIRTUALIZATION, _TPR_SHADOW, fields=_IPI_FIELDS)
fixed(
    "x2apic-mode-excludes-apic-accesses",
    [{"enable": (_Secondary.VIRTUALIZE_X2APIC_MODE, _TPR_SHADOW, _Secondary.VIRTUALIZE_APIC_ACCESSES)}],
    [
        {"enable": (_Secondary.VIRTUALIZE_X2APIC_MODE, _TPR_SHADOW)},
        {"enable": (_TPR_SHADOW, _Secondary.VIRTUALIZE_APIC_ACCESSES)},
    ],
)
_needs(
    "virtual-interrupt-delivery-needs-external-interrupt-exiting",
    _Secondary.VIRTUAL_INTERRUPT_DELIVERY,
    PinControls.EXTERNAL_INTERRUPT_EXITING,
    others=(_TPR_SHADOW,),
)


def _posted_without(control: Any) -> list[Settings]:
    return [{"enable": tuple(flag for flag in _POSTED if flag is not control), "disable": (control,)}]


fixed(
    "posted-interrupts-need-virtual-interrupt-delivery",
    _posted_without(_Secondary.VIRTUAL_INTERRUPT_DELIVERY),
    [{"enable": _POSTED}],
)
fixed(
    "posted-interrupts-need-acknowledge",
    _posted_without(ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT),
    [{"enable": _POSTED}],
)
fixed(
    "posted-interrupt-notification-vector",
    with_field(Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR, *(1 << i for i in range(8, 16)), enable=_POSTED),
    with_field(Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR, 0, 0xFF, enable=_POSTED),
)
fixed(
    "virtual-nmis-need-nmi-exiting",
    [{"enable": (PinControls.VIRTUAL_NMIS,), "disable": (PinControls.NMI_EXITING,)}],
    [
        {"enable": (PinControls.VIRTUAL_NMIS, PinControls.NMI_EXITING)},
        {"disable": (PinControls.NMI_EXITING,)},
    ],
)
_needs(
    "nmi-window-exiting-needs-virtual-nmis",
    PrimaryControls.NMI_WINDOW_EXITING,
    PinControls.VIRTUAL_NMIS,
    others=(PinControls.NMI_EXITING,),
)

# --- VPID, EPT, VM functions -------------------------------------------------------------------------------
fixed(
    "vpid-is-not-zero",
    with_field(Field.VPID, 0, enable=(_Secondary.ENABLE_VPID,)),
    with_field(Field.VPID, 1, 0xFFFF, enable=(_Secondary.ENABLE_VPID,)),
)
_ROOT = layout.EPT_TABLES


def _eptps(*values: int) -> list[Settings]:
    return [{"enable": (_EPT,), "eptp": _ROOT | value} for value in values]


_WB_4 = 6 | 3 << 3


@pair("eptp-memory-type")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.ept_vpid
    types = {0: can.memory_type_uc, 6: can.memory_type_wb}
    good = [kind for kind, supported in types.items() if supported]
    return Pair(
        _eptps(*(kind | 3 << 3 for kind in range(8) if kind not in good)),
        _eptps(*(kind | 3 << 3 for kind in good)),
    )


@pair("eptp-page-walk-length")
def _(processor: Processor) -> Pair:
    five = processor.target.capabilities.ept_vpid.page_walk_length_5
    return Pair(_eptps(*(6 | n << 3 for n in range(8) if n != 3 and not (n == 4 and five))), _eptps(_WB_4))


@pair("eptp-accessed-dirty")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.ept_vpid.accessed_dirty
    return Pair([] if can else _eptps(_WB_4 | 1 << 6), _eptps(_WB_4 | 1 << 6) if can else _eptps(_WB_4))


@pair("eptp-supervisor-shadow-stack")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.ept_vpid.supervisor_shadow_stack
    return Pair([] if can else _eptps(_WB_4 | 1 << 7), _eptps(_WB_4 | 1 << 7) if can else _eptps(_WB_4))


fixed("eptp-reserved", _eptps(*(_WB_4 | 1 << i for i in range(8, 12))), _eptps(_WB_4))


@pair("eptp-width")
def _(processor: Processor) -> Pair:
    return Pair(_eptps(*(_WB_4 | bit for bit in processor.beyond)), _eptps(_WB_4))


_needs("pml-needs-ept", _Secondary.ENABLE_PML, _EPT, fields={Field.PML_ADDRESS: PAGE, Field.PML_INDEX: 511})
_needs("unrestricted-guest-needs-ept", _Secondary.UNRESTRICTED_GUEST, _EPT)
_needs("mode-based-execute-control-needs-ept", _Secondary.MODE_BASED_EXECUTE_CONTROL_FOR_EPT, _EPT)
_needs(
    "sub-page-write-permissions-needs-ept",
    _Secondary.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
    _EPT,
    fields={Field.SUB_PAGE_PERMISSION_TABLE_POINTER: PAGE},
)
_VMFUNC: Settings = {
    "enable": (_Secondary.ENABLE_VM_FUNCTIONS, _EPT),
    "fields": {Field.EPTP_LIST_ADDRESS: PAGE},
}


@pair("vm-function-controls-reserved")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.vmfunc.raw
    return Pair(
        with_field(Field.VM_FUNCTION_CONTROLS, *bits(~can & (1 << 64) - 1), **_VMFUNC),
        with_field(Field.VM_FUNCTION_CONTROLS, 0, can, **_VMFUNC),
    )


_SWITCHING = {Field.VM_FUNCTION_CONTROLS: 1, Field.EPTP_LIST_ADDRESS: PAGE}
_needs("eptp-switching-needs-ept", _Secondary.ENABLE_VM_FUNCTIONS, _EPT, fields=_SWITCHING)

# --- Intel PT, TSC, HLAT -----------------------------------------------------------------------------------
_PT = (
    _Secondary.PT_USES_GUEST_PHYSICAL_ADDRESSES,
    _EPT,
    EntryControls.LOAD_IA32_RTIT_CTL,
    ExitControls.CLEAR_IA32_RTIT_CTL,
)
for _name, _control in (
    ("pt-guest-physical-addresses-needs-ept", _EPT),
    ("pt-guest-physical-addresses-need-load", EntryControls.LOAD_IA32_RTIT_CTL),
    ("pt-guest-physical-addresses-need-clear", ExitControls.CLEAR_IA32_RTIT_CTL),
):
    fixed(
        _name,
        [
            {
                "enable": tuple(flag for flag in _PT if flag is not _control),
                "disable": (_control,),
                "fields": {Field.GUEST_IA32_RTIT_CTL: 0},
            }
        ],
        [{"enable": _PT, "fields": {Field.GUEST_IA32_RTIT_CTL: 0}}],
    )
_HLAT_FIELDS = {Field.HLAT_POINTER: PAGE, Field.HLAT_PREFIX_SIZE: 0}
_needs("hlat-needs-ept", _Tertiary.ENABLE_HLAT, _EPT, fields=_HLAT_FIELDS)
_needs("ept-paging-write-control-needs-ept", _Tertiary.EPT_PAGING_WRITE_CONTROL, _EPT)
_needs("guest-paging-verification-needs-ept", _Tertiary.GUEST_PAGING_VERIFICATION, _EPT)
_HLAT: Settings = {"enable": (_Tertiary.ENABLE_HLAT, _EPT), "fields": _HLAT_FIELDS}
fixed(
    "hlat-pointer-reserved",
    with_field(Field.HLAT_POINTER, *(PAGE | bit for bit in bits(0xFE7)), **_HLAT),
    with_field(Field.HLAT_POINTER, PAGE, PAGE | 0x18, **_HLAT),
)


@pair("hlat-pointer-width")
def _(processor: Processor) -> Pair:
    return Pair(
        with_field(Field.HLAT_POINTER, *(PAGE | bit for bit in processor.beyond), **_HLAT),
        with_field(Field.HLAT_POINTER, PAGE, **_HLAT),
    )


@pair("hlat-prefix-size")
def _(processor: Processor) -> Pair:
    most = processor.target.capabilities.ept_vpid.max_hlat_prefix_size
    return Pair(
        with_field(Field.HLAT_PREFIX_SIZE, most + 1, **_HLAT),
        with_field(Field.HLAT_PREFIX_SIZE, most, **_HLAT),
    )


# --- VM-exit and VM-entry controls -------------------------------------------------------------------------
_TIMER = PinControls.ACTIVATE_PREEMPTION_TIMER
fixed(
    "save-preemption-timer-needs-timer",
    [{"enable": (ExitControls.SAVE_PREEMPTION_TIMER_VALUE,), "disable": (_TIMER,)}],
    [{"enable": (ExitControls.SAVE_PREEMPTION_TIMER_VALUE, _TIMER)}, {"disable": (_TIMER,)}],
)


def _msr_area(address: Field, count: Field) -> None:
    # STAR takes any value; an entry of the areas is 16 bytes.
    content = {PAGE: (0xC000_0081).to_bytes(4, "little") + bytes(12)}
    # Where the count is 0 the address is not looked at.
    none = {"fields": {count: 0, address: (1 << 64) - 1}}
    good = [none, {"fields": {count: 1, address: PAGE}, "memory": content}]

    def of(at: int, number: int) -> Settings:
        return {"fields": {count: number, address: at}, "memory": content}

    fixed(f"{lower(address)}-alignment", [of(PAGE + bit, 1) for bit in (1, 2, 4, 8)], good)

    @pair(f"{lower(address)}-width")
    def begins(processor: Processor) -> Pair:
        return Pair([of(PAGE | bit, 1) for bit in processor.beyond], good)

    @pair(f"{lower(address)}-end")
    def ends(processor: Processor) -> Pair:
        last = processor.top + 0xFF0
        return Pair([of(last, 2), of(processor.top, 257)], good)


_msr_area(Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT)
_msr_area(Field.EXIT_MSR_LOAD_ADDRESS, Field.EXIT_MSR_LOAD_COUNT)
_msr_area(Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT)
