"""The coverage table: each basic exit reason of the SDM (Vol. 3D, Appendix C) by engine.

Made from coverage files (`reports.coverage_file`), never by hand. A cell says by which test the reason was
seen, or why it was not: the processor lacks it, the engine differs, it can't be reached. Where nothing
explains it, it is "not seen", and that is a defect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from vmxlab.engines.unreachable import UNREACHABLE
from vmxlab.errors import CoverageError, MissingCapability
from vmxlab.reports.coverage_file import CoverageFile, Differs, Lacking, Platform, Seen
from vmxlab.reports.tables import Column, Table, Value
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.exit_requirements import EXIT_REQUIREMENTS

_ENTRY_FAILURES = frozenset(
    {
        ExitReason.ENTRY_FAILURE_GUEST_STATE,
        ExitReason.ENTRY_FAILURE_MSR_LOADING,
        ExitReason.ENTRY_FAILURE_MACHINE_CHECK,
    }
)
# Words of a reason's name that say nothing of what a test is about.
_COMMON_WORDS = frozenset({"or", "to", "access", "instruction", "failure", "below", "full", "signal"})


class Status(Enum):
    """What is known of a reason on an engine. The value is what a program reads."""

    SEEN = "seen"
    LACKING = "lacking"
    DIFFERS = "differs"
    UNREACHABLE = "unreachable"
    NOT_SEEN = "not seen"


@dataclass(frozen=True, slots=True)
class Cell:
    """A reason on an engine. `what` is the test, the bit, the key or the why; `more` counts further tests."""

    status: Status
    what: str = ""
    more: int = 0

    def __str__(self) -> str:
        match self.status:
            case Status.SEEN:
                test = self.what.rpartition("/")[2]
                return f"{test} (+{self.more})" if self.more else test
            case Status.LACKING:
                return f"processor lacks it ({self.what})"
            case Status.DIFFERS:
                return f"known difference ({self.what})"
            case Status.UNREACHABLE:
                return f"not reachable: {self.what}"
            case Status.NOT_SEEN:
                return "NOT SEEN"


class Coverage:
    """What all files together say. Raises CoverageError where they hold no engine."""

    def __init__(self, files: Sequence[CoverageFile]) -> None:
        self._files = files
        self._seen = [line for file in files for line in file.seen]
        self._lacking = [line for file in files for line in file.lacking]
        self._differs = [line for file in files for line in file.differs]
        self._processors = [line for file in files for line in file.processors]
        lines: Iterable[Seen | Lacking | Differs] = (*self._seen, *self._lacking, *self._differs)
        self.platforms = sorted({line.platform for line in lines})
        if not self.platforms:
            raise CoverageError("no test with an engine stands in these files: there is nothing to show")

    # --- the cells -------------------------------------------------------------------------------------

    @cached_property
    def cells(self) -> Mapping[ExitReason, Mapping[Platform, Cell]]:
        """Every reason on every engine."""
        return {
            reason: {platform: self._cell(reason, platform) for platform in self.platforms}
            for reason in ExitReason
        }

    def _cell(self, reason: ExitReason, platform: Platform) -> Cell:
        by = [line for line in self._seen if line.platform == platform and _shows(line, reason)]
        if by:
            tests = {_function(line.test) for line in by}
            best = min(by, key=lambda line: _distance(line, reason))
            return Cell(Status.SEEN, _function(best.test), len(tests) - 1)
        unreachable = UNREACHABLE.get(reason)
        if unreachable is not None and unreachable.holds_for(platform.engine):
            return Cell(Status.UNREACHABLE, f"{unreachable.why}; SDM {unreachable.section}")
        return self._explained_by_tests(reason, platform) or self._explained_by_processor(reason, platform)

    def _explained_by_tests(self, reason: ExitReason, platform: Platform) -> Cell | None:
        """Where all tests that show it on another engine were skipped here, or differ as is known."""
        shows = {line.test for line in self._seen if _shows(line, reason)}
        differs = sorted({d.key for d in self._differs if d.platform == platform and d.test in shows})
        lacking = {line.test: line.bit for line in self._lacking if line.platform == platform}
        rest = shows - {d.test for d in self._differs if d.platform == platform}
        if not shows or not rest <= set(lacking):
            return None
        if rest:
            bits = sorted({lacking[test] for test in rest})
            return Cell(Status.LACKING, ", ".join(bits))
        return Cell(Status.DIFFERS, ", ".join(differs))

    def _explained_by_processor(self, reason: ExitReason, platform: Platform) -> Cell:
        """Where none of the engine's models has what the reason takes, by its capability MSRs."""
        requirement = EXIT_REQUIREMENTS.get(reason)
        processors = [p for p in self._processors if p.platform == platform]
        if requirement is None or not processors:
            return Cell(Status.NOT_SEEN)
        bit = ""
        for processor in sorted(processors, key=lambda p: not p.is_default):
            try:
                processor.capabilities.require(requirement.flag)
            except MissingCapability as error:
                bit = bit or error.bit
            else:
                return Cell(Status.NOT_SEEN)
        return Cell(Status.LACKING, bit)

    # --- what follows ----------------------------------------------------------------------------------

    def count(self, platform: Platform) -> int:
        """How many reasons were seen on an engine."""
        return sum(cells[platform].status is Status.SEEN for cells in self.cells.values())

    def counts(self) -> list[str]:
        """ "bochs 2.7: 57 of 80 reasons seen", for each engine."""
        return [f"{p}: {self.count(p)} of {len(ExitReason)} reasons seen" for p in self.platforms]

    def defects(self, minimum: Mapping[str, int] | None = None) -> list[str]:
        """What is wrong, in words: reasons that nothing explains, a table that is wrong, too few seen."""
        found = []
        for platform in self.platforms:
            cells = {reason: cells[platform] for reason, cells in self.cells.items()}
            missing = [reason.name for reason, cell in cells.items() if cell.status is Status.NOT_SEEN]
            if missing:
                found.append(f"{platform}: not seen, and nothing says why: {', '.join(missing)}")
            wrong = [
                reason.name
                for reason, unreachable in UNREACHABLE.items()
                if unreachable.holds_for(platform.engine) and cells[reason].status is Status.SEEN
            ]
            if wrong:
                found.append(f"{platform}: seen, but called not reachable: {', '.join(wrong)}")
        return found + self._too_few(minimum or {})

    def _too_few(self, minimum: Mapping[str, int]) -> list[str]:
        found = []
        for engine, wanted in minimum.items():
            platforms = [platform for platform in self.platforms if platform.engine == engine]
            if not platforms:
                found.append(f"{engine}: no test of it stands in the files, at least {wanted} were wanted")
            found += [
                f"{platform}: {self.count(platform)} reasons seen, at least {wanted} were wanted"
                for platform in platforms
                if self.count(platform) < wanted
            ]
        return found

    def models(self, platform: Platform) -> list[str]:
        """The processor models on which something was seen, the default one first."""
        default = [p.model for p in self._processors if p.platform == platform and p.is_default]
        used = {model for line in self._seen if line.platform == platform for model in line.models}
        return sorted(used, key=lambda model: (model not in default, model))

    def remarks(self) -> list[str]:
        """What to know of the files: sessions in which not all passed."""
        return [
            f"{file.path}: pytest ended with status {file.status}, so a test may be missing here"
            for file in self._files
            if file.status
        ]

    # --- showing ---------------------------------------------------------------------------------------

    def table(self) -> Table:
        """A row a reason, a column an engine."""
        columns = [
            Column("number", "#", right=True),
            Column("reason", "exit reason", style="bold"),
            *(
                Column(str(platform), str(platform), fold=True, styles={"NOT SEEN": "bold red"})
                for platform in self.platforms
            ),
        ]
        rows: list[Sequence[Value]] = [
            (int(reason), reason.name, *(str(cells[platform]) for platform in self.platforms))
            for reason, cells in self.cells.items()
        ]
        return Table(columns, rows)

    def to_json(self, minimum: Mapping[str, int] | None = None) -> dict[str, Value]:
        """All of it for a program."""
        return {
            "engines": [
                {
                    "engine": platform.engine,
                    "version": platform.version,
                    "models": self.models(platform),
                    "seen": self.count(platform),
                }
                for platform in self.platforms
            ],
            "reasons": [
                {
                    "number": int(reason),
                    "reason": reason.name,
                    "cells": [
                        {"status": cell.status.value, "what": cell.what, "more": cell.more}
                        for cell in (cells[platform] for platform in self.platforms)
                    ],
                }
                for reason, cells in self.cells.items()
            ],
            "defects": self.defects(minimum),
            "remarks": self.remarks(),
        }


def _shows(line: Seen, reason: ExitReason) -> bool:
    return reason in (line.entry_failures if reason in _ENTRY_FAILURES else line.reasons)


def _function(test: str) -> str:
    """A test without its parameters."""
    return test.partition("[")[0]


def _distance(line: Seen, reason: ExitReason) -> tuple[object, ...]:
    """How little a test is about a reason: by its name, by what else it sees, and then in a fixed order."""
    words = {word for word in reason.name.lower().split("_") if word not in _COMMON_WORDS}
    named = sum(word in line.test.lower() for word in words)
    reasons = line.entry_failures if reason in _ENTRY_FAILURES else line.reasons
    return (-named, reasons.index(reason), len(line.reasons) + len(line.entry_failures), line.test)
