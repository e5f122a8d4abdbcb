"""`vmxlab diff`: two serial logs, case by case and field by field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Status, json_option
from vmxlab.cli.output import Output, ends_quietly, write_json
from vmxlab.errors import LogError
from vmxlab.reports.log_file import read_log

if TYPE_CHECKING:
    from vmxlab.reports.log_diff import LogDiff
    from vmxlab.reports.story import Storyteller


@click.command()
@click.argument("a", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("b", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--all", "everything", is_flag=True, help="Show what may differ too, and why it may.")
@json_option
def diff(a: Path, b: Path, everything: bool, as_json: bool) -> int:
    """Compare two serial logs of the monitor: one case on two engines, or yesterday and today.

    Cases are matched by name, else by number, else by position; their exits by number. What may differ is
    left out: fields that the SDM leaves undefined for a VM exit, the time-stamp counter and what counts with
    it, random numbers, answers of devices, addresses in another build of the monitor.

    Exit status: 0 the same, 1 different, 2 usage, 3 a log can't be read.
    """
    from vmxlab.reports.log_diff import compare_logs
    from vmxlab.reports.log_diff.show import diff_json

    if str(a) == str(b) == "-":
        raise click.UsageError("only one of the two logs can be standard input")
    names = _names(a, b)
    with ends_quietly() as ending:
        one, other = _read(a), _read(b)
        found = compare_logs(one, other)
        if as_json:
            write_json(diff_json(found, one, other, (str(a), str(b))))
        else:
            _show(found, one, other, names, everything=everything)
    if ending.status is not None:
        return ending.status
    return Status.PASS if found.same else Status.FAIL


def _names(a: Path, b: Path) -> tuple[str, str]:
    """What the columns are called: the files' names, with as many folders as it takes to tell them apart."""
    if a == b:
        return "A", "B"
    parts = list(zip(reversed(a.parts), reversed(b.parts), strict=False))
    same = next((count for count, (x, y) in enumerate(parts) if x != y), len(parts))
    return tuple("/".join(path.parts[-same - 1 :]) for path in (a, b))  # type: ignore[return-value]


def _read(path: Path) -> Storyteller:
    """A log with all its cases. Raises LogError for what is none."""
    from vmxlab.reports.story import State, Storyteller

    teller = Storyteller(keep=True)
    for piece in read_log(path):
        for _ in teller.feed(piece):
            pass
    for _ in teller.close():
        pass
    if teller.state is State.NO_LOG:
        raise LogError(
            f"{path} is no serial log: no line of it is a record of the monitor",
            advice="name what the monitor's serial line was written to; the harness calls it serial-1.log",
        )
    return teller


def _show(
    found: LogDiff, one: Storyteller, other: Storyteller, names: tuple[str, str], *, everything: bool
) -> None:
    from vmxlab.reports.log_diff.show import alone, capabilities_table, case_table, head, summary

    output = Output()
    output.pairs([(names[0], head(one)), (names[1], head(other))])
    processors = capabilities_table(one, other, names)
    if processors is not None:
        count = len(processors.rows)
        output.line(f"the processors differ in {count} controls, fields and bits of their VMX", "dim")
    output.line()
    if everything and processors is not None:
        output.table(processors)
    for case in found.cases:
        table = case_table(case, names, everything=everything)
        if table.rows:
            output.table(table)
    for name, cases in zip(names, (found.only_one, found.only_other), strict=True):
        for told in cases:
            output.line(f"only in {name}: {alone(told)}", "bold yellow")
    for number, line in enumerate(summary(found, names, everything=everything)):
        output.line(line, "dim" if number else "bold green" if found.same else "bold red")
