"""What the rules of VM entry say of a VMCS, as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.oracle.entry import EntryOutcome, EntryVerdict
from vmxlab.reports.tables import Column, Table

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


def lines(verdict: EntryVerdict) -> Iterator[str]:
    """A line for each broken rule, for messages."""
    for item in verdict.broken:
        yield f"broken rule: {item}"
