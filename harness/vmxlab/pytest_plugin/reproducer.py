"""A failed test leaves a folder for each of its failed cases: what it takes to ask the same again elsewhere.

They lie in the session's folder for logs, failed/TEST/case-N, and the report names them. What makes them is
`vmxlab.reports.reproducer`. What goes wrong here is said in the report, and never changes it otherwise.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmxlab.pytest_plugin.assertion import failed_assertion
from vmxlab.pytest_plugin.fixture import TestAtHand

if TYPE_CHECKING:
    from vmxlab.console.run import Run
    from vmxlab.engines.base import EngineInfo
    from vmxlab.reports.reproducer import Reproducer

REPRODUCER_PROPERTY = "vmx_reproducer"
REPRODUCER_SECTION = "vmxlab: reproducer"
_MAX_FAILED = 10
"""So many failed cases of a test are kept, its first ones."""
_MAX_OTHERS = 3
"""Where no case of a test failed by itself, so many are kept, its last ones."""
_MAX_NAME = 100
_MAX_FAILURE_LINES = 60


@dataclass(frozen=True, slots=True)
class FailedTest:
    """A test that failed: its id, the report's words, what it ran, what it raised, what its runs ran on."""

    nodeid: str
    words: str
    test: TestAtHand
    excinfo: pytest.ExceptionInfo[BaseException] | None
    """None for one that passed and should not have."""
    info_of: Callable[[Run], EngineInfo | None]

    def keep(self, log_dir: Path) -> tuple[list[tuple[str, str]], Path | None]:
        """Write the folders: the report's section, where there is something to say, and where they are."""
        try:
            runs, left_out = self._failed_runs()
            if not runs:
                return [], None
            from vmxlab.reports.reproducer import FOLDER, new_folder

            parent = new_folder(log_dir / FOLDER, _safe(self.nodeid))
            lines = [*self._written(runs, parent), *left_out]
        except Exception as error:  # whatever it is, the test's own failure is what must be reported
            return [(REPRODUCER_SECTION, f"none could be written: {type(error).__name__}: {error}")], None
        return [(REPRODUCER_SECTION, "\n".join(lines))], parent

    def _failed_runs(self) -> tuple[list[Run], list[str]]:
        """Those to keep, and what is to be said of the others."""
        from vmxlab.console.run import Verdict

        refused = self.test.refused
        if refused is not None and self.excinfo is not None and refused.error is self.excinfo.value:
            return [refused], []
        runs = self.test.runs
        bad = [run for run in runs if run.verdict not in (Verdict.PASS, Verdict.SKIP)] or self.test.differing
        if bad:
            kept = bad[:_MAX_FAILED]
            return kept, _left_out("first", kept, bad, "failed cases")
        kept = runs[-_MAX_OTHERS:]
        return kept, _left_out("last", kept, runs, "cases")

    def _written(self, runs: Sequence[Run], parent: Path) -> Iterator[str]:
        for reproducer in self._reproducers(runs):
            number = "refused" if reproducer.run is self.test.refused else reproducer.run.number
            folder = parent / f"case-{number}"
            folder.mkdir()
            reproducer.write(folder)
            yield str(folder)

    def _reproducers(self, runs: Sequence[Run]) -> Iterator[Reproducer]:
        from vmxlab.cases.source import BY_THE_ORACLE
        from vmxlab.reports.reproducer import Reproducer

        taken = None if self.excinfo is None else failed_assertion(self.excinfo, self.test.runs)
        failure = (self.words if self.excinfo is None else self.excinfo.exconly()).splitlines()
        if len(failure) > _MAX_FAILURE_LINES:
            failure[_MAX_FAILURE_LINES:] = [f"... and {len(failure) - _MAX_FAILURE_LINES} more lines"]
        for run in runs:
            asserted = BY_THE_ORACLE if any(run is other for other in self.test.differing) else None
            yield Reproducer(
                run,
                self.info_of(run),
                test=self.nodeid,
                failure="\n".join(failure),
                asserted=taken[1] if taken is not None and taken[0] is run else asserted,
            )


def _left_out(which: str, kept: Sequence[Run], runs: Sequence[Run], what: str) -> list[str]:
    return [] if len(kept) == len(runs) else [f"the {which} {len(kept)} of {len(runs)} {what} are kept"]


def _safe(nodeid: str) -> str:
    """A test's id as the name of a folder."""
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", nodeid).strip("-.")
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}-{zlib.crc32(nodeid.encode()):08x}"
