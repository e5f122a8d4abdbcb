"""`vmxlab image`: cases into files that boot by themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from vmxlab.cases.case import Case
from vmxlab.cli.case_files import assemble_ahead, load_cases
from vmxlab.cli.common import Status, engine_options, log_option, open_lab, open_lab_by_need
from vmxlab.cli.output import Output, say
from vmxlab.cli.reproducers import write_compiled, write_run
from vmxlab.engines.choose import AUTO, ENGINES
from vmxlab.engines.rom import RomImage
from vmxlab.errors import CaseError, ImageError, MissingCapability
from vmxlab.image.compiler import CompiledCase, Target, compile_case
from vmxlab.image.frames import pack_payload
from vmxlab.image.iso import UEFI_PACKAGES, pack_iso
from vmxlab.image.monitor import load_monitor
from vmxlab.image.rom import pack_elf, pack_rom
from vmxlab.reports.boot_by_hand import Way, bochs_configuration, ways
from vmxlab.reports.caps_file import CapsFile, read_caps_file

_SUFFIXES = (".rom", ".elf", ".bochsrc", ".iso")


@click.command()
@click.argument("files", metavar="[FILE[::NAME]]...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    default="vmxlab",
    show_default=True,
    metavar="OUT",
    help="Write OUT.rom, OUT.elf and OUT.bochsrc, or what --format says.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["rom", "elf", "both", "iso"]),
    default="both",
    show_default=True,
    help="iso: OUT.iso, for a PC, from CD or USB stick; its output is on COM1, 115200 baud. Its controls "
    "are those of the engine's processor: for another one there is --caps.",
)
@click.option(
    "--caps",
    "caps_files",
    metavar="FILE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Capabilities to make it for, instead of an engine's: what 'vmxlab caps --json' wrote, or the "
    "serial log of an image that booted there. Given more than once: the image suits all of them.",
)
@click.option(
    "--reproducer",
    "folder",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write, in place of OUT.*, what a failed test leaves of its case: image, command lines, log, test. "
    "The case is run for that, but not with --caps. Several cases: one folder each in DIR.",
)
@engine_options
@log_option
@click.pass_context
def image(
    context: click.Context,
    files: tuple[str, ...],
    out: Path,
    kind: str,
    caps_files: tuple[Path, ...],
    folder: Path | None,
    engine: str,
    model: str | None,
    log_dir: Path | None,
) -> int:
    """Write an image that runs cases when it boots.

    The cases are the Case objects, and lists of them, at the top level of each Python FILE; NAME picks one.
    Without FILE it is the first case of 'vmxlab run'. The same cases give the same bytes.
    """
    if caps_files and (engine != AUTO or model is not None):
        raise click.UsageError("either --caps or an engine, not both")
    cases = [case for argument in files for case in load_cases(argument)] or [_first_case()]
    if folder is not None:
        _refuse_with_reproducer(context, "out", "kind")
        _write_reproducers(cases, folder, caps_files, engine, model, log_dir)
        return Status.PASS
    target = _target_of_files(caps_files) if caps_files else _target_of_engine(engine, model, log_dir)
    compiled = _compile(cases, target)
    payload = pack_payload([case.units for case in compiled])
    base = out.with_suffix("") if out.suffix in _SUFFIXES else out
    rom = elf = bochsrc = None
    if kind == "iso":
        _write_iso(base, compiled, target, payload)
        return Status.PASS
    if kind != "elf":
        rom = _write(base, ".rom", pack_rom(target.monitor, payload))
        text = bochs_configuration(RomImage.check(rom), _processors(compiled))
        bochsrc = _write(base, ".bochsrc", text.encode())
    if kind != "rom":
        elf = _write(base, ".elf", pack_elf(target.monitor, payload))
    files_written = [path for path in (rom, elf, bochsrc) if path is not None]
    _report(compiled, files_written, ways(rom, elf, bochsrc, _processors(compiled)))
    return Status.PASS


def _first_case() -> Case:
    from vmxlab.demo import first_case

    return first_case()


def _refuse_with_reproducer(context: click.Context, *names: str) -> None:
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError("either --reproducer, or --output and --format")


def _write_reproducers(
    cases: Sequence[Case],
    folder: Path,
    caps_files: Sequence[Path],
    engine: str,
    model: str | None,
    log_dir: Path | None,
) -> None:
    if caps_files:
        written = write_compiled(_compile(cases, _target_of_files(caps_files)), folder)
    else:
        with open_lab_by_need(engine, model, log_dir, command="image") as lab:
            written = write_run(cases, lab, folder)
    output = Output()
    for name, place in written:
        output.line(f"{name}  {place}")
    output.line(f"Begin with README.md{' in each' if len(written) > 1 else ''}.")


def _target_of_files(paths: Sequence[Path]) -> Target:
    """What all the processors can do together; L2 may run as long as the slowest engine lets it."""
    common: CapsFile | None = None
    for path in paths:
        found = read_caps_file(path)
        try:
            common = found if common is None else common.intersection(found)
        except CaseError as error:
            raise CaseError(
                f"{path} does not go with the files before it: {error.message}", advice=error.advice
            ) from error
    assert common is not None
    budget = max(kind.l2_budget_tsc for kind in ENGINES.values())
    return Target(common.capabilities, load_monitor(), budget, common.physical_address_width)


def _target_of_engine(engine: str, model: str | None, log_dir: Path | None) -> Target:
    with open_lab(engine, model, log_dir, command="image") as lab:
        target = lab.target
        say(f"made for {lab.info.title()}; {lab.info.why}")
    return target


def _compile(cases: Sequence[Case], target: Target) -> list[CompiledCase]:
    """All cases that the target can run; what it lacks is said. Raises CaseError, and if none is left."""
    assemble_ahead(cases)
    compiled: list[CompiledCase] = []
    for number, case in enumerate(cases):
        name = case.name or f"case {number}"
        try:
            compiled.append(compile_case(case, target, number=len(compiled), report_code=True))
        except MissingCapability as error:
            say(f"left out {name}: {error.message}")
        except CaseError as error:
            raise error.locate(case=name) from None
    if not compiled:
        raise CaseError(
            "no case is left for the image", advice="name another engine or model, or other --caps"
        )
    return compiled


def _write(base: Path, suffix: str, content: bytes) -> Path:
    """Write a file, whole or not at all."""
    path = base.with_name(base.name + suffix)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ImageError(
            f"{path} can't be written: {error.strerror}", advice="name another place: --output"
        ) from error
    return path


def _processors(compiled: Sequence[CompiledCase]) -> int:
    """How many the machine must have: what the case with most needs."""
    return max((case.case.processors for case in compiled), default=1)


def _write_iso(base: Path, compiled: Sequence[CompiledCase], target: Target, payload: bytes) -> None:
    elf = pack_elf(target.monitor, payload, claim_memory=True)
    iso = pack_iso(elf, title=f"vmxlab: {_count(compiled)}")
    path = _write(base, ".iso", iso.data)
    _report(compiled, [path], ways(None, None, None, _processors(compiled), path))
    say(f"it boots on a PC with {' or '.join(iso.firmware)} firmware, Secure Boot off")
    if "UEFI" not in iso.firmware:
        say(f"for UEFI firmware as well: apt-get install {UEFI_PACKAGES}")


def _count(compiled: Sequence[CompiledCase]) -> str:
    return f"{len(compiled)} case{'' if len(compiled) == 1 else 's'}"


def _report(compiled: Sequence[CompiledCase], files: Sequence[Path], by_hand: Sequence[Way]) -> None:
    output = Output()
    output.line(f"{_count(compiled)} in")
    for path in files:
        output.line(f"  {path}  {path.stat().st_size} bytes")
    output.line()
    output.line("To boot it by hand:")
    for way in by_hand:
        output.line()
        output.line(f"# {way.what}", "dim")
        output.line(str(way))
