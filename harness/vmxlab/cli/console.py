"""`vmxlab console`: the monitor's raw prompt, for a person or a pipe."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import click

from vmxlab.cli.common import Status, engine_options, log_option, open_lab
from vmxlab.cli.output import say
from vmxlab.console.session import Session
from vmxlab.engines.base import MachineEnd
from vmxlab.errors import MachineDied, MachineHung
from vmxlab.image.protocol import CONSOLE_FRAME, CONSOLE_PROMPT

KEY_LEAVE = 0x1D
"""Ctrl-], as telnet has it."""

PROMPT_DEADLINE_S = 60.0
"""How long a piped command may be silent."""

_PROMPT = CONSOLE_PROMPT.encode("ascii")
_PIECE = 65536


@click.command()
@engine_options
@log_option
def console(engine: str, model: str | None, log_dir: Path | None) -> int:
    """Talk to the monitor: its raw prompt.

    Ctrl-] leaves. With a pipe for input its lines are sent one by one, each when the prompt is back.
    """
    with open_lab(engine, model, log_dir, command="console") as lab:
        session = lab.session()
        info = session.machine.info
        say(f"{info.title()}; {info.why}")
        say(f"log: {session.log.path}")
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            say("'help' lists the commands; Ctrl-] leaves")
        link = _Link(session)
        ended = link.talk_to_terminal() if at_terminal else link.talk_to_pipe()
        click.echo()
        if not ended:
            return Status.PASS
        end = session.machine.end()
        if end is MachineEnd.SHUTDOWN:
            say(f"the machine ended: {end.value}")
            return Status.PASS
        raise MachineDied(f"the machine ended: {end.value}", advice="the log ends where it did").locate(
            engine=info.title(), log_path=session.log.path
        )


class _Link:
    """Standard input and output on one side, a session's serial line on the other."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._serial = session.machine.serial
        self._input = sys.stdin.fileno()
        self._output = sys.stdout.fileno()
        self._raw_output = sys.stdout.isatty()

    def show(self, data: bytes) -> None:
        """Write to standard output; a file or a pipe gets plain newlines."""
        if not self._raw_output:
            data = data.replace(b"\r", b"")
        while data:
            data = data[os.write(self._output, data) :]

    def talk_to_terminal(self) -> bool:
        """Let a person type, until they leave (False) or the machine ends (True)."""
        with _raw(self._input):
            self.show(_PROMPT)  # which the machine sent when it had booted
            while True:
                ready, _, _ = select.select([self._input, self._serial], [], [])
                if self._serial in ready and not self._receive():
                    return True
                if self._input in ready:
                    typed, left = _until_leaving(os.read(self._input, _PIECE))
                    if typed and not self._send(typed):
                        return True
                    if left:
                        return False

    def talk_to_pipe(self) -> bool:
        """Send the input line by line, each at a prompt. False at its end, True if the machine ends before.

        The monitor has room for a few bytes only while it is at work, so nothing is sent ahead.
        """
        self.show(_PROMPT)
        waiting = b""
        more = True
        while more or waiting:
            if b"\n" not in waiting and more:
                ready, _, _ = select.select([self._input, self._serial], [], [])
                if self._serial in ready and not self._receive():
                    return True
                if self._input in ready:
                    piece = os.read(self._input, _PIECE)
                    waiting += piece
                    more = bool(piece)
                continue
            line, _, waiting = waiting.partition(b"\n")
            if not self._send(line.rstrip(b"\r") + b"\r") or not self._wait_for_prompt():
                return True
        return False

    def _wait_for_prompt(self) -> bool:
        """Show what comes until the prompt is back; False if the machine ends before. Raises MachineHung."""
        tail = b""
        while not tail.endswith(b"\n" + _PROMPT):
            ready, _, _ = select.select([self._serial], [], [], PROMPT_DEADLINE_S)
            if not ready:
                raise MachineHung(
                    f"neither the prompt nor anything else came for {PROMPT_DEADLINE_S:g} s"
                ).locate(engine=self._session.machine.info.title(), log_path=self._session.log.path)
            piece = self._receive()
            if not piece:
                return False
            tail = (tail + piece)[-len(_PROMPT) - 1 :]
        return True

    def _receive(self) -> bytes:
        """What the machine sent, shown and logged; empty when it has ended."""
        try:
            piece = self._serial.recv(_PIECE)
        except ConnectionError:
            return b""
        self._session.log.write(piece)
        self.show(piece)
        return piece

    def _send(self, data: bytes) -> bool:
        """Send to the machine; False when it has ended."""
        try:
            self._serial.sendall(data)
        except ConnectionError:
            return False
        return True


def _until_leaving(typed: bytes) -> tuple[bytes, bool]:
    """What was typed before Ctrl-], and whether that, or the terminal's end, came.

    Ctrl-A would start a frame of the harness, which nobody types: it is left out.
    """
    before, key, _ = typed.partition(bytes([KEY_LEAVE]))
    return before.replace(bytes([CONSOLE_FRAME]), b""), bool(key) or not typed


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """A terminal in raw mode, put back whatever happens."""
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal, termios.TCSANOW)
        yield
    finally:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(terminal, termios.TCSANOW, before)
