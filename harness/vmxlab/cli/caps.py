"""`vmxlab caps`: what the VMX of an engine's processor can do."""

from __future__ import annotations

from pathlib import Path

import click

from vmxlab.cli.common import Status, engine_options, json_option, log_option, open_lab
from vmxlab.cli.output import Output, say
from vmxlab.errors import MissingCapability
from vmxlab.structures.capabilities import Capabilities


@click.command()
@engine_options
@json_option
@log_option
def caps(engine: str, model: str | None, as_json: bool, log_dir: Path | None) -> int:
    """Show the VMX capability MSRs, decoded.

    Every control is shown by name as fixed 0, fixed 1 or free. --json writes a file for --caps.
    """
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


def _show(output: Output, capabilities: Capabilities) -> None:
    from vmxlab.reports.capabilities import capability_tables

    for table in capability_tables(capabilities) if capabilities.raw else ():
        output.table(table)
