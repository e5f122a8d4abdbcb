"""The file of a session's results: a line a test, with all of its cases, among the lines of a coverage file.

So `vmxlab coverage` reads it, too (`reports.coverage_file` has the other lines). A "test" has

    id, test            pytest's, and without the engine
    engine, version     of one that runs on an engine
    verdict, why        `model.TestVerdict`, and a reason in one line
    seconds, text, sections
    cases, structures   as `results.facts` has them

A file that was cut short is read as far as it goes, and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmxlab.cases.program import Mode
from vmxlab.console.rebuild import runs_from_records
from vmxlab.console.records import Record, parse_line
from vmxlab.console.run import End, Run, Verdict
from vmxlab.errors import CoverageError
from vmxlab.reports.coverage_file import CoverageFile, CoverageWriter, Line, LinesReader, WrongLine
from vmxlab.reports.disassembly import Code
from vmxlab.reports.results.model import BrokenRule, RecordedCase, RecordedTest, TestVerdict
from vmxlab.sdm.registers import GENERAL_REGISTERS

WHAT, OPTION = "results", "--vmx-results"
HEAD_OF = f"vmxlab {WHAT}"


def results_writer(path: Path, head: Mapping[str, object]) -> CoverageWriter:
    """A writer of such a file. Raises CoverageError where it can't be written."""
    return CoverageWriter(path, what=WHAT, head=head)


def test_line(
    id: str,
    verdict: TestVerdict,
    *,
    facts: str | None = None,
    why: str = "",
    seconds: float | None = None,
    text: str = "",
    sections: Sequence[tuple[str, str]] = (),
) -> str:
    """The line of a test. `facts`: what `FactsWriter.text` gave, about `test`, `engine` and `version`."""
    about = {
        "kind": "test",
        "id": id,
        "verdict": verdict.value,
        "why": why,
        "seconds": seconds,
        "text": text,
        "sections": sections,
    }
    # The facts are JSON already, and may be long: they are not read again for this.
    return json.dumps(about)[:-1] + (", " + facts[1:] if facts is not None else "}")


test_line.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would take for a test


@dataclass(slots=True)
class Results:
    """What a file holds besides its tests. `head` is its first line, `is_whole` whether it has its end."""

    path: Path
    coverage: CoverageFile
    head: Mapping[str, Any] = field(default_factory=dict)
    is_whole: bool = False


def is_results_file(path: Path) -> bool:
    """Whether a file begins as one with results does. Raises CoverageError where it can't be read."""
    try:
        with path.open("rb") as file:
            first = file.readline(65536)
    except OSError as error:
        raise _unreadable(path, error) from error
    with contextlib.suppress(ValueError):
        head = json.loads(first)
        return isinstance(head, dict) and head.get("of") == HEAD_OF
    return False


def read_results(path: Path, take: Callable[[RecordedTest], None]) -> Results:
    """Read such a file, and give each of its tests to `take`: there may be many, and large ones.

    Raises CoverageError, with the number of the line that is wrong; not for a last line that was cut short.
    """
    results = Results(path, CoverageFile(path))

    def head(values: Mapping[str, Any]) -> None:
        results.head = values

    reader = LinesReader(path, what=WHAT, option=OPTION, head=head, test=lambda line: take(_test(line)))
    results.coverage = reader.file
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):  # the session was killed while it wrote
                    break
                reader.take(number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    results.is_whole = reader.ended
    return results


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> CoverageError:
    why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is no text"
    return CoverageError(f"{path} can't be read: {why}", advice=f"pytest {OPTION} FILE writes one")


# --- a test ------------------------------------------------------------------------------------------------


def _test(line: Line) -> RecordedTest:
    """A line's test. Whatever is wrong with it is a WrongLine."""
    try:
        return _read_test(line)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WrongLine(f"the test makes no sense: {error!r}") from error


def _read_test(line: Line) -> RecordedTest:
    values, test_id = line.values, line.get("id", str)
    return RecordedTest(
        id=test_id,
        name=values.get("test", test_id),
        verdict=TestVerdict(line.get("verdict", str)),
        engine=values.get("engine", ""),
        version=values.get("version", ""),
        seconds=values.get("seconds"),
        why=values.get("why", ""),
        text=values.get("text", ""),
        sections=[(title, text) for title, text in values.get("sections", ())],
        cases=[_case(facts) for facts in values.get("cases", ())],
        new_structures=values.get("structures", {}),
    )


def _case(facts: Mapping[str, Any]) -> RecordedCase:
    program = bytes.fromhex(facts.get("program", ""))
    return RecordedCase(
        run=_run(facts),
        verdict=Verdict(facts["verdict"]),
        why=facts["why"],
        exits=facts["exits"],
        reasons=dict(facts["reasons"]),
        log_lines=facts["records"],
        left_out=facts["left_out"],
        unkept=facts["unkept"],
        code=_code(facts, program),
        program=program,
        at_entry=_at_entry(facts),
        source=facts.get("source", ""),
        mode=facts.get("mode", ""),
        controls={
            name: (int(value, 16), int(baseline, 16))
            for name, (value, baseline) in facts.get("controls", {}).items()
        },
        fields=facts.get("fields", {}),
        io_bitmap=facts.get("io_bitmap"),
        msr_bitmap=facts.get("msr_bitmap"),
        ept=facts.get("ept"),
        eptp=int(facts["eptp"], 16) if facts.get("eptp") else None,
        broken=tuple(BrokenRule(**broken) for broken in facts["broken"]),
    )


def _run(facts: Mapping[str, Any]) -> Run:
    """The run that the records tell. Without the end, which would miss exits that are not among them."""
    records: list[Record] = []
    for line in facts["records"]:
        record = parse_line(line.encode())
        if record is None:
            raise ValueError(f"{line!r} is no record")
        records.append(record)
    made = runs_from_records(record for record in records if record.kind != "end")
    run = made[0] if made else Run(case=None, number=facts["number"])
    log = facts["log"]
    return replace(
        run,
        number=facts["number"],
        name=facts["name"],
        engine=facts["engine"],
        by_need=facts["by_need"],
        end=End(facts["end"]) if facts["end"] is not None else None,
        log_path=Path(log) if log is not None else None,
        records=tuple(records),
    )


def _code(facts: Mapping[str, Any], program: bytes) -> Code | None:
    if "program" not in facts:
        return None
    return Code.of_bytes(
        Mode[facts["mode"]],
        program,
        {int(at, 16): bytes.fromhex(content) for at, content in facts["code"].items()},
        int(facts["cs_base"], 16),
    )


def _at_entry(facts: Mapping[str, Any]) -> Mapping[str, int] | None:
    if "at_entry" not in facts:
        return None
    told = {name: int(value, 16) for name, value in facts["at_entry"].items()}
    return {**dict.fromkeys((*GENERAL_REGISTERS, "rflags"), 0), **told}
