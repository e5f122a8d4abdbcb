"""`vmxlab fuzz`: generated questions, answered by the oracle and by a processor."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Number, Status, engine_options, json_option, log_option, open_lab
from vmxlab.cli.output import Output, write_json

if TYPE_CHECKING:
    from vmxlab.console.entry_fuzz import EntryFuzz

_SHOWN = 20
"""Disagreements that are shown with their rules and a test."""


@click.group()
def fuzz() -> None:
    """Ask what the oracle and a processor say about generated cases, and compare."""


@fuzz.command()
@click.option(
    "--count",
    type=click.IntRange(1, 10_000_000),
    default=1000,
    show_default=True,
    help="So many VMCSs are asked about.",
)
@click.option("--seed", type=Number("a seed", 64), default=0, show_default=True, help="Which ones.")
@engine_options
@json_option
@log_option
def entry(count: int, seed: int, engine: str, model: str | None, as_json: bool, log_dir: Path | None) -> int:
    """VM entries: valid VMCSs with one to three fields changed around their limits.

    The rules of VM entry say which of them enter and how the others fail; the processor has to agree. What a
    known difference of the engine explains is counted by its key, what the rules leave open by the reason;
    the rest is shown, each with a test to paste. Exit status 1 if there is any.
    """
    from vmxlab.console.entry_fuzz import fuzz_entries

    with open_lab(engine, model, log_dir, command="fuzz") as lab:
        head = {"engine": lab.info.title(), "why": lab.info.why, "log": str(lab.log_dir)}
        if as_json:
            result = fuzz_entries(lab, count, seed)
            write_json({**head, **_as_json(result)})
        else:
            output = Output()
            output.pairs(head.items())
            result = _with_bar(count, lambda progress: fuzz_entries(lab, count, seed, progress=progress))
            _show(output, result)
    return Status.FAIL if result.disagreements else Status.PASS


def _with_bar(count: int, run: Callable[[Callable[[int], None]], EntryFuzz]) -> EntryFuzz:
    """A progress bar on standard error, where that is a terminal."""
    stream = sys.stderr
    if not stream.isatty():
        return run(lambda done: None)
    with click.progressbar(length=count, label="VM entries", file=stream) as bar:
        return run(lambda done: bar.update(done))


def _show(output: Output, result: EntryFuzz) -> None:
    rate = result.asked / result.seconds if result.seconds else 0.0
    output.line()
    output.pairs(
        [
            ("asked", f"{result.asked} VM entries, seed {result.seed}, {rate:.0f}/s"),
            ("seen", _counts(result.outcomes)),
            ("agreed", str(result.agreed)),
            ("undecided", f"{result.undecided_entries}{_reasons(result.undecided)}"),
            ("explained", f"{result.explained.total()}{_reasons(result.explained)}"),
            ("not asked", f"{result.not_asked}: the monitor would not come back from them"),
            ("rules broken", f"{len(result.broken)} different ones"),
            ("disagree", str(len(result.disagreements))),
        ]
    )
    for item in result.disagreements[:_SHOWN]:
        output.line()
        output.line(str(item), "bold red")
        output.line()
        output.line(item.source())
    if len(result.disagreements) > _SHOWN:
        output.line(f"{len(result.disagreements) - _SHOWN} more; --json has all of them")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{text} {count}" for text, count in counter.most_common())


def _reasons(counter: Counter[str]) -> str:
    return f" ({_counts(counter)})" if counter else ""


def _as_json(result: EntryFuzz) -> dict[str, object]:
    return {
        "seed": result.seed,
        "asked": result.asked,
        "agreed": result.agreed,
        "not_asked": result.not_asked,
        "seconds": round(result.seconds, 3),
        "outcomes": dict(result.outcomes),
        "undecided": result.undecided_entries,
        "undecided_because": dict(result.undecided),
        "explained": dict(result.explained),
        "rules_broken": dict(result.broken),
        "disagreements": [
            {
                "number": item.number,
                "changes": {name.name: f"{value:#x}" for name, value in item.changes.items()},
                "broken": sorted(item.verdict.names),
                "allowed": sorted(outcome.value for outcome in item.verdict.outcomes),
                "seen": str(item.seen),
                "test": item.source(),
            }
            for item in result.disagreements
        ],
    }
