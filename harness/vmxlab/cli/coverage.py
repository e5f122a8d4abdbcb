"""`vmxlab coverage`: which exit reasons the tests have seen, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Status, json_option
from vmxlab.cli.output import Output, write_json

if TYPE_CHECKING:
    from vmxlab.reports.coverage import Coverage

_HEAD = """\
# Exit reasons seen

Every basic exit reason of the SDM (Vol. 3D, Appendix C) by engine: the test that has seen it, and how many
more have; or why none has. Made by `vmxlab coverage` from what ran, and not to be edited.
"""


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--minimum",
    metavar="ENGINE=N[,...]",
    help="Fail where fewer reasons were seen: bochs=55,kvm-in-bochs=45.",
)
@click.option("--markdown", is_flag=True, help="Print the table as a page of Markdown.")
@json_option
def coverage(files: tuple[Path, ...], minimum: str | None, markdown: bool, as_json: bool) -> int:
    """Show which exit reasons were seen, by engine.

    Each FILE is what a session of pytest wrote with --vmx-coverage FILE. Exit status 1 where a reason was
    not seen and nothing says why, or where fewer were seen than --minimum wants.
    """
    from vmxlab.reports.coverage import Coverage
    from vmxlab.reports.coverage_file import read_coverage

    if markdown and as_json:
        raise click.UsageError("either --markdown or --json, not both")
    wanted = _minimum(minimum)
    found = Coverage([read_coverage(path) for path in files])
    defects = found.defects(wanted)
    if as_json:
        write_json(found.to_json(wanted))
    elif markdown:
        click.echo(_page(found, defects), nl=False)
    else:
        _show(found, defects)
    return Status.FAIL if defects else Status.PASS


def _minimum(text: str | None) -> Mapping[str, int]:
    from vmxlab.engines.choose import ENGINES

    wanted = {}
    for item in text.split(",") if text else ():
        engine, _, number = item.strip().partition("=")
        if engine not in ENGINES or not number.isdecimal():
            raise click.UsageError(
                f"--minimum: {item!r} is no ENGINE=N; the engines are {', '.join(ENGINES)}"
            )
        wanted[engine] = int(number)
    return wanted


def _show(found: Coverage, defects: list[str]) -> None:
    output = Output()
    output.table(found.table())
    for platform in found.platforms:
        output.line(f"{platform} ran on {', '.join(found.models(platform)) or 'no model'}")
    for line in found.remarks():
        output.line(line, "yellow")
    for line in found.counts():
        output.line(line, "bold")
    for line in defects:
        output.line(line, "bold red")


def _page(found: Coverage, defects: list[str]) -> str:
    models = [f"- {p}: {', '.join(found.models(p)) or 'no model'}" for p in found.platforms]
    lines = ["", "Engines, and the processor models that were needed:", "", *models, ""]
    lines += found.table().markdown()
    lines += ["", *(f"- {line}" for line in found.counts()), *(f"- **{line}**" for line in defects)]
    return _HEAD + "\n".join(lines) + "\n"
