"""What the rules of VM entry say of a VMCS, as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vmxlab.oracle.entry import EntryOutcome, EntryVerdict
from vmxlab.reports.tables import Column, Table
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason
from vmxlab.sdm.fields import Field

_BROKEN = (
    Column("rule", "broken rule", style="bold red"),
    Column("section", "SDM Vol. 3C"),
    Column("sentence", "what must be so", fold=True),
    Column("values", "what is there", fold=True),
    Column("detail", "which bits", fold=True),
)
_UNCHECKED = (
    Column("why", "not checked, because", fold=True),
    Column("rules", "rules", fold=True),
)

_OUTCOMES = {
    EntryOutcome.ENTERS: "the VM entry takes place",
    EntryOutcome.INVALID_CONTROLS: "VMfailValid, error 7 (invalid control fields)",
    EntryOutcome.INVALID_HOST_STATE: "VMfailValid, error 8 (invalid host-state fields)",
    EntryOutcome.INVALID_GUEST_STATE: "VM-entry failure, exit reason 33 (invalid guest state)",
    EntryOutcome.MSR_LOADING_FAILS: "VM-entry failure, exit reason 34 (MSR loading)",
}


def broken_table(verdict: EntryVerdict) -> Table:
    """A row for each broken rule."""
    rows = [
        (
            item.rule.name,
            item.rule.section,
            item.rule.sentence,
            ", ".join(f"{field.name} {value:#x}" for field, value in item.values.items()),
            item.detail,
        )
        for item in verdict.broken
    ]
    return Table(_BROKEN, rows)


def unchecked_table(verdict: EntryVerdict) -> Table:
    """A row for each reason why rules were not checked."""
    reasons: dict[str, list[str]] = {}
    for item in verdict.unchecked:
        reasons.setdefault(item.why, []).append(item.rule.name)
    return Table(_UNCHECKED, list(reasons.items()))


def outcome_in_words(verdict: EntryVerdict) -> str:
    """What the processor does, by the rules that are broken; or that none of the checked ones is."""
    if not verdict.broken:
        return _OUTCOMES[EntryOutcome.ENTERS] + (
            " as far as it was checked" if verdict.unchecked else ": no rule is broken"
        )
    return " or ".join(_OUTCOMES[outcome] for outcome in EntryOutcome if outcome in verdict.by_broken)


_OUTCOME_OF_REASON = {
    ENTRY_FAILURE_BIT | ExitReason.ENTRY_FAILURE_GUEST_STATE: EntryOutcome.INVALID_GUEST_STATE,
    ENTRY_FAILURE_BIT | ExitReason.ENTRY_FAILURE_MSR_LOADING: EntryOutcome.MSR_LOADING_FAILS,
}


_VMFAILS = frozenset({EntryOutcome.INVALID_CONTROLS, EntryOutcome.INVALID_HOST_STATE})


def contradiction(verdict: EntryVerdict, fields: Mapping[Field, int]) -> str | None:
    """What the VMCS itself tells of its failed entry, where that is not what the broken rules make of it.

    The exit reason tells of failures by guest state and MSR loading alone: a VMfail leaves it as it was
    (SDM Vol. 3C, 27.2 and 27.8).
    """
    told = _OUTCOME_OF_REASON.get(fields.get(Field.EXIT_REASON, 0))
    if told is None or told in verdict.by_broken:
        return None
    text = f"the VMCS itself says {_OUTCOMES[told]}"
    if verdict.by_broken <= _VMFAILS:
        return (
            f"{text}: that processor allows what is broken here, so its capabilities are not the ones given"
        )
    return f"{text}: no rule that could be checked tells why"


def lines(verdict: EntryVerdict) -> Iterator[str]:
    """A line for each broken rule, for messages."""
    for item in verdict.broken:
        yield f"broken rule: {item}"
