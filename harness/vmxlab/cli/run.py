"""`vmxlab run`: cases in, tables of exits and verdicts out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from vmxlab.cases.case import Case
from vmxlab.cases.program import Mode
from vmxlab.cli.case_files import assemble_ahead, load_cases
from vmxlab.cli.common import Number, Status, engine_options, json_option, log_option, open_lab_by_need
from vmxlab.cli.debugging import debugging, gdb_option, wait_for_debugger
from vmxlab.cli.output import Output, write_json
from vmxlab.cli.reproducers import keep_failed
from vmxlab.console.lab_by_need import LabByNeed
from vmxlab.console.run import Run, Verdict
from vmxlab.errors import OutOfRange, VmxlabError
from vmxlab.reports.disassembly import Code
from vmxlab.reports.runs import (
    VERDICT_STYLES,
    exit_table,
    remarks,
    run_json,
    summary,
    title,
    verdict_text,
)

_MODES = {"long": Mode.LONG, "protected": Mode.PROTECTED, "real": Mode.REAL}

_STATUS_OF = {Verdict.FAIL: Status.FAIL, Verdict.ERROR: Status.ERROR, Verdict.CRASH: Status.CRASH}


@click.command()
@click.argument("files", metavar="[FILE[::NAME]]...", nargs=-1)
@click.option(
    "--program", metavar="TEXT", help="Run this guest program: Intel syntax, ';' between statements."
)
@click.option("--mode", type=click.Choice(list(_MODES)), help="Mode of --program. [default: long]")
@click.option(
    "--intercept-port",
    "ports",
    metavar="N",
    multiple=True,
    type=Number("an I/O port", 16),
    help="Have this port's accesses exit, and no other port's. Without it all do. Repeatable.",
)
@click.option(
    "--intercept-msr",
    "msrs",
    metavar="N",
    multiple=True,
    type=Number("an MSR", 32),
    help="Have RDMSR and WRMSR of this MSR exit, and no other's. Without it all do. Repeatable.",
)
@click.option(
    "--image",
    "from_image",
    is_flag=True,
    help="Boot one image that holds all cases, instead of one by one.",
)
@gdb_option
@engine_options
@json_option
@log_option
def run(
    files: tuple[str, ...],
    program: str | None,
    mode: str | None,
    ports: tuple[int, ...],
    msrs: tuple[int, ...],
    from_image: bool,
    debugged: bool,
    engine: str,
    model: str | None,
    as_json: bool,
    log_dir: Path | None,
) -> int:
    """Run cases, and show what they did.

    The cases are the Case objects, and lists of them, at the top level of each Python FILE; NAME picks one.
    With neither FILE nor --program it is a first case that shows what there is. Without --model a case that
    needs what the engine's default model lacks runs on another one that has it, and the report says so.
    """
    cases = _chosen_cases(files, program, mode, ports, msrs)
    if debugged and from_image:
        raise click.UsageError("either --gdb or --image: an image runs its cases as soon as it is booted")
    runs = []
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(open_lab_by_need(engine, model, log_dir, command="run", debugged=debugged))
        if debugged:
            stack.enter_context(debugging(lab.engine, lab.log_dir, own_terminal=True))
        head = _head(lab)
        if debugged:
            wait_for_debugger(lab.session().machine)
        output = None if as_json else Output()
        if output is not None:
            output.pairs(head.items())
            output.line()
        for case, result in _results(lab, cases, from_image=from_image):
            runs.append((result, _code(case)))
            if output is not None:
                _show(output, *runs[-1])
        entries = lab.nested_entries()
        kept, remark = keep_failed([run for run, _ in runs], lab)
    broken = _broken_lines(run for run, _ in runs)
    if output is None:
        shown = [run_json(run, code) for run, code in runs]
        write_json(
            {
                **head,
                "runs": shown,
                "nested_entries": entries,
                "broken_lines": broken,
                "reproducers": {str(run.number): str(folder) for run, folder in kept},
                "summary": summary([run for run, _ in runs]),
            }
        )
    else:
        _finish(output, [run for run, _ in runs], broken, entries)
        for failed, folder in kept:
            output.line(f"reproducer of {title(failed)}  {folder}")
        if remark:
            output.line(remark)
    return max((_STATUS_OF.get(run.verdict, Status.PASS) for run, _ in runs), default=Status.PASS)


# --- which cases -------------------------------------------------------------------------------------------


def _chosen_cases(
    files: Sequence[str], program: str | None, mode: str | None, ports: Sequence[int], msrs: Sequence[int]
) -> list[Case]:
    if program is None and (mode or ports or msrs):
        raise click.UsageError("--mode, --intercept-port and --intercept-msr are for --program")
    if program is not None:
        if files:
            raise click.UsageError("either --program or files, not both")
        return [_program_case(program, _MODES[mode or "long"], ports, msrs)]
    if not files:
        from vmxlab.demo import first_case

        return [first_case()]
    return [case for argument in files for case in load_cases(argument)]


def _program_case(program: str, mode: Mode, ports: Sequence[int], msrs: Sequence[int]) -> Case:
    from vmxlab.structures import IOBitmap, MsrBitmap

    io_bitmap, msr_bitmap = IOBitmap.passthrough_all(), MsrBitmap.passthrough_all()
    for port in ports:
        io_bitmap.set_intercept(port, True)
    try:
        for msr in msrs:
            msr_bitmap.set_read_intercept(msr, True)
            msr_bitmap.set_write_intercept(msr, True)
    except OutOfRange as error:
        raise click.UsageError(f"--intercept-msr: {error}") from error
    return Case(
        name="program",
        program=program,
        mode=mode,
        io_bitmap=io_bitmap if ports else None,
        msr_bitmap=msr_bitmap if msrs else None,
    )


# --- running -----------------------------------------------------------------------------------------------


def _results(lab: LabByNeed, cases: Sequence[Case], *, from_image: bool) -> Iterator[tuple[Case, Run]]:
    """Each case with its run, as soon as it is there."""
    if from_image:
        yield from zip(cases, lab.run_image(cases), strict=True)
        return
    assemble_ahead(cases)
    for case in cases:
        yield case, lab.run_all([case])[0]


def _code(case: Case) -> Code | None:
    """The machine code of a case; None where it does not assemble."""
    from vmxlab.image.compiler import assemble_programs

    try:
        return Code.of(case, *assemble_programs([case]))
    except VmxlabError:
        return None


# --- showing -----------------------------------------------------------------------------------------------


def _head(lab: LabByNeed) -> dict[str, str]:
    """What stands above every report: what runs it, why that, and which monitor."""
    boot = lab.session().boot_record
    assert boot is not None
    return {
        "engine": lab.info.title(),
        "why": lab.info.why,
        "image": f"monitor build {boot.number('build'):#010x}, protocol {boot.number('protocol')}",
    }


def _show(output: Output, run: Run, code: Code | None) -> None:
    notes = remarks(run)
    if run.exits or notes:
        output.line(title(run), "bold")
    if run.exits:
        output.table(exit_table(run, code))
    for remark in notes:
        output.line(f"  {remark}")
    first, *rest = verdict_text(run).splitlines()
    output.words((run.verdict.name, VERDICT_STYLES[run.verdict]), (f"  {title(run)}: {first}", ""))
    for line in rest:
        output.line(f"  {line}")
    output.line()


def _finish(output: Output, runs: Sequence[Run], broken: Sequence[str], entries: int | None) -> None:
    for line in broken:
        output.line(f"broken line in the serial log: {line}", "bold red")
    if len(runs) > 1:
        output.line(summary(runs), "bold")
    if entries is not None:
        output.line(f"KVM counted {entries} VM entries of the monitor")
    for path in dict.fromkeys(run.log_path for run in runs if run.log_path is not None):
        output.line(f"log  {path}")


def _broken_lines(runs: Iterable[Run]) -> list[str]:
    """Lines of the serial logs that were meant as records and don't check.

    Not the last one, if it has no end: a machine that has answered is stopped in the middle of what it says.
    """
    from vmxlab.console.records import RecordReader

    broken = []
    for path in dict.fromkeys(run.log_path for run in runs if run.log_path is not None):
        reader = RecordReader()
        with contextlib.suppress(OSError):
            for _ in reader.feed(path.read_bytes()):
                pass
        broken += [f"{path}, {line}" for line in reader.broken]
    return broken
