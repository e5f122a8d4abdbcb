"""The page that lists all rules of VM entry, made from them: docs/vm-entry-rules.md.

python -m vmxlab.reports.entry_rules_page > docs/vm-entry-rules.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

from vmxlab.oracle.entry import RULES, Area, EntryOutcome, EntryRule
from vmxlab.oracle.entry.not_rules import NOT_RULES
from vmxlab.sdm import EDITION
from vmxlab.sdm.flags import BitFlags

_TITLES = {
    "27.2.1.1": "VM-execution control fields",
    "27.2.1.2": "VM-exit control fields",
    "27.2.1.3": "VM-entry control fields",
    "27.2.2": "host control registers and MSRs",
    "27.2.3": "host segment and descriptor-table registers",
    "27.2.4": "address-space size",
    "27.3.1.1": "guest control registers, debug registers and MSRs",
    "27.3.1.2": "guest segment registers",
    "27.3.1.3": "guest descriptor-table registers",
    "27.3.1.4": "guest RIP, RFLAGS and SSP",
    "27.3.1.5": "guest non-register state",
    "27.3.1.6": "guest page-directory-pointer-table entries",
    "27.4": "loading MSRs",
}
_FAILURES = {
    Area.CONTROLS: EntryOutcome.INVALID_CONTROLS,
    Area.HOST_STATE: EntryOutcome.INVALID_HOST_STATE,
    Area.GUEST_STATE: EntryOutcome.INVALID_GUEST_STATE,
    Area.MSR_LOADING: EntryOutcome.MSR_LOADING_FAILS,
}


def rules_page() -> str:
    """The text of the page."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# The rules of VM entry"
    yield ""
    yield "Made from the code by `make docs`: don't edit."
    yield ""
    yield (
        f"{len(RULES)} rules, in the order of the {EDITION}, Vol. 3C, chapter 27. `vmxlab check` says which "
        "of them a VMCS breaks; each is tried on processors by `tests/exits/test_vm_entry_rules*.py`."
    )
    for section, group in groupby(RULES, key=lambda rule: rule.section):
        rules = list(group)
        yield from ("", f"## {section}: {_TITLES.get(section, 'other checks')}", "")
        yield f"Broken: {_FAILURES[rules[0].area].value}."
        yield from ("", "| rule | what must be so | where | fields |", "| --- | --- | --- | --- |")
        yield from (_row(rule) for rule in rules)
    yield from ("", "## What is no rule here", "")
    yield "What the chapter says besides, and why no rule is about it."
    yield from ("", "| section | check | why not |", "| --- | --- | --- |")
    yield from (_cells(item.section, item.check, item.why) for item in NOT_RULES)
    yield ""


def _row(rule: EntryRule) -> str:
    where = [f"{_name(flag)} is 1" for flag in rule.when] + [f"{_name(flag)} is 0" for flag in rule.unless]
    return _cells(
        f"`{rule.name}`", rule.sentence, ", ".join(where), _joined(field.name for field in rule.fields)
    )


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _name(flag: BitFlags) -> str:
    return f"{type(flag).__name__}.{flag.name}"


def _joined(names: Iterable[str]) -> str:
    return ", ".join(names)


if __name__ == "__main__":
    sys.stdout.write(rules_page())
