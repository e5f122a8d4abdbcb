"""The controls of a case, computed from the capability MSRs of the processor that will run it.

Baseline plus what the case enables, less what it disables; a control that the processor lacks, or can't do
without, raises MissingCapability with its bit. Bits that the processor demands (the default1 class, SDM Vol.
3D, A.2) are set; that is part of the baseline, and `vmxlab run` shows it. `raw_controls` are written as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from vmxlab.cases.case import Case
from vmxlab.cases.program import Mode
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
)
from vmxlab.sdm.flags import BitFlags
from vmxlab.structures import Capabilities
from vmxlab.structures.capabilities import Need

# Wanted where the processor has them; their absence skips no case.
_WELCOME: tuple[BitFlags, ...] = (
    PinControls.EXTERNAL_INTERRUPT_EXITING,
    PinControls.NMI_EXITING,
    PinControls.ACTIVATE_PREEMPTION_TIMER,
    PrimaryControls.HLT_EXITING,
    ExitControls.SAVE_DEBUG_CONTROLS,
    ExitControls.SAVE_IA32_EFER,
    ExitControls.LOAD_IA32_EFER,
    EntryControls.LOAD_DEBUG_CONTROLS,
    EntryControls.LOAD_IA32_EFER,
)


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a case says about controls: cases differ much less in this than in all else."""

    mode: Mode
    enable: tuple[BitFlags, ...]
    disable: tuple[BitFlags, ...]
    needs: tuple[Need, ...]
    raw: tuple[tuple[ControlSet, int], ...]
    io_bitmap: bool
    msr_bitmap: bool
    ept: bool
    virtual_apic_page: bool
    posted_interrupts: bool


def compute_controls(case: Case, capabilities: Capabilities) -> Mapping[ControlSet, int]:
    """The value of every control field this processor has. Raises MissingCapability."""
    wish = _Wish(
        mode=case.mode,
        enable=tuple(case.enable),
        disable=tuple(case.disable),
        needs=tuple(case.needs),
        raw=tuple(case.raw_controls.items()),
        io_bitmap=case.io_bitmap is not None,
        msr_bitmap=case.msr_bitmap is not None,
        ept=case.ept is not None or case.eptp is not None,
        virtual_apic_page=case.virtual_apic_page is not None,
        posted_interrupts=case.posted_interrupts is not None,
    )
    return _compute(wish, capabilities)


@lru_cache(maxsize=512)
def _compute(wish: _Wish, capabilities: Capabilities) -> Mapping[ControlSet, int]:
    wanted = dict.fromkeys(ControlSet, 0)
    for flag in _WELCOME:
        if capabilities.supports(flag):
            wanted[ControlSet.of(flag)] |= flag
    for flag in (*_needed(wish, capabilities), *wish.enable):
        capabilities.require(flag)
        wanted[ControlSet.of(flag)] |= flag
    for need in wish.needs:
        capabilities.require(need)
    for flag in wish.disable:
        wanted[ControlSet.of(flag)] &= ~flag
    _activate_further_sets(wanted, wish, capabilities)
    values = {controls: capabilities.adjust(controls, value) for controls, value in wanted.items()}
    for flag in wish.disable:
        capabilities.require_clear(flag)
    raw = dict(wish.raw)
    values |= raw
    return MappingProxyType({c: v for c, v in values.items() if v or c in raw or c in _ALWAYS_WRITTEN})


def _needed(wish: _Wish, capabilities: Capabilities) -> list[BitFlags]:
    """What the case's structures and mode ask for."""
    flags: list[BitFlags] = [ExitControls.HOST_ADDRESS_SPACE_SIZE]
    if wish.mode is Mode.LONG:
        flags.append(EntryControls.IA32E_MODE_GUEST)
    flags.append(
        PrimaryControls.UNCONDITIONAL_IO_EXITING if not wish.io_bitmap else PrimaryControls.USE_IO_BITMAPS
    )
    if wish.msr_bitmap:
        flags.append(PrimaryControls.USE_MSR_BITMAPS)
    if wish.virtual_apic_page:
        flags.append(PrimaryControls.USE_TPR_SHADOW)
    if wish.posted_interrupts:
        flags.append(PinControls.PROCESS_POSTED_INTERRUPTS)
    if wish.mode is Mode.REAL:
        flags += [SecondaryControls.ENABLE_EPT, SecondaryControls.UNRESTRICTED_GUEST]
    elif wish.ept or capabilities.supports(SecondaryControls.ENABLE_EPT):
        flags.append(SecondaryControls.ENABLE_EPT)
    return flags


def _activate_further_sets(wanted: dict[ControlSet, int], wish: _Wish, capabilities: Capabilities) -> None:
    for controls, flag in (
        (ControlSet.SECONDARY, PrimaryControls.ACTIVATE_SECONDARY_CONTROLS),
        (ControlSet.TERTIARY, PrimaryControls.ACTIVATE_TERTIARY_CONTROLS),
        (ControlSet.SECONDARY_EXIT, ExitControls.ACTIVATE_SECONDARY_CONTROLS),
    ):
        if wanted[controls] or controls in dict(wish.raw):
            capabilities.require(flag)
            if flag not in wish.disable:
                wanted[ControlSet.of(flag)] |= flag


_ALWAYS_WRITTEN = (ControlSet.PIN, ControlSet.PRIMARY, ControlSet.EXIT, ControlSet.ENTRY)
