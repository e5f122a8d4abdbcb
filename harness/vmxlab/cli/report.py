"""`vmxlab report`: what a session of tests did, as one HTML file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vmxlab.cli.common import Status
from vmxlab.errors import LogError


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
def report(files: tuple[Path, ...], output: Path) -> int:
    """Write what tests did into one HTML file, which opens from disk.

    Each FILE is what a session of pytest wrote with --vmx-results FILE, or a serial log; several make one
    page. A serial log has no more than the monitor's records: the exits, but not what the case asked for.

    Exit status 0, whatever the tests' verdicts are; 3 where a file can't be read or written.
    """
    from vmxlab.reports.html.page import render

    page, made = render(files)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(page)
    except OSError as error:
        raise LogError(
            f"the report {output} can't be written: {os.strerror(error.errno or 0)}",
            advice="name another file with -o",
        ) from error
    for warning in made.warnings:
        click.echo(f"vmxlab: {warning}", err=True)
    total = made.overview.total
    verdicts = ", ".join(f"{total.tests[verdict]} {verdict.words}" for verdict in made.overview.verdicts)
    counts = (total.tests.total(), "test"), (total.cases, "case"), (total.exits, "exit")
    tests, *rest = (f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)
    click.echo(f"{tests} ({verdicts}), {', '.join(rest)}")
    click.echo(f"report  {output.absolute()}  {len(page) / 1e6:.1f} MB")
    return Status.PASS
