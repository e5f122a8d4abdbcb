"""The controls of a case, computed from the capability MSRs of the processor that will run it.

Baseline plus what the case enables, less what it disables; a control that the processor lacks, or can't do
without, raises MissingCapability with its bit. Bits that the processor demands (the default1 class, SDM Vol.
3D, A.2) are set; that is part of the baseline, and `vmxlab run` shows it. `raw_controls` are written as they
are.
"""

from __future__ import annotations

from functools import reduce

from vmxlab.cases.case import Case
from vmxlab.cases.program import Mode
from vmxlab.errors import MissingCapability
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


def compute_controls(case: Case, capabilities: Capabilities) -> dict[ControlSet, int]:
    """The value of every control field this processor has. Raises MissingCapability."""
    wanted = dict.fromkeys(ControlSet, 0)
    for flag in _WELCOME:
        if capabilities.supports(flag):
            wanted[ControlSet.of(flag)] |= flag
    for flag in (*_needed(case, capabilities), *case.enable):
        capabilities.require(flag)
        wanted[ControlSet.of(flag)] |= flag
    for flag in case.needs:
        capabilities.require(flag)
    for flag in case.disable:
        wanted[ControlSet.of(flag)] &= ~flag
    _activate_further_sets(wanted, case, capabilities)
    values = {controls: capabilities.adjust(controls, value) for controls, value in wanted.items()}
    _refuse_forced(values, case, capabilities)
    values |= case.raw_controls
    return {c: v for c, v in values.items() if v or _always_written(c) or c in case.raw_controls}


def _needed(case: Case, capabilities: Capabilities) -> list[BitFlags]:
    """What the case's structures and mode ask for."""
    flags: list[BitFlags] = [ExitControls.HOST_ADDRESS_SPACE_SIZE]
    if case.mode is Mode.LONG:
        flags.append(EntryControls.IA32E_MODE_GUEST)
    flags.append(
        PrimaryControls.UNCONDITIONAL_IO_EXITING if case.io_bitmap is None else PrimaryControls.USE_IO_BITMAPS
    )
    if case.msr_bitmap is not None:
        flags.append(PrimaryControls.USE_MSR_BITMAPS)
    if case.mode is Mode.REAL:
        flags += [SecondaryControls.ENABLE_EPT, SecondaryControls.UNRESTRICTED_GUEST]
    elif case.ept is not None or case.eptp is not None or capabilities.supports(SecondaryControls.ENABLE_EPT):
        flags.append(SecondaryControls.ENABLE_EPT)
    return flags


def _activate_further_sets(wanted: dict[ControlSet, int], case: Case, capabilities: Capabilities) -> None:
    for controls, flag in (
        (ControlSet.SECONDARY, PrimaryControls.ACTIVATE_SECONDARY_CONTROLS),
        (ControlSet.TERTIARY, PrimaryControls.ACTIVATE_TERTIARY_CONTROLS),
        (ControlSet.SECONDARY_EXIT, ExitControls.ACTIVATE_SECONDARY_CONTROLS),
    ):
        if wanted[controls] or controls in case.raw_controls:
            capabilities.require(flag)
            if flag not in case.disable:
                wanted[ControlSet.of(flag)] |= flag


def _refuse_forced(values: dict[ControlSet, int], case: Case, capabilities: Capabilities) -> None:
    for flag in case.disable:
        controls = ControlSet.of(flag)
        if values[controls] & flag:
            bit = int(flag).bit_length() - 1
            msr = capabilities.control_msr(controls).name
            raise MissingCapability(f"the 0-setting of {flag.name}", f"{msr}[{bit}] is 1, which")


def _always_written(controls: ControlSet) -> bool:
    return controls in (ControlSet.PIN, ControlSet.PRIMARY, ControlSet.EXIT, ControlSet.ENTRY)


def union(flags: tuple[BitFlags, ...]) -> int:
    """All bits of a tuple of flags of one set."""
    return reduce(lambda bits, flag: bits | flag, flags, 0)
