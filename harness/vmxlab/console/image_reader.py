"""Reading a booted image: its cases' records as they come, until all are answered or the machine ends.

A damaged line costs its own case. A machine that dies or hangs costs the case it was in; those behind it are
left unanswered, for another image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vmxlab.cases.case import Case
from vmxlab.console.rebuild import run_from_records
from vmxlab.console.run import Run
from vmxlab.console.unfinished import crashed_run, failed_run
from vmxlab.errors import LogError, MachineError, ProtocolError, VmxlabError

if TYPE_CHECKING:
    from vmxlab.console.records import BrokenLine, Record
    from vmxlab.console.session import Session


class ImageReader:
    """Reads the runs of an image's cases, which are numbered as in their records."""

    def __init__(
        self,
        session: Session,
        cases: Mapping[int, Case],
        boot_deadline_s: float,
        case_deadline_s: float,
    ) -> None:
        self._session = session
        self._cases = cases
        self._boot_deadline_s = boot_deadline_s
        self._case_deadline_s = case_deadline_s
        self._runs: dict[int, Run] = {}

    def read(self) -> dict[int, Run]:
        """The runs, by number: at least one, and all unless the machine or its log came to an end."""
        try:
            self._session.boot_image(self._boot_deadline_s)
            self._read_all()
            missing: VmxlabError = ProtocolError("the image left no records of this case")
        except (MachineError, LogError) as error:
            self._end_with(error)
            return self._runs
        except ProtocolError as error:
            missing = error
        self._session.located(missing)
        for number, case in self._cases.items():
            if number not in self._runs:
                self._runs[number] = failed_run(case, number, missing)
        return self._runs

    def _read_all(self) -> None:
        while True:
            number = self._next()
            seconds = None if number is None else self._cases[number].limits.seconds
            cases = self._session.read_cases(seconds or self._case_deadline_s)
            for records in cases:
                self._answer(records)
            if cases:
                continue
            broken = self._session.take_broken()
            if number is None or not broken:
                return
            self._fail(number, _damage(broken))

    def _next(self) -> int | None:
        """The case behind the last one that was answered: what left no records before it has none to come."""
        last = max(self._runs, default=-1)
        return next((number for number in self._cases if number > last), None)

    def _answer(self, records: Sequence[Record]) -> None:
        number = _number_of(records)
        if number is None or number not in self._cases:
            raise ProtocolError(f"records of a case that is not in the image: {records[0]}")
        machine, log = self._session.machine, self._session.log
        broken = self._session.take_broken()
        try:
            if broken:
                raise _damage(broken)
            run = run_from_records(
                records, self._cases[number], engine=machine.info.title(), log_path=log.path
            )
            if run.end is None:
                raise ProtocolError("the record of the case's end is missing")
        except ProtocolError as error:
            self._fail(number, error)
        else:
            self._runs[number] = run

    def _fail(self, number: int, error: VmxlabError) -> None:
        self._runs[number] = failed_run(self._cases[number], number, self._session.located(error))

    def _end_with(self, error: MachineError | LogError) -> None:
        """Lay the end at the door of the case whose records are open, else of the next one."""
        open_cases = [n for r in self._session.records if (n := _number_of([r])) in self._cases]
        number = open_cases[-1] if open_cases else self._next()
        if number is None:
            return  # every case was answered before
        if isinstance(error, MachineError):
            self._runs[number] = crashed_run(error, self._cases[number], number, self._session)
        else:  # perhaps there is room for the logs of the cases behind it
            self._fail(number, error)


def _number_of(records: Sequence[Record]) -> int | None:
    """The number that the first record of a case gives it."""
    with contextlib.suppress(KeyError, ValueError):
        if records[0].kind == "case":
            return records[0].number("id")
    return None


def _damage(broken: Sequence[BrokenLine]) -> ProtocolError:
    return ProtocolError(f"{len(broken)} lines of the serial stream are damaged; the first: {broken[0]}")
