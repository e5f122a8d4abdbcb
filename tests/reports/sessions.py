"""Sessions of tests that never ran: cases with the records that a monitor would have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from vmxlab import Case, Verdict
from vmxlab.console.rebuild import run_from_records
from vmxlab.console.records import encode_record, parse_line
from vmxlab.console.run import Run
from vmxlab.image.compiler import Target, compile_case
from vmxlab.image.monitor import load_monitor
from vmxlab.reports.results.facts import FactsWriter
from vmxlab.reports.results.file import results_writer, test_line
from vmxlab.reports.results.model import TestVerdict
from vmxlab.structures.processors import named_processor

ENGINE = "bochs 2.7 (corei7_skylake_x)"
EVIL = '</script><img src=x onerror="window.pwned=1">\'&lt;\u2028\ud800\x00\x1b[31m'
"""What a page may not take for anything but text."""

Values = Mapping[str, str | int]


@cache
def target() -> Target:
    """A Skylake."""
    return Target(named_processor("corei7_skylake_x").capabilities, load_monitor(), 1_000_000, 40)


def io(port: int, rip: int, *, size: int = 1, is_in: bool = True) -> Values:
    """An exit of IN or OUT."""
    return {"reason": 30, "qual": port << 16 | is_in << 3 | size - 1, "len": 2, "rip": rip}


def hlt(rip: int) -> Values:
    """An exit of HLT."""
    return {"reason": 12, "len": 1, "rip": rip}


def run_of(
    case: Case,
    *exits: Values,
    number: int = 0,
    why: str = "stop",
    end: bool = True,
    extra: Sequence[str] = (),
) -> Run:
    """A case that had these exits; `extra` are records before its end."""
    head: dict[str, str | int] = {"id": number}
    if case.name:
        head["name"] = case.name
    lines = [encode_record("case", head), encode_record("vmx", {"ok": "vmxon,vmclear,vmptrld,vmwrite:0x61"})]
    for at, values in enumerate(exits):
        first: Values = {"by": "vmlaunch", "rflags": 2, "rsp": 0x7FF0} if at == 0 else {}
        lines.append(encode_record("exit", {"n": at, **first, **values}))
    lines += extra
    if end:
        lines.append(encode_record("end", {"id": number, "why": why, "exits": len(exits)}))
    records = [parse_line(line.encode()) for line in lines]
    return run_from_records(
        [record for record in records if record is not None],
        case,
        engine=ENGINE,
        log_path=Path("logs/serial-1.log"),
        compiled=compile_case(case, target(), number=number),
        **({} if end else {"verdict_on_error": Verdict.CRASH}),
    )


class Session:
    """Writes a file of results, test by test."""

    def __init__(self, path: Path, **head: object) -> None:
        self.path = path
        self._writer = results_writer(path, {"vmxlab": "0", "arguments": ["-q"], **head})
        self._facts = FactsWriter()

    def add(
        self,
        name: str,
        *runs: Run,
        verdict: TestVerdict = TestVerdict.PASS,
        engine: str | None = "bochs",
        seen: Sequence[int] = (),
        **about: object,
    ) -> None:
        """A test. `seen`: the exit reasons that its line of the coverage file has."""
        where = {"test": name, "engine": engine, "version": "2.7"}
        if seen:
            self._writer.write(
                {"kind": "seen", **where, "models": ["m"], "reasons": list(seen), "entry_failures": []}
            )
        facts = None if engine is None else self._facts.text(runs, **where)
        test_id = f"{name}[{engine}]" if engine else name
        self._writer.write_text(test_line(test_id, verdict, facts=facts, **about))  # type: ignore[arg-type]

    def close(self, status: int = 0) -> Path:
        """The file, with its end."""
        self._writer.close([], status)
        return self.path
