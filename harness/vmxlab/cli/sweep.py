"""`vmxlab sweep`: all ports and all MSRs, every exit held against the SDM."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from vmxlab.cases.sweep import Question
from vmxlab.cases.sweep_questions import HARMFUL_READS, KINDS
from vmxlab.cli.common import Number, Status, engine_options, json_option, log_option, open_lab
from vmxlab.cli.output import Output, write_json
from vmxlab.console.lab import Lab
from vmxlab.console.run import Verdict
from vmxlab.console.sweep import SweepResult, ask_all
from vmxlab.reports.runs import VERDICT_STYLES

_STATUS_OF = {Verdict.FAIL: Status.FAIL, Verdict.ERROR: Status.ERROR, Verdict.CRASH: Status.CRASH}
_SUMMARY_WORDS = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "failed",
    Verdict.SKIP: "skipped",
    Verdict.ERROR: "had an error",
    Verdict.CRASH: "crashed",
}
_SHOWN = 16
"""Differences of a question that are shown to people; --json has them all."""


@click.command()
@click.argument("kinds", metavar="[io|msr]...", nargs=-1, type=click.Choice(list(KINDS)))
@click.option(
    "--seed",
    type=Number("a seed", 32),
    default="0",
    show_default=True,
    help="Of the random bitmaps and the sample of MSRs without a bit.",
)
@click.option("--quick", is_flag=True, help="Ask only some of the ports and MSRs, spread over all of them.")
@engine_options
@json_option
@log_option
def sweep(
    kinds: tuple[str, ...],
    seed: int,
    quick: bool,
    engine: str,
    model: str | None,
    as_json: bool,
    log_dir: Path | None,
) -> int:
    """Ask for every port and every MSR whether its accesses exit, and how.

    io: all 65,536 ports, IN and OUT of 1, 2 and 4 bytes. msr: all MSRs of both ranges and a sample outside,
    RDMSR and WRMSR. With bitmaps that are all ones, all zeros, random, and with one bit changed at a time;
    and without bitmaps. Each exit is compared with what the SDM says of it; what differs is named, value by
    value. Without an argument all of it is asked. L2 is an "unrestricted guest" where the
    processor has that: it has no say in these exits, and they cost less.
    """
    chosen = list(dict.fromkeys(kinds)) or list(KINDS)
    questions = [question for kind in chosen for question in KINDS[kind](seed, quick=quick)]
    results: list[SweepResult] = []
    with open_lab(engine, model, log_dir, command="sweep") as lab:
        head = _head(lab, seed)
        output = None if as_json else Output()
        if output is not None:
            output.pairs(head.items())
            output.line()
            _show_left_out(output, chosen)
        start = time.monotonic()
        with _bar(sum(question.exits for question in questions)) as progress:
            for result in ask_all(lab, questions, progress):
                results.append(result)
                if output is not None:
                    _show(output, result)
        seconds = time.monotonic() - start
    if output is None:
        write_json({**head, **_totals(results, seconds), "questions": [_json(result) for result in results]})
    else:
        _finish(output, results, seconds)
    return max((_STATUS_OF.get(result.verdict, Status.PASS) for result in results), default=Status.PASS)


def _head(lab: Lab, seed: int) -> dict[str, str]:
    boot = lab.session().boot_record
    assert boot is not None
    return {
        "engine": lab.info.title(),
        "why": lab.info.why,
        "image": f"monitor build {boot.number('build'):#010x}, protocol {boot.number('protocol')}",
        "seed": str(seed),
    }


# --- the bar -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(exits: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal; gives what moves it on."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("exits"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        # Results that go to the same terminal are printed above the bar; others are left alone.
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task("exits", total=exits)
        yield lambda done: bar.advance(task, done)


# --- showing -----------------------------------------------------------------------------------------------


def _show_left_out(output: Output, chosen: Sequence[str]) -> None:
    if "io" in chosen:
        for left_out in HARMFUL_READS:
            output.line(str(left_out))
        output.line()


def _show(output: Output, result: SweepResult) -> None:
    question = result.question
    text = f"  {question.name}: {result.exits} exits"
    if result.verdict is Verdict.PASS:
        text += ", all as predicted"
    output.words((result.verdict.name, VERDICT_STYLES[result.verdict]), (text, ""))
    for difference in result.differences[:_SHOWN]:
        output.line(f"  {difference}")
    unseen = len(result.differences) - _SHOWN
    if unseen > 0:
        output.line(f"  and {unseen} more values; --json lists them")
    if result.more:
        output.line(f"  and {len(result.more)} further blocks of values differ, which were not looked into")
    for why in (result.failure, result.error):
        if why is not None:
            for line in str(why).splitlines():
                output.line(f"  {line}")


def _totals(results: Sequence[SweepResult], seconds: float) -> dict[str, Any]:
    exits = sum(result.exits for result in results)
    verdicts = [result.verdict for result in results]
    return {
        "exits": exits,
        "seconds": round(seconds, 3),
        "exits_per_second": round(exits / seconds) if seconds else 0,
        "summary": ", ".join(
            f"{verdicts.count(verdict)} {words}"
            for verdict, words in _SUMMARY_WORDS.items()
            if verdict in verdicts
        ),
    }


def _finish(output: Output, results: Sequence[SweepResult], seconds: float) -> None:
    totals = _totals(results, seconds)
    output.line()
    output.line(
        f"{totals['exits']} exits verified in {seconds:.1f} s, {totals['exits_per_second']} a second: "
        f"{totals['summary']}",
        "bold",
    )
    for path in dict.fromkeys(result.log_path for result in results if result.log_path is not None):
        output.line(f"log  {path}")


def _json(result: SweepResult) -> dict[str, Any]:
    question: Question = result.question
    return {
        "name": question.name,
        "instruction": question.instruction.text,
        "first": f"{question.first:#x}",
        "count": question.count,
        "stride": question.stride,
        "verdict": result.verdict.name,
        "exits": result.exits,
        "seconds": round(result.seconds, 3),
        "differences": [
            {
                "value": f"{difference.value:#x}",
                "changed": None if difference.walked is None else f"{difference.walked:#x}",
                "text": str(difference),
            }
            for difference in result.differences
        ],
        "blocks_not_looked_into": len(result.more),
        "error": str(result.failure or result.error or "") or None,
        "log": None if result.log_path is None else str(result.log_path),
    }
