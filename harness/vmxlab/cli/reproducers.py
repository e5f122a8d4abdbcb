"""Reproducers on the command line: of cases that failed, and of any case on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmxlab.cases.case import Case
from vmxlab.cli.output import say
from vmxlab.console.lab_by_need import LabByNeed
from vmxlab.console.run import Run, Verdict
from vmxlab.errors import CaseError, ImageError, LogError, VmxlabError
from vmxlab.image.compiler import CompiledCase
from vmxlab.reports.reproducer import FOLDER, Reproducer, new_folder
from vmxlab.reports.runs import title, verdict_text

_MAX_FAILED = 10


def keep_failed(runs: Sequence[Run], lab: LabByNeed) -> tuple[list[tuple[Run, Path]], str]:
    """A reproducer of each failed case, beside the logs, and what is to be said besides.

    One that can't be written is said so, and changes nothing else.
    """
    failed = [run for run in runs if run.verdict not in (Verdict.PASS, Verdict.SKIP)]
    kept: list[tuple[Run, Path]] = []
    try:
        for run in failed[:_MAX_FAILED]:
            folder = new_folder(lab.log_dir / FOLDER, f"case-{run.number}")
            Reproducer(run, lab.known_info_of(run)).write(folder)
            kept.append((run, folder))
    except VmxlabError as error:
        return kept, f"no reproducer: {error}"
    more = len(failed) - len(kept)
    return kept, f"{more} more failed cases have none: the first {len(kept)} are kept" if more else ""


def write_run(cases: Sequence[Case], lab: LabByNeed, folder: Path) -> list[tuple[str, Path]]:
    """Run cases, and write the reproducer of each: what it is called and where it is.

    What the processor lacks is said, and left out. Raises LogError, and CaseError for a case that can't be.
    """
    written = []
    for run, place in zip(lab.run_all(cases), _places(folder, len(cases)), strict=True):
        if run.verdict is Verdict.SKIP:
            say(f"left out {title(run)}: {verdict_text(run)}")
            continue
        if isinstance(run.error, CaseError):
            raise run.error
        written.append(_write(Reproducer(run, lab.known_info_of(run)), place))
    if not written:
        raise CaseError("no case is left for a reproducer", advice="name another engine or model")
    return written


def write_compiled(compiled: Sequence[CompiledCase], folder: Path) -> list[tuple[str, Path]]:
    """The reproducer of each case, which is not run. Raises LogError."""
    return [
        _write(Reproducer(Run(one.case, number, name=one.case.name, compiled=one), ran=False), place)
        for number, (one, place) in enumerate(zip(compiled, _places(folder, len(compiled)), strict=True))
    ]


def _places(folder: Path, count: int) -> list[Path]:
    """The folder itself for one case, else one in it for each."""
    return [folder] if count == 1 else [folder / f"case-{number}" for number in range(count)]


def _write(reproducer: Reproducer, folder: Path) -> tuple[str, Path]:
    reproducer.write(_made(folder))
    return title(reproducer.run), folder


def _made(folder: Path) -> Path:
    """Make a folder. Raises ImageError for one that has something in it, LogError where it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ImageError(f"the folder {folder} is not empty", advice="name a new one")
    except OSError as error:
        raise LogError(f"{folder} can't be made: {error.strerror}", advice="name another folder") from error
    return folder
