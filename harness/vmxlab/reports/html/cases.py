"""One case in detail, as data that the page's script shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from iced_x86 import Decoder

from vmxlab.cases.memory import PROGRAM
from vmxlab.reports.disassembly import Code
from vmxlab.reports.html.parts import Place
from vmxlab.reports.html.pictures import accesses_item
from vmxlab.reports.results.facts import ALL, NONE
from vmxlab.reports.results.model import RecordedCase
from vmxlab.reports.runs import exit_table, remarks, state_at_entry
from vmxlab.reports.tables import Value
from vmxlab.sdm.controls import ControlSet
from vmxlab.structures import EPTPointer

Item = dict[str, Any]

_UNUSED = {
    ("io_bitmap", ALL): "No I/O bitmap is used: every access exits (unconditional I/O exiting).",
    ("io_bitmap", NONE): "No I/O bitmap is used, and no access exits: unconditional I/O exiting is 0.",
    ("msr_bitmap", ALL): "No MSR bitmap is used: every RDMSR and WRMSR exits.",
}
_LABELS = {
    "full_reason": "exit reason",
    "qualification": "exit qualification",
    "instruction_length": "instruction length",
    "instruction_information": "instruction information",
    "guest_linear_address": "guest-linear address",
    "guest_physical_address": "guest-physical address",
    "interruption_information": "interruption information",
    "interruption_error_code": "interruption error code",
    "idt_vectoring_information": "IDT-vectoring information",
    "idt_vectoring_error_code": "IDT-vectoring error code",
}


def case_item(case: RecordedCase, place_of: Callable[[str], Place | None]) -> Item:
    """Everything that is shown of a case; what is empty is left out.

    `place_of` a structure's digest is where its item lies, None for one that was never told.
    """
    run = case.run
    at_entry = state_at_entry(None) if case.at_entry is None else case.at_entry
    rows = exit_table(run, case.code, at_entry).json_rows()
    item: Item = {
        "why": case.why,
        "engine": run.engine,
        "mode": case.mode,
        "end": run.end.value if run.end is not None else "",
        "total": case.exits,
        "exits": [_exit_row(row) for row in rows],
        "at_entry": {name: f"{value:#x}" for name, value in at_entry.items() if value},
        "outcomes": [[str(outcome), outcome.ok] for outcome in run.outcomes],
        # Rules that were broken have a table of their own.
        "remarks": remarks(run),
        "broken": [
            [rule.rule, rule.section, rule.sentence, _pairs(rule.values), rule.detail] for rule in case.broken
        ],
        "controls": [
            control for name, values in case.controls.items() for control in _control(name, *values)
        ],
        "fields": list(case.fields.items()),
        "source": case.source,
        "listing": _listing(case.code),
        "accesses": accesses_item(run, case.code),
        "eptp": f"EPTP {EPTPointer.from_bits(case.eptp).describe()}" if case.eptp is not None else "",
        "log": "\n".join(case.log_lines),
        "left_out": case.left_out,
        "log_path": str(run.log_path) if run.log_path is not None else "",
    }
    for name in ("io_bitmap", "msr_bitmap", "ept"):
        digest = getattr(case, name)
        if digest:
            item[name] = _UNUSED.get((name, digest)) or place_of(digest) or "It is not in the file."
    return {key: value for key, value in item.items() if value or key == "exits"}


def _exit_row(row: Mapping[str, Value]) -> list[object]:
    """Reason, whether it is a failed VM entry, description, RIP, instruction, what changed; the fields."""
    details = cast(Mapping[str, Any], row["details"])
    return [
        int(details["full_reason"], 16) & 0xFFFF,
        int(details["entry_failed"]),
        row["description"],
        row["rip"],
        row["instruction"] or "",
        " ".join(map(str, cast(Sequence[object], row["changed"]))),
        list(_fields(details, cast(Mapping[str, Any], row["qualification"]))),
    ]


def _fields(details: Mapping[str, Any], qualification: Mapping[str, Any]) -> Iterator[list[str]]:
    """The VM-exit information that is not 0, with the qualification's fields by the SDM's names."""
    for key, label in _LABELS.items():
        value = details[key]
        if value not in (0, "0x0"):
            yield [label, f"{value}"]
        if key == "qualification":
            for name, field in qualification.items():
                if name not in ("type", "raw"):
                    words = {True: "yes", False: "no"}[field] if isinstance(field, bool) else str(field)
                    yield [f"\u00a0\u00a0{name.replace('_', ' ')}", words]


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _control(name: str, value: int, baseline: int) -> Iterator[list[object]]:
    """Of each that differs the set's name, the control's, and whether the case set (1) or cleared it (0)."""
    controls = ControlSet[name]
    for bit in range(controls.bits):
        if (value ^ baseline) >> bit & 1:
            flag = controls.flags(1 << bit)
            yield [controls.value, flag.name or f"bit {bit}", value >> bit & 1]


def _listing(code: Code | None) -> list[list[str]]:
    """The program, an instruction a row: address, bytes, text. What is no instruction ends it."""
    if code is None:
        return []
    program, rows = code.chunks.get(PROGRAM, b""), []
    for instruction in Decoder(code.mode.bits, program, ip=PROGRAM):
        start = instruction.ip - PROGRAM
        if instruction.is_invalid:
            rows.append([f"{instruction.ip:#x}", program[start:].hex(" "), "(data, or no instruction)"])
            break
        content = program[start : start + instruction.len].hex(" ")
        rows.append([f"{instruction.ip:#x}", content, code.at(instruction.ip - code.cs_base) or ""])
    return rows
