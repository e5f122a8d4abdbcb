"""Runs made of records alone: of one case on the wire, or of every case in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TypeVar, overload

from vmxlab.cases.case import Case
from vmxlab.console.records import Record
from vmxlab.console.run import End, Exit, Fault, Outcome, OutcomeKind, Run, Verdict
from vmxlab.errors import ProtocolError
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector

_EXIT_KEYS = {
    "qual": "raw_qualification",
    "len": "instruction_length",
    "info": "raw_instruction_information",
    "gla": "guest_linear_address",
    "gpa": "guest_physical_address",
    "intr": "raw_interruption_information",
    "ierr": "interruption_error_code",
    "idtv": "raw_idt_vectoring_information",
    "iderr": "idt_vectoring_error_code",
    "rip": "rip",
    "rflags": "rflags",
}
_REGISTERS = frozenset(GENERAL_REGISTERS)
_T = TypeVar("_T", bound=IntEnum)
_NOT_IN_OUTCOME = ("op", "rc")


def run_from_records(records: Sequence[Record], case: Case | None = None, **about: object) -> Run:
    """The run that the records of one case describe, from its "case" record on.

    Raises ProtocolError where records are missing (exits are numbered and counted) or make no sense.
    """
    builder = RunBuilder()
    for record in records:
        try:
            builder.take(record)
        except (KeyError, ValueError) as error:
            raise ProtocolError(f"a record makes no sense: {record} ({error!r})") from error
    return builder.run(case=case, records=tuple(records), **about)


def runs_from_records(records: Iterable[Record]) -> list[Run]:
    """Every run in a log, the last one possibly cut short (`end` None).

    Never raises for what stands in the log: a run whose records are missing or make no sense is an ERROR with
    its ProtocolError, and the others are what they are.
    """
    groups: list[list[Record]] = []
    is_open = False
    for record in records:
        if record.kind not in _CASE_KINDS or (record.kind == "fault" and not is_open):
            continue  # a fault at the prompt is of no case
        if record.starts_case or not is_open:
            groups.append([])
        groups[-1].append(record)
        is_open = record.kind != "end"
    return [_run_or_error(group) for group in groups]


def _run_or_error(records: Sequence[Record]) -> Run:
    try:
        if not records[0].starts_case:
            raise ProtocolError(f"the start of this case is missing; its first record is {records[0]}")
        return run_from_records(records)
    except ProtocolError as error:
        builder = RunBuilder()
        for record in records:
            if record.starts_case:
                with contextlib.suppress(KeyError, ValueError):
                    builder.take(record)
        return Run(
            case=None,
            number=builder.number,
            name=builder.name,
            records=tuple(records),
            error=error,
            verdict_on_error=Verdict.ERROR,
        )


_CASE_KINDS = ("case", "live", "vmx", "exit", "vmcs", "snapshot", "sweep", "memory", "fault", "end")


class RunBuilder:
    """A run as it grows, record by record.

    What does not go together (exits or bytes of memory that are missing) raises ProtocolError; where it is
    `lenient`, it is put in words in `oddities`, and the run goes on with what is there.
    """

    def __init__(self, *, lenient: bool = False) -> None:
        self.lenient = lenient
        self.oddities: list[str] = []
        self.number = 0
        self.name = ""
        self.outcomes: list[Outcome] = []
        self.exits: list[Exit] = []
        self.memory: dict[int, bytes] = {}
        self.faults: list[Fault] = []
        self.vmcs: dict[Field, int] = {}
        self.end: End | None = None
        self._memory_start: int | None = None
        self._vmcs_of = (0, 0)
        self._last: dict[str, int] = dict.fromkeys((*GENERAL_REGISTERS, "rflags"), 0)

    def take(self, record: Record) -> None:
        """Add a record. Raises KeyError or ValueError for one that makes no sense."""
        getattr(self, f"_take_{record.kind}", self._ignore)(record)

    def run(self, *, case: Case | None = None, **about: object) -> Run:
        """What has come so far."""
        return Run(
            case=case,
            number=self.number,
            name=self.name,
            outcomes=tuple(self.outcomes),
            exits=tuple(self.exits),
            memory=self.memory,
            faults=tuple(self.faults),
            failed_vmcs=self.vmcs,
            end=self.end,
            **about,  # type: ignore[arg-type]
        )

    def _ignore(self, record: Record) -> None:
        pass

    def _odd(self, what: str, record: Record) -> None:
        if not self.lenient:
            raise ProtocolError(f"{what}: {record}")
        self.oddities.append(what)

    def _take_case(self, record: Record) -> None:
        self.number = record.number("id")
        self.name = record.values.get("name", "")

    _take_live = _take_case

    def _take_vmcs(self, record: Record) -> None:
        if self._vmcs_of != (len(self.outcomes), len(self.exits)):  # another VM entry has failed since
            self._vmcs_of = (len(self.outcomes), len(self.exits))
            self.vmcs = {}
        self.vmcs |= {Field(int(key[1:], 16)): int(value, 16) for key, value in record.values.items()}

    def _take_vmx(self, record: Record) -> None:
        if "ok" in record.values:
            for item in record.values["ok"].split(","):
                operation, _, count = item.partition(":")
                self._succeeded(operation, int(count, 16) if count else None)
            return
        values = {k: int(v, 16) for k, v in record.values.items() if k not in _NOT_IN_OUTCOME}
        self.outcomes.append(
            Outcome(
                operation=record.values["op"],
                kind=OutcomeKind(record.values["rc"]),
                error=_known(InstructionError, values.get("error")),
                vector=_known(Vector, values.get("vector")),
                error_code=values.get("code"),
                field=_known(Field, values.get("field")),
                msr=values.get("msr"),
                value=values.get("value"),
                count=values.get("n"),
                register=_known(ApicRegister, values.get("register")),
            )
        )

    def _succeeded(self, operation: str, count: int | None = None) -> None:
        self.outcomes.append(Outcome(operation, OutcomeKind.SUCCEED, count=count))

    def _take_exit(self, record: Record) -> None:
        if "by" in record.values:  # an exit says itself that the VM entry before it took place
            self._succeeded(record.values["by"])
        values = {k: int(v, 16) for k, v in record.values.items() if k != "by"}
        number = values.pop("n")
        following = self.exits[-1].number + 1 if self.exits else 0
        if number != following:
            self._odd(f"exit {following} is missing: the next record is of exit {number}", record)
        fields: dict[str, int] = {}
        watched: dict[Field | int, int] = {}
        for key, value in values.items():
            if key in self._last:
                self._last[key] = value
            elif key in _EXIT_KEYS:
                fields[_EXIT_KEYS[key]] = value
            elif key.startswith("f"):
                encoding = int(key[1:], 16)
                watched[_known(Field, encoding)] = value
        fields["rflags"] = self._last["rflags"]
        registers = {name: self._last[name] for name in GENERAL_REGISTERS}
        self.exits.append(
            Exit(number=number, full_reason=values["reason"], registers=registers, watched=watched, **fields)
        )

    def _take_memory(self, record: Record) -> None:
        """A range of memory, in one record or in several: each says how many bytes are left."""
        at, data = record.number("at"), bytes.fromhex(record.values["data"])
        if self._memory_start is None:
            self._memory_start = at
            self.memory[at] = b""
        start = self._memory_start
        following = start + len(self.memory[start])
        if at != following:
            self._odd(f"memory from {following:#x} is missing", record)
            self._memory_start = start = at
            self.memory[at] = b""
        self.memory[start] += data
        if not record.number("left", 0):
            self._memory_start = None

    def _take_fault(self, record: Record) -> None:
        self.faults.append(
            Fault(
                _known(Vector, record.number("vector")),
                record.number("code"),
                record.number("rip"),
                record.number("cr2"),
            )
        )

    def _take_end(self, record: Record) -> None:
        count = record.number("exits")
        if count != len(self.exits):
            self._odd(f"the case had {count} exits, records of {len(self.exits)} arrived", record)
        self.end = End(record.values["why"])


@overload
def _known(kind: type[_T], value: int) -> _T | int: ...
@overload
def _known(kind: type[_T], value: int | None) -> _T | int | None: ...
def _known(kind: type[_T], value: int | None) -> _T | int | None:
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        return value
