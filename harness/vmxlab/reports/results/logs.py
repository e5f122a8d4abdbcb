"""A bare serial log as if it were a session: one test, whose cases are all that the log holds.

It goes as far as the records do: what a case asked for, and the structures it gave, are not in them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vmxlab.console.rebuild import runs_from_records
from vmxlab.console.records import parse_log
from vmxlab.console.run import Run, Verdict
from vmxlab.errors import CoverageError
from vmxlab.reports.results.file import OPTION
from vmxlab.reports.results.model import RecordedCase, RecordedTest, TestVerdict
from vmxlab.reports.runs import verdict_text

_ENGINE = re.compile(rb"^# engine: (?P<title>(?P<name>\S+) (?P<version>\S+) \([^)\n]*\))", re.M)

_WORST = (
    (Verdict.CRASH, TestVerdict.CRASH),
    (Verdict.ERROR, TestVerdict.ERROR),
    (Verdict.FAIL, TestVerdict.FAIL),
    (Verdict.SKIP, TestVerdict.SKIP),
)


def read_log(path: Path) -> RecordedTest:
    """The cases of a log. Raises CoverageError where it can't be read, or no case stands in it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CoverageError(f"{path} can't be read: {os.strerror(error.errno or 0)}") from error
    records, broken = parse_log(content)
    runs = runs_from_records(records)
    if not runs:
        raise CoverageError(
            f"{path} is neither a file of results nor a serial log with a case in it",
            advice=f"pytest {OPTION} FILE writes results; serial logs are in the folder of --vmx-log-dir",
        )
    engine = _ENGINE.search(content)
    title, name, version = (
        engine[part].decode("ascii", "backslashreplace") if engine else ""
        for part in ("title", "name", "version")
    )
    cases = [_case(run, title, path) for run in runs]
    damaged = ["Lines of the log that are damaged:", *map(str, broken)] if broken else []
    return RecordedTest(
        id=str(path),
        name=str(path),
        verdict=TestVerdict.ERROR if broken else _worst(case.verdict for case in cases),
        engine=name,
        version=version,
        why=f"damaged lines: {len(broken)}" if broken else "",
        text="\n".join(damaged),
        cases=cases,
    )


def _case(run: Run, engine: str, path: Path) -> RecordedCase:
    run = replace(run, engine=engine, log_path=path)
    return RecordedCase(
        run=run,
        verdict=run.verdict,
        why=verdict_text(run),
        exits=len(run.exits),
        reasons=Counter(map(int, run.reasons)),
        log_lines=[record.line for record in run.records],
    )


def _worst(verdicts: Iterable[Verdict]) -> TestVerdict:
    found = set(verdicts)
    return next((test for verdict, test in _WORST if verdict in found), TestVerdict.PASS)
