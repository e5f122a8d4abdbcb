"""What a rule of VM entry is, and the table that all of them stand in (SDM Vol. 3C, chapter 27).

A rule is a function of a VMCS that says whether it holds; its docstring is the sentence that a person reads.
It answers True or False, or raises `NotChecked` where it can't know: a field, a capability or a piece of
memory is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags

if TYPE_CHECKING:
    from vmxlab.oracle.entry.vmcs import Vmcs


class Area(Enum):
    """Which check a rule belongs to, and so how the processor tells that it is broken (27.2, 27.3, 27.8)."""

    CONTROLS = "VMX controls"
    """VMfailValid(7)."""
    HOST_STATE = "host-state area"
    """VMfailValid(8)."""
    GUEST_STATE = "guest-state area"
    """VM-entry failure, exit reason 33."""
    MSR_LOADING = "VM-entry MSR-load area"
    """VM-entry failure, exit reason 34."""


class EntryQualification(Enum):
    """Exit qualifications of a VM-entry failure due to invalid guest state (27.8)."""

    OTHER = 0
    PDPTES = 2
    NMI_INJECTION = 3
    LINK_POINTER = 4


class NotChecked(Exception):
    """A rule that can't be answered; the text says what is missing."""


Holds = Callable[["Vmcs"], bool]
Detail = Callable[["Vmcs"], str]


@dataclass(frozen=True, slots=True)
class EntryRule:
    """One check of a VM entry.

    name           unique, such as "guest-cs-type"
    area           which check it is part of
    section        of SDM Vol. 3C
    sentence       what must be so
    fields         the VMCS fields it reads, besides the controls in `when` and `unless`
    when, unless   controls: the rule applies where all of `when` are 1 and none of `unless` is
    qualification  of the entry failure, for rules on guest state
    holds          the check itself
    detail         of a rule about many bits: which of them break it, by name; None: all is said
    """

    name: str
    area: Area
    section: str
    sentence: str
    fields: tuple[Field, ...]
    when: tuple[BitFlags, ...]
    unless: tuple[BitFlags, ...]
    qualification: EntryQualification
    holds: Holds
    detail: Detail | None = None

    def applies(self, vmcs: Vmcs) -> bool:
        """Whether the controls are such that the processor checks this at all."""
        for flag in self.when:
            if not vmcs.on(flag):
                return False
        return not any(vmcs.on(flag) for flag in self.unless)

    @property
    def control_fields(self) -> tuple[Field, ...]:
        """The control fields that `when` and `unless` stand in."""
        return tuple(dict.fromkeys(ControlSet.of(flag).field for flag in (*self.when, *self.unless)))


class RuleTable:
    """Rules in the order of the manual."""

    def __init__(self, area: Area, section: str) -> None:
        self.area = area
        self.section = section
        self.rules: list[EntryRule] = []

    def rule(
        self,
        *fields: Field,
        when: Iterable[BitFlags] = (),
        unless: Iterable[BitFlags] = (),
        qualification: EntryQualification = EntryQualification.OTHER,
        detail: Detail | None = None,
    ) -> Callable[[Holds], Holds]:
        """A function as a rule: its name with dashes, its docstring as the sentence."""

        def add(holds: Holds) -> Holds:
            self.add(
                holds.__name__.replace("_", "-"),
                " ".join((holds.__doc__ or "").split()),
                holds,
                fields,
                when=when,
                unless=unless,
                qualification=qualification,
                detail=detail,
            )
            return holds

        return add

    def add(
        self,
        name: str,
        sentence: str,
        holds: Holds,
        fields: Iterable[Field],
        *,
        when: Iterable[BitFlags] = (),
        unless: Iterable[BitFlags] = (),
        qualification: EntryQualification = EntryQualification.OTHER,
        detail: Detail | None = None,
    ) -> None:
        """A rule that is one of several alike."""
        rule = EntryRule(
            name=name,
            area=self.area,
            section=self.section,
            sentence=sentence,
            fields=tuple(fields),
            when=tuple(when),
            unless=tuple(unless),
            qualification=qualification,
            holds=holds,
            detail=detail,
        )
        self.rules.append(rule)
