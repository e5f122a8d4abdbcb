"""What is kept of a run: its records, from which it is made again, and what they don't hold.

Facts are what JSON knows. What the processor got or gave is hex text: few JSON readers have 64-bit integers.
Bitmaps and EPT paging structures, which many cases share, are told once and named by a digest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from vmxlab.cases.case import Case
from vmxlab.cases.controls import compute_controls
from vmxlab.cases.memory import guest_ept
from vmxlab.cases.source import case_source
from vmxlab.console.records import Record
from vmxlab.console.run import Run
from vmxlab.errors import VmxlabError
from vmxlab.image.compiler import assemble_programs
from vmxlab.reports.disassembly import Code
from vmxlab.reports.runs import describe_exit, state_at_entry, title, verdict_text
from vmxlab.sdm.controls import ControlSet, PrimaryControls
from vmxlab.structures import Ept, IOBitmap, MsrBitmap

if TYPE_CHECKING:
    from vmxlab.oracle.entry import Broken

MAX_EXITS = 1000
"""So many exits of a case are kept (the default of `Limits.exits`); the rest is in the serial log."""
MAX_RECORDS = 4000
"""So many records of a case are kept, its end apart."""

ALL, NONE = "all", "none"
"""In place of a bitmap: none is used, and every access exits, or no access does."""

Facts = dict[str, Any]


class FactsWriter:
    """The facts of tests, one after the other: each structure is in those of the first test that has it."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._new: dict[str, Facts] = {}

    def text(self, runs: Sequence[Run], **about: object) -> str:
        """A JSON object of `about` with the `cases` of a test, and the `structures` that are new."""
        self._new = {}
        cases = [self._case(run) for run in runs]
        return json.dumps({**about, "cases": cases, "structures": self._new}, separators=(",", ":"))

    def _case(self, run: Run) -> Facts:
        records = list(_kept(run.records))
        facts = {
            "name": title(run),
            "number": run.number,
            "engine": run.engine,
            "verdict": run.verdict.value,
            "why": verdict_text(run),
            "end": run.end.value if run.end is not None else None,
            "exits": len(run.exits),
            "reasons": [[int(reason), count] for reason, count in Counter(run.reasons).items()],
            "unkept": list(dict.fromkeys(describe_exit(exit_) for exit_ in run.exits[MAX_EXITS:])),
            "records": [record.line for record in records],
            "left_out": len(run.records) - len(records),
            "log": str(run.log_path) if run.log_path is not None else None,
            "by_need": run.by_need,
            "broken": [_broken(item) for item in run.broken_rules()],
        }
        if run.case is not None:
            facts |= _about_case(run.case, run) | self._structures(run.case, run)
        return facts

    # --- structures --------------------------------------------------------------------------------------

    def _structures(self, case: Case, run: Run) -> Facts:
        """Which bitmaps and EPT paging structures the processor was given, as the case began."""
        compiled = run.compiled
        primary = None if compiled is None else compiled.controls[ControlSet.PRIMARY]
        uses_io = case.io_bitmap is not None
        uses_msr = case.msr_bitmap is not None
        io_without = ALL
        if primary is not None:
            uses_io = bool(primary & PrimaryControls.USE_IO_BITMAPS)
            uses_msr = bool(primary & PrimaryControls.USE_MSR_BITMAPS)
            io_without = ALL if primary & PrimaryControls.UNCONDITIONAL_IO_EXITING else NONE
        ept = case.ept
        if ept is None and compiled is not None and compiled.eptp is not None:
            ept = guest_ept()
        return {
            "io_bitmap": self._io_bitmap(case.io_bitmap or IOBitmap()) if uses_io else io_without,
            "msr_bitmap": self._msr_bitmap(case.msr_bitmap or MsrBitmap()) if uses_msr else ALL,
            "ept": None if ept is None else self._ept(ept),
            "eptp": None if compiled is None or compiled.eptp is None else f"{compiled.eptp:#x}",
        }

    def _io_bitmap(self, bitmap: IOBitmap) -> str:
        digest = _digest("io", bitmap.to_bytes())
        if self._is_new(digest):
            self._new[digest] = {"ports": _spans(bitmap.intercepted_ports())}
        return digest

    def _msr_bitmap(self, bitmap: MsrBitmap) -> str:
        digest = _digest("msr", bitmap.to_bytes())
        if self._is_new(digest):
            self._new[digest] = {
                "read": _spans(bitmap.intercepted_msrs()),
                "write": _spans(bitmap.intercepted_msrs(write=True)),
            }
        return digest

    def _ept(self, ept: Ept) -> str:
        runs = [
            [
                run.level,
                run.index,
                f"{run.gpa:#x}",
                f"{run.entry:#x}",
                run.count,
                run.step,
                run.leads_to_table,
            ]
            for run in ept.runs()
        ]
        digest = _digest("ept", json.dumps(runs).encode())
        if self._is_new(digest):
            self._new[digest] = {"entries": runs}
        return digest

    def _is_new(self, digest: str) -> bool:
        new = digest not in self._told
        self._told.add(digest)
        return new


def _digest(kind: str, content: bytes) -> str:
    return f"{kind}-{sha256(content).hexdigest()[:24]}"


def _spans(ranges: Iterator[range]) -> list[list[int]]:
    """First and last of each range."""
    return [[found[0], found[-1]] for found in ranges]


# --- records -----------------------------------------------------------------------------------------------


def _kept(records: Sequence[Record]) -> Iterator[Record]:
    """The first records, and the end."""
    exits = kept = 0
    for record in records:
        exits += record.kind == "exit"
        fits = kept < MAX_RECORDS and (record.kind != "exit" or exits <= MAX_EXITS)
        if fits or record.kind == "end":
            kept += 1
            yield record


# --- the case ----------------------------------------------------------------------------------------------


def _about_case(case: Case, run: Run) -> Facts:
    return {
        "source": _source(case),
        "mode": case.mode.name,
        "at_entry": {name: f"{value:#x}" for name, value in state_at_entry(case).items() if value},
        "fields": {field.name: f"{value:#x}" for field, value in case.fields.items()},
        "controls": _controls(case, run),
        **_code(case, run),
    }


def _source(case: Case) -> str:
    try:
        return case_source(case)
    except (TypeError, KeyError) as error:  # an object that the case source does not know
        return f"# This case can't be written as Python text: {error!r}\n"


def _code(case: Case, run: Run) -> Facts:
    """The program in machine code, and of the case's data what L2 was in at an exit."""
    try:
        (program,) = assemble_programs([case])
    except VmxlabError:  # then the case is an ERROR that says so
        return {}
    code = Code.of(case, program)
    met = {code.cs_base + exit_.rip for exit_ in run.exits}
    data = {
        f"{at:#x}": content.hex()
        for at, content in code.chunks.items()
        if content is not program and any(at <= address < at + len(content) for address in met)
    }
    return {"program": program.hex(), "code": data, "cs_base": f"{code.cs_base:#x}"}


def _controls(case: Case, run: Run) -> dict[str, list[str]]:
    """By set of controls what was written, and what the baseline of this mode writes on this processor."""
    if run.compiled is None:
        return {}
    try:
        baseline = compute_controls(Case(mode=case.mode), run.compiled.target.capabilities)
    except VmxlabError:  # a mode that this processor does not have: the case took it by raw controls
        baseline = {}
    return {
        controls.name: [f"{value:#x}", f"{baseline.get(controls, 0):#x}"]
        for controls, value in run.compiled.controls.items()
    }


def _broken(item: Broken) -> Mapping[str, object]:
    return {
        "rule": item.rule.name,
        "section": item.rule.section,
        "sentence": item.rule.sentence,
        "values": {field.name: f"{value:#x}" for field, value in item.values.items()},
        "detail": item.detail,
    }
