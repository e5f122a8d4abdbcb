"""What the commands share: options, numbers, the lab, and where its logs go."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmxlab.engines.choose import AUTO, AUTO_KVM, ENGINES
from vmxlab.errors import LogError

if TYPE_CHECKING:
    from vmxlab.console.lab import Lab
    from vmxlab.console.lab_by_need import LabByNeed

    _NumberType = click.ParamType[int]
else:
    # Generic since click 8.2.
    _NumberType = click.ParamType

_F = TypeVar("_F", bound=Callable[..., Any])

LOG_DIR = Path("logs")
"""Below the current directory, unless --log-dir names another one."""


class Status(IntEnum):
    """Exit statuses of the process."""

    PASS = 0
    """SKIP too."""
    FAIL = 1
    USAGE = 2
    ERROR = 3
    CRASH = 4
    INTERRUPTED = 130
    """128 + SIGINT, as shells have it."""
    CLOSED_PIPE = 141
    """128 + SIGPIPE."""


class Number(_NumberType):
    """A number, decimal or with 0x, of at most so many bits."""

    name = "number"

    def __init__(self, what: str, bits: int) -> None:
        self._what = what
        self._bits = bits

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to number; a click error for anything else."""
        if isinstance(value, int):
            return value
        try:
            number = int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is no number; write 96 or 0x60", param, ctx)
        if not 0 <= number < 1 << self._bits:
            self.fail(f"{value} is out of range: {self._what} is 0 to {(1 << self._bits) - 1:#x}", param, ctx)
        return number


def engine_options(command: _F) -> _F:
    """--engine and --model."""
    engine = click.option(
        "--engine",
        type=click.Choice([AUTO, AUTO_KVM, *ENGINES]),
        default=AUTO,
        show_default=True,
        help="What runs it. auto takes kvm where nested VMX is proven, else bochs; "
        "auto-kvm else kvm-in-bochs.",
    )
    model = click.option("--model", metavar="MODEL", help="Processor model; 'vmxlab doctor' lists them.")
    return engine(model(command))


def log_option(command: _F) -> _F:
    """--log-dir."""
    return click.option(
        "--log-dir",
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Where serial and engine logs are kept. [default: a new folder in {LOG_DIR}/]",
    )(command)


def json_option(command: _F) -> _F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")(command)


def open_lab(
    engine: str, model: str | None, log_dir: Path | None, *, command: str, debugged: bool = False
) -> Lab:
    """The lab of a command; leaving it stops its machine. Raises EngineUnavailable, LogError."""
    from vmxlab.console.lab import Lab

    lab = Lab(engine, model=model, log_dir=log_dir or new_log_dir(command), debugged=debugged)
    if not debugged:  # what takes long to prepare has no debugger, and says so first
        lab.engine.prepare(lambda what: click.echo(f"vmxlab: {what}", err=True))
    return lab


def open_lab_by_need(
    engine: str, model: str | None, log_dir: Path | None, *, command: str, debugged: bool = False
) -> LabByNeed:
    """As `open_lab`; without --model each case runs on a processor model that has what it needs."""
    from vmxlab.console.lab_by_need import LabByNeed

    lab = LabByNeed(engine, model=model, log_dir=log_dir or new_log_dir(command), debugged=debugged)
    if not debugged:  # what takes long to prepare has no debugger, and says so first
        lab.engine.prepare(lambda what: click.echo(f"vmxlab: {what}", err=True))
    return lab


def new_log_dir(command: str, parent: Path = LOG_DIR) -> Path:
    """Make a folder for one call of a command: "logs/run-1", "logs/run-2", ... Raises LogError."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / f"{command}-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise LogError(
            f"there can be no logs in {parent.absolute()}: {os.strerror(error.errno or 0)}",
            advice="name a folder that can be written: --log-dir",
        ) from error
    raise AssertionError("unreachable")
