"""All rules of VM entry, and what they say together about one VMCS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from vmxlab.oracle.entry import (
    entry_controls,
    execution_controls,
    exit_controls,
    guest_registers,
    guest_rest,
    guest_segments,
    host_state,
    msr_loading,
)
from vmxlab.oracle.entry.rule import Area, EntryRule, NotChecked
from vmxlab.oracle.entry.vmcs import Environment, Vmcs
from vmxlab.sdm.fields import Field

RULES: tuple[EntryRule, ...] = tuple(
    rule
    for table in (
        execution_controls.TABLE,
        exit_controls.TABLE,
        entry_controls.TABLE,
        *host_state.TABLES,
        guest_registers.TABLE,
        guest_segments.TABLE,
        *guest_rest.TABLES,
        msr_loading.TABLE,
    )
    for rule in table.rules
)
"""Every rule, in the order of the manual."""


class EntryOutcome(Enum):
    """What a VM entry does (SDM Vol. 3C, 27.2, 27.3.1, 27.4, 27.8)."""

    ENTERS = "enters"
    INVALID_CONTROLS = "VMfailValid(7)"
    INVALID_HOST_STATE = "VMfailValid(8)"
    INVALID_GUEST_STATE = "VM-entry failure 33"
    MSR_LOADING_FAILS = "VM-entry failure 34"


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that does not hold, the fields that it read, and the exit qualification that it makes (27.8).

    The qualification is None for controls and host state: these fail with an error number. `detail` names
    the bits that break a rule about many of them; "" for all other rules.
    """

    rule: EntryRule
    values: Mapping[Field, int]
    qualification: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{field.name} = {value:#x}" for field, value in self.values.items())
        there = "; ".join(text for text in (values, self.detail) if text)
        return f"{self.rule.name} ({self.rule.section}): {self.rule.sentence}" + (there and f" [{there}]")


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A rule that could not be answered, and why; with the qualification that it would make, if broken."""

    rule: EntryRule
    why: str
    qualification: int | None = None

    def __str__(self) -> str:
        return f"{self.rule.name} ({self.rule.section}): not checked: {self.why}"


@dataclass(frozen=True, slots=True)
class EntryVerdict:
    """What all rules say about a VMCS: every one that is broken, and every one that was not checked."""

    broken: tuple[Broken, ...]
    unchecked: tuple[Unchecked, ...]

    @property
    def by_broken(self) -> frozenset[EntryOutcome]:
        """What the broken rules alone lead to; several where the manual leaves it open (27.2)."""
        broken = {item.rule.area for item in self.broken}
        for stage in _STAGES:
            if broken & stage.keys():
                return frozenset(outcome for area, outcome in stage.items() if area in broken)
        return frozenset({EntryOutcome.ENTERS})

    @property
    def outcomes(self) -> frozenset[EntryOutcome]:
        """What the processor may do: several where the manual leaves it open, or a rule was not checked.

        Controls and host state are checked in any order (27.2), then guest state, then MSRs are loaded.
        """
        broken = {item.rule.area for item in self.broken}
        open_ = {item.rule.area for item in self.unchecked}
        possible: set[EntryOutcome] = set()
        for stage in _STAGES:
            possible |= {outcome for area, outcome in stage.items() if area in broken | open_}
            if broken & stage.keys():
                return frozenset(possible)
        return frozenset(possible | {EntryOutcome.ENTERS})

    @property
    def qualifications(self) -> frozenset[int]:
        """The exit qualifications that a failure by guest state may have: its checks come in any order."""
        items: tuple[Broken | Unchecked, ...] = (*self.broken, *self.unchecked)
        return frozenset(
            item.qualification
            for item in items
            if item.rule.area is Area.GUEST_STATE and item.qualification is not None
        )

    @property
    def msr_qualifications(self) -> frozenset[int]:
        """The exit qualifications that a failure by MSR loading may have: the numbers of entries, from 1.

        Entries are loaded in order (27.4): it is the first that fails, or one before it that was not checked.
        """
        broken = _entry_numbers(self.broken)
        last = min(broken, default=None)
        unchecked = {n for n in _entry_numbers(self.unchecked) if last is None or n < last}
        return frozenset(unchecked if last is None else unchecked | {last})

    @property
    def names(self) -> frozenset[str]:
        """The names of the broken rules."""
        return frozenset(item.rule.name for item in self.broken)


_STAGES: tuple[Mapping[Area, EntryOutcome], ...] = (
    {
        Area.CONTROLS: EntryOutcome.INVALID_CONTROLS,
        Area.HOST_STATE: EntryOutcome.INVALID_HOST_STATE,
    },
    {Area.GUEST_STATE: EntryOutcome.INVALID_GUEST_STATE},
    {Area.MSR_LOADING: EntryOutcome.MSR_LOADING_FAILS},
)


def _entry_numbers(items: Sequence[Broken | Unchecked]) -> set[int]:
    return {
        item.qualification
        for item in items
        if item.rule.area is Area.MSR_LOADING and item.qualification is not None
    }


def check_entry(
    fields: Mapping[Field, int], environment: Environment, rules: Sequence[EntryRule] = RULES
) -> EntryVerdict:
    """Every rule of VM entry over the fields of a VMCS, on one processor.

    `rules`: others than those of the SDM, for a processor that is known to differ.
    """
    broken: list[Broken] = []
    unchecked: list[Unchecked] = []
    for rule in rules:
        vmcs = Vmcs(fields, environment)
        try:
            if rule.applies(vmcs) and not rule.holds(vmcs):
                broken.append(_broken(rule, vmcs))
        except NotChecked as missing:
            unchecked.append(Unchecked(rule, str(missing), _qualification(rule, vmcs)))
    return EntryVerdict(tuple(broken), tuple(unchecked))


def _broken(rule: EntryRule, vmcs: Vmcs) -> Broken:
    values = dict(vmcs.was_read)
    return Broken(rule, values, _qualification(rule, vmcs), rule.detail(vmcs) if rule.detail else "")


def _qualification(rule: EntryRule, vmcs: Vmcs) -> int | None:
    if rule.area is Area.GUEST_STATE:
        return int(rule.qualification.value)
    return vmcs.msr_entry if rule.area is Area.MSR_LOADING else None
