"""`vmxlab check`: which rules of VM entry a VMCS breaks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Number, Status, json_option
from vmxlab.cli.output import Output, write_json
from vmxlab.errors import CaseError

if TYPE_CHECKING:
    from vmxlab.oracle.entry import EntryVerdict, Environment
    from vmxlab.reports.vmcs import VmcsText


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--caps", "caps_path", metavar="FILE", help="The processor: a file of 'vmxlab caps --json'.")
@click.option("--model", metavar="MODEL", help="The processor: a known one, such as corei7_skylake_x.")
@click.option(
    "--maxphyaddr",
    type=Number("MAXPHYADDR", 6),
    help="The processor's physical-address width in bits, where the file of --caps does not say it.",
)
@click.option("--host-32-bit", is_flag=True, help="The VMM is not in IA-32e mode (IA32_EFER.LMA is 0).")
@json_option
def check(
    file: Path,
    caps_path: str | None,
    model: str | None,
    maxphyaddr: int | None,
    host_32_bit: bool,
    as_json: bool,
) -> int:
    """Say which rules of VM entry (SDM Vol. 3C, chapter 27) the VMCS in FILE breaks, and what that does.

    FILE ("-" is standard input) is a serial log of the monitor; or JSON, TOML or lines with field names and
    values; or the kernel log with what KVM prints on a failed VM entry (kvm_intel.dump_invalid_vmcs=1).

    A field that is missing is said to be missing, and the rules that need it are listed as not checked.

    Exit status: 0 no rule is broken, 1 the VM entry would fail, 2 usage, 3 FILE can't be read.
    """
    texts = _read(file)
    if caps_path is not None and model is not None:
        raise click.UsageError("--caps and --model both name the processor: give one of them")
    results = []
    for text in texts:
        environment = _environment(text, caps_path, model, maxphyaddr, host_32_bit)
        results.append((text, _checked(text, environment)))
    if as_json:
        write_json([_as_json(text, verdict) for text, verdict in results])
    else:
        output = Output()
        for text, verdict in results:
            _show(output, text, verdict)
    return Status.FAIL if any(verdict.broken for _, verdict in results) else Status.PASS


def _read(file: Path) -> list[VmcsText]:
    from vmxlab.reports.vmcs import read_vmcs_file, read_vmcs_text

    if str(file) == "-":
        return read_vmcs_text(sys.stdin.buffer.read().decode("utf-8", errors="replace"))
    return read_vmcs_file(file)


def _environment(
    text: VmcsText, caps_path: str | None, model: str | None, maxphyaddr: int | None, host_32_bit: bool
) -> Environment:
    from vmxlab.oracle.entry import Environment
    from vmxlab.reports.caps_file import read_caps_file
    from vmxlab.structures.processors import named_processor

    capabilities, width = text.capabilities, text.physical_address_width
    if caps_path is not None:
        caps = read_caps_file(Path(caps_path))
        capabilities, width = caps.capabilities, caps.physical_address_width
    elif model is not None:
        try:
            processor = named_processor(model)
        except CaseError as error:
            raise click.UsageError(f"{error.message}; {error.advice}") from None
        capabilities, width = processor.capabilities, processor.physical_address_width
    if capabilities is None:
        raise click.UsageError(
            f"{text.format} says nothing of the processor: name it with --caps FILE "
            "('vmxlab caps --json' writes one) or --model MODEL"
        )
    return Environment(capabilities=capabilities, maxphyaddr=maxphyaddr or width, efer_lma=not host_32_bit)


def _checked(text: VmcsText, environment: Environment) -> EntryVerdict:
    from vmxlab.oracle.entry import check_entry

    return check_entry(text.fields, environment)


def _show(output: Output, text: VmcsText, verdict: EntryVerdict) -> None:
    from vmxlab.reports.entry_rules import broken_table, contradiction, outcome_in_words, unchecked_table

    output.line(f"{text.title} ({text.format}, {len(text.fields)} fields)", "bold")
    for oddity in text.oddities:
        output.line(f"  {oddity}", "yellow")
    output.line()
    if verdict.broken:
        output.table(broken_table(verdict))
    if verdict.unchecked:
        output.table(unchecked_table(verdict))
        if text.limits:
            output.line(text.limits)
            output.line()
    output.line(f"{len(verdict.broken)} broken: {outcome_in_words(verdict)}", "bold")
    contradicted = contradiction(verdict, text.fields)
    if contradicted is not None:
        output.line(contradicted, "yellow")
    output.line()


def _as_json(text: VmcsText, verdict: EntryVerdict) -> dict[str, object]:
    from vmxlab.reports.entry_rules import broken_table, contradiction, outcome_in_words, unchecked_table

    return {
        "title": text.title,
        "format": text.format,
        "fields": {field.name: f"{value:#x}" for field, value in text.fields.items()},
        "oddities": [{"line": oddity.line, "what": oddity.what} for oddity in text.oddities],
        "broken": broken_table(verdict).json_rows(),
        "not_checked": unchecked_table(verdict).json_rows(),
        "outcome": outcome_in_words(verdict),
        "contradiction": contradiction(verdict, text.fields),
    }
