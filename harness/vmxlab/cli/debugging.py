"""`--gdb`: the machine under a debugger, and what the person who has it is told."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vmxlab.cli.output import say

if TYPE_CHECKING:
    from vmxlab.engines.base import Engine, Machine
    from vmxlab.engines.debugger import DebuggerTerminal

_F = TypeVar("_F", bound=Callable[..., Any])


def gdb_option(command: _F) -> _F:
    """--gdb."""
    return click.option(
        "--gdb",
        "debugged",
        is_flag=True,
        help="Run the machine under a debugger: gdb on QEMU (the command is printed), on bochs its own one.",
    )(command)


@contextlib.contextmanager
def debugging(engine: Engine, log_dir: Path, *, own_terminal: bool) -> Iterator[None]:
    """Have the machines that the engine opens inside run under a debugger, if it has one.

    A debugger with a prompt gets the terminal of this process, if `own_terminal` says so and there is one:
    then Ctrl-C is that debugger's. Raises EngineUnavailable where the engine has no debugger.
    """
    from vmxlab.engines.debugger import OwnTerminal, SocketTerminal

    own = own_terminal and sys.stdin.isatty() and sys.stdout.isatty()
    terminal = OwnTerminal() if own else SocketTerminal(log_dir, say)
    for line in engine.debug(log_dir, terminal):
        say(line)
    try:
        with _ctrl_c_for(terminal) if own else contextlib.nullcontext():
            yield
    finally:
        terminal.close()


def wait_for_debugger(machine: Machine) -> None:
    """Wait until gdb has the machine, and lets it go on. A debugger with its own prompt has had it before."""
    if machine.qmp() is not None:
        say("the machine is up; the cases begin when gdb has attached, and lets it go on (c)")
        machine.wait_for_debugger()


@contextlib.contextmanager
def _ctrl_c_for(terminal: DebuggerTerminal) -> Iterator[None]:
    """Hand Ctrl-C to the process that has the terminal's prompt, as long as there is one."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        if terminal.child is None or terminal.child.poll() is not None:
            raise KeyboardInterrupt
        terminal.interrupt()

    before = signal.signal(signal.SIGINT, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
