"""Bitmaps and EPT paging structures as data for pictures, and what of them a case met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vmxlab.console.run import Exit, Run
from vmxlab.reports.disassembly import Code
from vmxlab.reports.html.passed import Passed, passed_accesses
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.qualifications import IoQualification
from vmxlab.structures.ept_tree import EntryRun

Item = dict[str, Any]

_EPT_EXITS = (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION)


def structure_item(told: Mapping[str, Any]) -> Item:
    """A structure as the facts tell it, ready to be drawn: of EPT entries everything is in words."""
    if "entries" not in told:
        return dict(told)
    return {"entries": [_entry(*entry) for entry in told["entries"]]}


def _entry(level: int, index: int, gpa: str, value: str, count: int, step: int, leads: bool) -> list[object]:
    """Level, name, first and last GPA, if it leads to a table, target, size, attributes, fault, count."""
    run = EntryRun(level, index, int(gpa, 16), int(value, 16), count, step, leads)
    return [
        run.level,
        run.name,
        run.gpa,
        run.last,
        run.leads_to_table,
        run.target,
        run.size.label if run.size is not None else "",
        run.attributes + (", not present" if run.is_absent else ""),
        run.fault,
        run.count,
    ]


def accesses_item(run: Run, code: Code | None) -> Item:
    """Ports, MSRs and guest-physical addresses: what exited how often, and what is known to have passed.

    `ports`, `reads` and `writes` are pairs of number and exits, for an access of several ports one for each;
    0 exits: it passed. `gpas` are pairs of an address and the number of the exit.
    """
    ports: Counter[int] = Counter()
    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    for exit_ in run.exits:
        ports.update(_ports(exit_))
        if exit_.reason == ExitReason.RDMSR:
            reads[exit_.registers["rcx"] & 0xFFFF_FFFF] += 1
        elif exit_.reason == ExitReason.WRMSR:
            writes[exit_.registers["rcx"] & 0xFFFF_FFFF] += 1
    passed = Passed()
    if code is not None:
        passed = passed_accesses(code, {exit_.rip for exit_ in run.exits if not exit_.entry_failed})
    found = {
        name: sorted({**dict.fromkeys(let_through, 0), **exited}.items())
        for name, exited, let_through in (
            ("ports", ports, passed.ports),
            ("reads", reads, passed.reads),
            ("writes", writes, passed.writes),
        )
    }
    gpas = [(e.guest_physical_address, e.number) for e in run.exits if e.reason in _EPT_EXITS]
    return {name: pairs for name, pairs in {**found, "gpas": gpas}.items() if pairs}


def _ports(exit_: Exit) -> range:
    """The ports that an access covered."""
    qualification = exit_.qualification
    if not isinstance(qualification, IoQualification):
        return range(0)
    first = qualification.port
    return range(first, min(first + qualification.size, 0x1_0000))
