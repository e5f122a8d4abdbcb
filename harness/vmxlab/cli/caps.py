"""`vmxlab caps`: what the VMX of an engine's processor can do."""

from __future__ import annotations

from pathlib import Path

import click

from vmxlab.cli.common import Status, engine_options, json_option, log_option, open_lab
from vmxlab.cli.output import Output, say, write_json
from vmxlab.errors import MissingCapability
from vmxlab.structures.capabilities import Capabilities


@click.command()
@engine_options
@click.option(
    "--diff",
    "others",
    multiple=True,
    metavar="FILE|MODEL",
    help="Show only what differs from this processor: a file of --json, or a known model. Given twice, the "
    "two are compared, and no machine is started.",
)
@json_option
@log_option
def caps(engine: str, model: str | None, others: tuple[str, ...], as_json: bool, log_dir: Path | None) -> int:
    """Show the VMX capability MSRs, decoded.

    Every control is shown by name as fixed 0, fixed 1 or free. --json writes a file for --caps. With --diff
    the exit status is 1 where there is a difference.
    """
    if len(others) > 2:
        raise click.UsageError("--diff compares two processors: give it once or twice")
    if len(others) == 2:
        first, second = (_named(other) for other in others)
        return _show_difference(others[0], first, others[1], second, as_json)
    from vmxlab.reports.caps_file import CapsFile

    with open_lab(engine, model, log_dir, command="caps") as lab:
        boot = lab.session().boot_record
        assert boot is not None
        width = boot.number("maxphyaddr")
        info = lab.info
        try:
            capabilities = lab.capabilities
        except MissingCapability:
            capabilities = Capabilities({})
    if others:
        return _show_difference(info.title(), capabilities, others[0], _named(others[0]), as_json)
    if as_json:
        click.echo(CapsFile.of(capabilities, width, info).to_json())
    else:
        output = Output()
        processor = f"{boot.values['cpu']}, CPUID signature {boot.values['signature']}, MAXPHYADDR {width}"
        output.pairs([("engine", info.title()), ("why", info.why), ("processor", processor)])
        output.line()
        _show(output, capabilities)
    if not capabilities.raw:
        say("SKIP: the processor has no VMX (CPUID.1:ECX.VMX[5] is 0)")
    return Status.PASS


def _named(name: str) -> Capabilities:
    """A processor by its file, or as a known model."""
    from vmxlab.reports.caps_file import read_caps_file
    from vmxlab.structures.processors import known_processors

    known = known_processors().get(name)
    if known is not None:
        return known.capabilities
    if not Path(name).exists():
        raise click.UsageError(
            f"--diff {name}: no such file, and no known model ({', '.join(known_processors())})"
        )
    return read_caps_file(Path(name)).capabilities


def _show_difference(
    first_name: str, first: Capabilities, second_name: str, second: Capabilities, as_json: bool
) -> int:
    from vmxlab.reports.capabilities import difference_table

    table = difference_table(first, second, (first_name, second_name))
    if as_json:
        write_json(table.json_rows())
    elif table.rows:
        Output().table(table)
    else:
        say(f"{first_name} and {second_name} have the same VMX capabilities")
    return Status.FAIL if table.rows else Status.PASS


def _show(output: Output, capabilities: Capabilities) -> None:
    from vmxlab.reports.capabilities import capability_tables

    for table in capability_tables(capabilities) if capabilities.raw else ():
        output.table(table)
