"""pytest --vmx-results FILE: what every test of a session did, case by case, for `vmxlab report FILE`.

What a test's cases did travels in its report as text, so that it is the same with the workers of
pytest-xdist, and whoever writes the file needn't read it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmxlab import __version__
from vmxlab.errors import CoverageError, MachineError, VmxlabError
from vmxlab.pytest_plugin.reproducer import REPRODUCER_SECTION

if TYPE_CHECKING:
    from vmxlab.pytest_plugin.fixture import TestAtHand
    from vmxlab.reports.coverage_file import CoverageWriter
    from vmxlab.reports.results.facts import FactsWriter
    from vmxlab.reports.results.model import TestVerdict

_MAX_TEXT = 100_000
"""So many characters of what a failed test printed, or of its traceback, are kept."""
_CUT_SHORT = "the session ended in the middle of it"


class Facts:
    """What a test's cases did, as text for its report: made where the test runs."""

    def __init__(self) -> None:
        self._writer: FactsWriter | None = None

    def of(
        self,
        report: pytest.TestReport,
        error: BaseException | None,
        test: TestAtHand,
        known: str | None,
        where: Mapping[str, str],
    ) -> dict[str, str]:
        """The facts at the end of a phase: after the setup, unless it failed, of no case yet.

        Whoever dies in the middle of the test has told which one it was.

        `error` is what it raised, `known` the key of the difference for which it was expected to fail, and
        `where` has "test", "engine" and "version".
        """
        from vmxlab.reports.results.facts import FactsWriter

        self._writer = self._writer or FactsWriter()
        verdict, why = _judge(report, error, known)
        runs = () if report.when == "setup" and report.passed else test.runs
        return {"facts": self._writer.text(runs, **where), "verdict": verdict.value, "why": why}


def _judge(
    report: pytest.TestReport, error: BaseException | None = None, known: str | None = None
) -> tuple[TestVerdict, str]:
    """The verdict on a test by one of its phases, and the reason in a line where there is one."""
    from vmxlab.reports.results.model import TestVerdict

    if report.skipped:
        if hasattr(report, "wasxfail"):
            return (TestVerdict.KNOWN, known) if known is not None else (TestVerdict.XFAIL, report.wasxfail)
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return TestVerdict.SKIP, reason.removeprefix("Skipped: ")
    if report.passed:
        return TestVerdict.PASS, ""
    first = (str(error).splitlines() or [type(error).__name__])[0] if error is not None else ""
    if isinstance(error, MachineError):
        return TestVerdict.CRASH, first
    if report.when != "call" or isinstance(error, VmxlabError):
        return TestVerdict.ERROR, first
    return TestVerdict.FAIL, first


@dataclass(slots=True)
class _Unfinished:
    """A test between its reports."""

    verdict: TestVerdict
    why: str = ""
    facts: str | None = None
    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)


class ResultsRecorder:
    """A plugin that writes the file: the lines of each test when its last report has arrived.

    pytest.UsageError where the file can't be written to at all.
    """

    def __init__(
        self, path: Path, processors: Sequence[Mapping[str, object]], arguments: Sequence[str]
    ) -> None:
        from vmxlab.reports.results.file import results_writer

        self._processors = processors
        self._unfinished: dict[str, _Unfinished] = {}
        head = {
            "vmxlab": __version__,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": list(arguments),
            "python": platform.python_version(),
            "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        }
        try:
            self._file: CoverageWriter = results_writer(path, head)
        except CoverageError as error:
            raise pytest.UsageError(str(error)) from None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """See pytest. A file that can't be collected is an error that stands for its tests."""
        from vmxlab.reports.results.model import TestVerdict

        if report.failed:
            test = _Unfinished(TestVerdict.ERROR, "it can't be collected", texts=[report.longreprtext])
            self._write(report.nodeid, test)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See pytest."""
        from vmxlab.reports.results.model import TestVerdict

        told = getattr(report, "vmxlab", {})
        if told.get("coverage") is not None:
            self._file.write(told["coverage"])
        verdict, why = _judge(report)
        results = told.get("results", {})
        if results:
            verdict, why = TestVerdict(results["verdict"]), results["why"]
        test = self._unfinished.setdefault(report.nodeid, _Unfinished(verdict))
        test.seconds += report.duration
        test.facts = results.get("facts", test.facts)
        if verdict is not TestVerdict.PASS and not (test.verdict.is_bad and report.when == "teardown"):
            test.verdict, test.why = verdict, why
        if report.failed:
            test.texts.append(_limited(report.longreprtext))
            test.sections = [(title, _limited(text)) for title, text in report.sections if _is_kept(title)]
        if report.when not in ("setup", "call"):  # or "???": of a worker that died
            self._finish(report.nodeid)

    def _finish(self, test_id: str) -> None:
        test = self._unfinished.pop(test_id, None)
        if test is not None:
            self._write(test_id, test)

    def _write(self, test_id: str, test: _Unfinished) -> None:
        from vmxlab.reports.results.file import test_line

        self._file.write_text(
            test_line(
                test_id,
                test.verdict,
                facts=test.facts,
                why=test.why,
                seconds=round(test.seconds, 4),
                text="\n\n".join(test.texts),
                sections=test.sections,
            )
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """See pytest. The workers, where there are any, have ended before."""
        from vmxlab.reports.results.model import TestVerdict

        for test_id, test in list(self._unfinished.items()):
            if not test.verdict.is_bad:
                test.verdict, test.why = TestVerdict.ERROR, _CUT_SHORT
            self._finish(test_id)
        self._file.close(self._processors, int(exitstatus))


def _is_kept(title: str) -> bool:
    """Whether a section of a report is: of what the plugin adds only where the reproducers are.

    What it says of cases the cases themselves say better.
    """
    return not title.startswith("vmxlab") or title == REPRODUCER_SECTION


def _limited(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}\n... and {len(text) - _MAX_TEXT} characters more, which are not kept"
