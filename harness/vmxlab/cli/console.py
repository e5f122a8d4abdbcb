"""`vmxlab console`: the monitor's own prompt, for a person or a pipe."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Status, engine_options, log_option, open_lab
from vmxlab.cli.output import say
from vmxlab.console.session import Session
from vmxlab.engines.base import MachineEnd
from vmxlab.errors import MachineDied, MachineHung, MissingCapability
from vmxlab.image.protocol import CONSOLE_FRAME, CONSOLE_PROMPT

if TYPE_CHECKING:
    from vmxlab.console.lab import Lab

KEY_LEAVE = 0x1D
"""Ctrl-], as telnet has it."""

KEY_INTERRUPT = 0x03
"""Ctrl-C abandons a line; it ends neither the machine nor this program."""

PROMPT_DEADLINE_S = 60.0
"""How long a piped command may be silent."""

IDLE_S = 1.0
"""So long at the prompt, and the emulator sleeps: polling for the next key would cost a whole core."""

_PROMPT = CONSOLE_PROMPT.encode("ascii")
_PROMPT_AT_LINE_START = b"\n" + _PROMPT
_HOME = b"\x1b[H"
_PIECE = 65536


@click.command()
@click.argument("files", metavar="[FILE[::NAME]]...", nargs=-1)
@engine_options
@log_option
def console(files: tuple[str, ...], engine: str, model: str | None, log_dir: Path | None) -> int:
    """Talk to the monitor: its own prompt, where everything is done by hand.

    The image holds cases for the command 'load': a baseline, and those of the FILEs. Ctrl-] leaves, Ctrl-C
    abandons a line. With a pipe for input its lines are sent one by one, each when the prompt is back.
    """
    with open_lab(engine, model, log_dir, command="console") as lab:
        session = _open(lab, files)
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


def _open(lab: Lab, files: tuple[str, ...]) -> Session:
    """The prompt of an image with the cases; without any, where the processor has no VMX."""
    from vmxlab.cli.case_files import compile_for, load_cases
    from vmxlab.demo import prompt_case
    from vmxlab.image.frames import pack_payload

    cases = [prompt_case(), *(case for argument in files for case in load_cases(argument))]
    try:
        target = lab.target
    except MissingCapability as error:
        say(f"no cases to load: {error.message}")
        return lab.session()
    compiled = compile_for(target, cases)
    payload = pack_payload([case.units for case in compiled], wait=True)
    return lab.image_session(payload, max((case.case.processors for case in compiled), default=1))


class _Link:
    """Standard input and output on one side, a session's serial line on the other."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._machine = session.machine
        self._serial = session.machine.serial
        self._input = sys.stdin.fileno()
        self._output = sys.stdout.fileno()
        self._raw_output = sys.stdout.isatty()
        self._tail = _PROMPT_AT_LINE_START
        """The end of what the machine sent: whether the prompt is there."""
        self._waiting = False
        """For the prompt, after a line was sent."""

    def show(self, data: bytes) -> None:
        """Write to standard output; a file or a pipe gets plain newlines."""
        if not self._raw_output:
            data = data.replace(b"\r", b"")
        while data:
            data = data[os.write(self._output, data) :]

    # --- a person --------------------------------------------------------------------------------------

    def talk_to_terminal(self) -> bool:
        """Let a person type, until they leave (False) or the machine ends (True)."""
        typed = b""
        with _raw(self._input):
            self.show(_PROMPT)  # which the machine sent when it had booted
            while True:
                ready, _, _ = select.select([self._input, self._serial], [], [], self._patience())
                if not ready:
                    self._machine.pause()
                if self._serial in ready and not self._receive():
                    return True
                if self._input in ready:
                    self._machine.resume()
                    more, left = _until_leaving(os.read(self._input, _PIECE))
                    if left:
                        return False
                    typed += self._interrupted(more)
                typed, alive = self._send_lines(typed)
                if not alive:
                    return True

    def _patience(self) -> float | None:
        """How long to wait before the machine is put to sleep; None while it works, or sleeps already."""
        return None if self._waiting or self._machine.paused else IDLE_S

    def _interrupted(self, typed: bytes) -> bytes:
        """Nothing interrupts the monitor while it works, or L2: a Ctrl-C then is answered here."""
        if self._waiting and KEY_INTERRUPT in typed:
            self.show(b"\r\n(no prompt yet: the monitor, or L2, is at work; Ctrl-] leaves)\r\n")
            return typed.replace(bytes([KEY_INTERRUPT]), b"")
        return typed

    def _send_lines(self, typed: bytes) -> tuple[bytes, bool]:
        """Send what can be sent; what is left of it, and whether the machine lives.

        The monitor has room for a few bytes only while it is at work: behind a line's end, of a paste for
        example, the rest waits for the prompt.
        """
        while typed and not self._waiting:
            line, end, rest = typed.partition(b"\r")
            self._waiting = bool(end)
            if not self._send(line + end):
                return typed, False
            typed = rest
        return typed, True

    # --- a pipe ----------------------------------------------------------------------------------------

    def talk_to_pipe(self) -> bool:
        """Send the input line by line, each at a prompt. False at its end, True if the machine ends first."""
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
            if not all(map(self._ask, _without_frames(line).rstrip(b"\r").split(b"\r"))):
                return True
        return False

    def _ask(self, line: bytes) -> bool:
        """Send a line and show what comes until the prompt is back; False if the machine ends before.

        Raises MachineHung.
        """
        self._waiting = True
        if not self._send(line + b"\r"):
            return False
        while self._waiting:
            ready, _, _ = select.select([self._serial], [], [], PROMPT_DEADLINE_S)
            if not ready:
                raise MachineHung(
                    f"neither the prompt nor anything else came for {PROMPT_DEADLINE_S:g} s"
                ).locate(engine=self._machine.info.title(), log_path=self._session.log.path)
            if not self._receive():
                return False
        return True

    # --- the machine -----------------------------------------------------------------------------------

    def _receive(self) -> bytes:
        """What the machine sent, shown and logged; empty when it has ended."""
        try:
            piece = self._serial.recv(_PIECE)
        except ConnectionError:
            return b""
        self._session.log.write(piece)
        self.show(piece)
        self._tail = (self._tail + piece)[-len(_PROMPT_AT_LINE_START) :]
        if self._tail == _PROMPT_AT_LINE_START:
            self._waiting = False
        return piece

    def _send(self, data: bytes) -> bool:
        """Send to the machine; False when it has ended."""
        self._tail = b""  # the prompt that is there is not the answer
        try:
            self._serial.sendall(data)
        except ConnectionError:
            return False
        return True


def _without_frames(typed: bytes) -> bytes:
    """Ctrl-A as first byte of a line would start a frame of the harness, which nobody types: Home instead."""
    return typed.replace(bytes([CONSOLE_FRAME]), _HOME)


def _until_leaving(typed: bytes) -> tuple[bytes, bool]:
    """What was typed before Ctrl-], one CR a line, and whether that, or the terminal's end, came."""
    before, key, _ = typed.partition(bytes([KEY_LEAVE]))
    before = before.replace(b"\r\n", b"\r").replace(b"\n", b"\r")
    return _without_frames(before), bool(key) or not typed


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
