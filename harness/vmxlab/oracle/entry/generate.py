"""VMCSs around the limits of the rules: a valid one with one to three fields changed at random.

Each field has values of interest: a bit over, the limits, their neighbours, what is not aligned or not
canonical. The same seed gives the same VMCSs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vmxlab.cases.case import Case
from vmxlab.cases.program import Mode
from vmxlab.image import layout
from vmxlab.image.compiler import CompiledCase
from vmxlab.oracle.entry.verdict import RULES, EntryOutcome, EntryVerdict
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
)
from vmxlab.sdm.fields import Field, FieldWidth
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import RFLAGS, ActivityState
from vmxlab.structures import Capabilities

HLT = b"\xf4"
MOST_CHANGES = 3

_CONTROLS = {controls.field for controls in ControlSet}
_EVENT = Field.ENTRY_INTERRUPTION_INFORMATION
_CANONICAL = ((1 << 47) - 1, 1 << 47, (1 << 64) - (1 << 47), (1 << 64) - (1 << 47) - 1, 1 << 56, 1 << 63)
_KEPT = (Field.HOST_RIP, Field.HOST_RSP, Field.HOST_CR3, Field.HOST_CR4, Field.HOST_IA32_EFER)
"""Host state that the monitor can't come back from, if it is loaded with anything else."""

_FEATURES: tuple[BitFlags, ...] = (
    PrimaryControls.USE_TPR_SHADOW,
    PrimaryControls.USE_MSR_BITMAPS,
    PinControls.VIRTUAL_NMIS,
    SecondaryControls.ENABLE_VPID,
    SecondaryControls.ENABLE_PML,
    SecondaryControls.ENABLE_VM_FUNCTIONS,
    SecondaryControls.VMCS_SHADOWING,
    SecondaryControls.EPT_VIOLATION_VE,
    SecondaryControls.USE_TSC_SCALING,
    SecondaryControls.VIRTUALIZE_APIC_ACCESSES,
    SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
    ExitControls.LOAD_IA32_PAT,
    ExitControls.LOAD_IA32_PERF_GLOBAL_CTRL,
    ExitControls.SAVE_PREEMPTION_TIMER_VALUE,
    EntryControls.LOAD_IA32_PAT,
    EntryControls.LOAD_IA32_PERF_GLOBAL_CTRL,
)
_PAGE = layout.FREE_PAGES
_AREA_ENTRIES = 32
_AREA = (int(Msr.IA32_STAR).to_bytes(4, "little") + bytes(12)) * _AREA_ENTRIES
_AREAS: Mapping[Field, tuple[Field, int]] = {
    Field.EXIT_MSR_STORE_COUNT: (Field.EXIT_MSR_STORE_ADDRESS, _PAGE + 0x1000),
    Field.EXIT_MSR_LOAD_COUNT: (Field.EXIT_MSR_LOAD_ADDRESS, _PAGE + 0x2000),
    Field.ENTRY_MSR_LOAD_COUNT: (Field.ENTRY_MSR_LOAD_ADDRESS, _PAGE + 0x3000),
}
_FEATURE_FIELDS: Mapping[BitFlags, Mapping[Field, int]] = {
    SecondaryControls.ENABLE_VPID: {Field.VPID: 1},
    SecondaryControls.ENABLE_PML: {Field.PML_ADDRESS: _PAGE, Field.PML_INDEX: 511},
    SecondaryControls.ENABLE_VM_FUNCTIONS: {Field.VM_FUNCTION_CONTROLS: 0, Field.EPTP_LIST_ADDRESS: _PAGE},
    SecondaryControls.EPT_VIOLATION_VE: {Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: _PAGE},
    SecondaryControls.USE_TSC_SCALING: {Field.TSC_MULTIPLIER: 1 << 48},
    SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT: {Field.SUB_PAGE_PERMISSION_TABLE_POINTER: _PAGE},
    ExitControls.LOAD_IA32_PAT: {Field.HOST_IA32_PAT: 0x0007_0406_0007_0406},
    ExitControls.LOAD_IA32_PERF_GLOBAL_CTRL: {Field.HOST_IA32_PERF_GLOBAL_CTRL: 0},
    EntryControls.LOAD_IA32_PAT: {Field.GUEST_IA32_PAT: 0x0007_0406_0007_0406},
    EntryControls.LOAD_IA32_PERF_GLOBAL_CTRL: {Field.GUEST_IA32_PERF_GLOBAL_CTRL: 0},
}


def base_cases(capabilities: Capabilities) -> list[Case]:
    """Valid VMCSs to start from: the modes of L2, events, and all features that the processor has."""
    have = [flag for flag in _FEATURES if capabilities.supports(flag)]
    fields: dict[Field, int] = {}
    for flag in have:
        fields |= _FEATURE_FIELDS.get(flag, {})
    bases = [
        Case(program=HLT),
        Case(program=HLT, mode=Mode.PROTECTED),
        Case(program=HLT, mode=Mode.PROTECTED, fields=_virtual_8086()),
        Case(program=HLT, enable=have, fields=fields),
        Case(program=HLT, fields={_EVENT: 0x8000_0306}),
        Case(program=HLT, fields={Field.GUEST_RFLAGS: int(RFLAGS.FIXED1 | RFLAGS.IF | RFLAGS.TF)}),
    ]
    if capabilities.supports(SecondaryControls.UNRESTRICTED_GUEST):
        bases.append(Case(program=HLT, mode=Mode.REAL))
        bases.append(
            Case(program=HLT, enable=(SecondaryControls.UNRESTRICTED_GUEST, SecondaryControls.ENABLE_EPT))
        )
    return [_with_areas(case) for case in bases]


def _with_areas(case: Case) -> Case:
    """MSR areas of entries that all can be loaded; the counts are 0."""
    addresses = dict(_AREAS.values())
    return replace(case, fields={**case.fields, **addresses}, memory=dict.fromkeys(addresses.values(), _AREA))


def _virtual_8086() -> dict[Field, int]:
    fields = {Field.GUEST_RFLAGS: int(RFLAGS.VM | RFLAGS.FIXED1), Field.GUEST_RIP: 0}
    for register in ("ES", "CS", "SS", "DS", "FS", "GS"):
        selector = 0x800 if register == "CS" else 0
        fields[Field[f"GUEST_{register}_SELECTOR"]] = selector
        fields[Field[f"GUEST_{register}_BASE"]] = selector << 4
        fields[Field[f"GUEST_{register}_LIMIT"]] = 0xFFFF
        fields[Field[f"GUEST_{register}_ACCESS_RIGHTS"]] = 0xF3
    return fields


@dataclass(frozen=True, slots=True)
class GeneratedVmcs:
    """One of the bases, by its number, and what is changed in it."""

    base: int
    changes: Mapping[Field, int]


class Generator:
    """An endless iterator of changed VMCSs."""

    def __init__(self, seed: int, bases: Sequence[CompiledCase]) -> None:
        self._random = random.Random(seed)
        self._bases = bases
        ruled = {field for rule in RULES for field in rule.fields} | _CONTROLS
        self._fields = [sorted(ruled & base.fields.keys()) for base in bases]

    def __iter__(self) -> Iterator[GeneratedVmcs]:
        while True:
            yield self._one()

    def _one(self) -> GeneratedVmcs:
        choose = self._random
        base = choose.randrange(len(self._bases))
        changes: dict[Field, int] = {}
        for _ in range(choose.randint(1, MOST_CHANGES)):
            if choose.random() < 0.15:
                changes |= self._event()
                continue
            field = choose.choice(self._fields[base])
            fields = self._bases[base].fields
            changes[field] = self._value(field, changes.get(field, fields[field]))
        return GeneratedVmcs(base, changes)

    def _event(self) -> dict[Field, int]:
        """An event to inject, more often than not a good one."""
        choose = self._random
        vector = choose.choice((0, 1, 2, 3, 6, 8, 13, 14, 18, 20, 21, 31, 32, 128, 255))
        # 7 without "monitor trap flag" is left to a test of its own: it kills an engine.
        kind = choose.choice((0, 2, 2, 3, 3, 4, 5, 6, 1))
        more = choose.choice((0, 0, 0, 0, 1 << 11, 1 << 11, 1 << choose.randrange(12, 31)))
        return {
            _EVENT: 1 << 31 | more | kind << 8 | (2 if kind == 2 and choose.random() < 0.8 else vector),
            Field.ENTRY_EXCEPTION_ERROR_CODE: choose.choice((0, 0, 0, 0x7FFF, 0x8000, 0x1_0000)),
            Field.ENTRY_INSTRUCTION_LENGTH: choose.choice((1, 1, 2, 15, 0, 16)),
        }

    def _value(self, field: Field, base: int) -> int:
        choose = self._random
        shapes: list[Callable[[], int]] = [lambda: base ^ 1 << choose.randrange(field.bits)]
        if field not in _CONTROLS:
            shapes += [
                lambda: 0,
                lambda: field.max,
                lambda: min(base + 1, field.max),
                lambda: max(base - 1, 0),
                lambda: base ^ 1 << choose.randrange(min(16, field.bits)),
            ]
        if field.width in (FieldWidth.NATURAL, FieldWidth.U64) and field not in _CONTROLS:
            width = self._bases[0].target.physical_address_width
            shapes += [
                lambda: choose.choice(_CANONICAL),
                lambda: choose.choice(
                    (1 << width, (1 << width) - 0x1000, base | 1 << width, base | 1 << width - 1)
                ),
            ]
        if field.name.endswith("ACCESS_RIGHTS"):
            shapes += [
                lambda: base & ~0xF | choose.randrange(16),
                lambda: base ^ choose.choice((1 << 16, 3 << 5)),
            ]
        if field.name.endswith("_LIMIT"):
            shapes.append(
                lambda: choose.choice((0xFFF, 0x1000, 0xFFFE, 0xFFFF, 0x1_0000, 0xF_FFFF, 0x10_0FFF))
            )
        if field in _AREAS:
            counts = [0, 1, 2, _AREA_ENTRIES]
            if field is not Field.ENTRY_MSR_LOAD_COUNT:
                # Of this one the rules look at each entry; what lies behind the area nobody knows, so that a
                # greater count would only be left open, and slowly.
                counts += [1 << 20, field.max]
            shapes = [lambda: choose.choice(counts)]
        if field is Field.GUEST_INTERRUPTIBILITY_STATE:
            shapes += [lambda: choose.randrange(32)] * 3
        if field is Field.GUEST_ACTIVITY_STATE:
            shapes += [lambda: choose.randrange(5)] * 3
        if field is Field.GUEST_PENDING_DEBUG_EXCEPTIONS:
            shapes += [lambda: choose.choice((1, 0x1000, 0x1001, 0x4000, 0x5000, 0x1_1000, 0x1_0000))] * 3
        if field is Field.ENTRY_INTERRUPTION_INFORMATION:
            shapes = [lambda: self._event()[_EVENT]]
        return choose.choice(shapes)()


def can_be_asked(verdict: EntryVerdict, fields: Mapping[Field, int], base: Mapping[Field, int]) -> bool:
    """Whether the monitor gets an answer and lives on, whatever the processor does that the rules allow.

    Not if the monitor may come back with another program counter, or L2 may never come back.
    """
    if verdict.outcomes <= {EntryOutcome.INVALID_CONTROLS, EntryOutcome.INVALID_HOST_STATE}:
        return True
    if any(fields.get(field) != base.get(field) for field in _KEPT):
        return False
    for count, (address, place) in _AREAS.items():
        if fields[count] and (fields[count] > _AREA_ENTRIES or fields[address] != place):
            return False  # what lies there nobody knows; and on VM exit it would be a VMX abort
    if EntryOutcome.ENTERS not in verdict.outcomes:
        return True
    ends = fields[Field.PIN_BASED_CONTROLS] & PinControls.ACTIVATE_PREEMPTION_TIMER
    active = fields[Field.GUEST_ACTIVITY_STATE] == ActivityState.ACTIVE
    if not ends and not (
        active and fields[Field.PRIMARY_PROCESSOR_BASED_CONTROLS] & PrimaryControls.HLT_EXITING
    ):
        return False
    return fields[Field.GUEST_ACTIVITY_STATE] != ActivityState.WAIT_FOR_SIPI
