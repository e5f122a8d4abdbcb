"""pytest --vmx-coverage FILE: what the tests of a session have seen, as a file for `vmxlab coverage`.

Each test's line travels in its report, so that it is the same with the workers of pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vmxlab.errors import CoverageError
from vmxlab.pytest_plugin.fixture import TestAtHand
from vmxlab.reports.coverage_file import CoverageWriter, seen_line


def coverage_line(
    report: pytest.TestReport, test: TestAtHand, known: str | None, where: Mapping[str, str]
) -> dict[str, object] | None:
    """The line of a test, where it has one: passed, skipped for a capability, or a known difference.

    `known` is the key of the difference for which it was expected to fail.
    """
    if report.when == "call" and report.passed:
        return seen_line(where, test.runs)
    if not report.skipped:
        return None
    if hasattr(report, "wasxfail"):
        return None if known is None else {"kind": "differs", **where, "key": known}
    if test.lacking is None:
        return None
    return {"kind": "lacking", **where, "feature": test.lacking.feature, "bit": test.lacking.bit}


def without_engine(nodeid: str, engine_id: str) -> str:
    """A test's id without the engine in it, so that it is the same on each."""
    name, bracket, parameters = nodeid.partition("[")
    for part in (f"{engine_id}-", f"-{engine_id}", engine_id):
        if part in parameters:
            parameters = parameters.replace(part, "", 1)
            break
    return name if parameters in ("", "]") else f"{name}{bracket}{parameters}"


class Recorder:
    """A plugin that writes the file: a line a test as its report arrives, then the `processors`.

    pytest.UsageError where the file can't be written to at all.
    """

    def __init__(self, path: Path, processors: Sequence[Mapping[str, object]]) -> None:
        self._processors = processors
        try:
            self._file = CoverageWriter(path)
        except CoverageError as error:
            raise pytest.UsageError(str(error)) from None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See pytest."""
        line = getattr(report, "vmxlab", {}).get("coverage")
        if line is not None:
            self._file.write(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """See pytest. The workers, where there are any, have ended before."""
        self._file.close(self._processors, int(exitstatus))
