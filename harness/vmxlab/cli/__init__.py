"""The command line, `vmxlab COMMAND`: one module a command.

What they share: `common` (options, the lab, where logs go), `output` (terminal, pipe or JSON), `case_files`
(cases out of Python files). `main` is the entry point: a user's mistake is a message, never a traceback.

Exit status: 0 pass or skip, 1 fail, 2 usage, 3 error, 4 crash, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from vmxlab import __version__
from vmxlab.cli.caps import caps
from vmxlab.cli.carrier import carrier
from vmxlab.cli.check import check
from vmxlab.cli.common import Status
from vmxlab.cli.console import console
from vmxlab.cli.coverage import coverage
from vmxlab.cli.decode import decode
from vmxlab.cli.diff import diff
from vmxlab.cli.doctor import doctor
from vmxlab.cli.fuzz import fuzz
from vmxlab.cli.image import image
from vmxlab.cli.report import report
from vmxlab.cli.run import run
from vmxlab.cli.shell import shell
from vmxlab.cli.sweep import sweep
from vmxlab.errors import MachineError, VmxlabError

__all__ = ["Status", "cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vmxlab")
def cli() -> None:
    """Ask a processor with VMX questions, on any x86-64 machine.

    Exit status: 0 pass or skip, 1 fail, 2 usage, 3 error, 4 crash.
    """


_COMMANDS = (
    *(doctor, caps, run, sweep, fuzz, image, console, shell, carrier),
    *(check, decode, diff, coverage, report),
)
for _command in _COMMANDS:
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. `arguments` are those of the process where None."""
    with _signals_as_exceptions():
        try:
            status = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
            return int(status or Status.PASS)
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort:
            return _say("interrupted", Status.INTERRUPTED)
        except MachineError as error:
            return _say(f"crash: {error}", Status.CRASH)
        except VmxlabError as error:
            return _say(f"error: {error}", Status.ERROR)


def _say(text: str, status: Status) -> int:
    click.echo(f"vmxlab: {text}", err=True)
    return status


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does: machines are stopped, a raw terminal is put back."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: they aren't ours to take
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
