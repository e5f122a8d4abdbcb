"""`vmxlab console` in a pipe and at a terminal, and what signals do to a command."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "vmxlab.cli")


def piped(folder: Path, text: str, engine: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "console", "--engine", engine],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )


def test_piped_commands_are_answered_one_by_one(folder: Path) -> None:
    done = piped(folder, "help\nrdmsr 0x480\nnonsense", "bochs")
    assert done.returncode == 0
    first, second, third, last = done.stdout.split("vmx> ")[1:]
    assert first.startswith("help\n  help ")
    assert second.startswith("rdmsr 0x480\nIA32_VMX_BASIC (0x480) = 0x")
    assert third.startswith("nonsense\nthere is no command")
    assert last == "\n"
    assert "bochs" in done.stderr
    *_, log = sorted(Path("logs/console-1").glob("serial-*.log"))  # the first boot asked for the capabilities
    assert "there is no command 'nonsense'" in log.read_text()


def test_no_input_at_all_shows_the_prompt_and_leaves(folder: Path) -> None:
    done = piped(folder, "", "tcg")
    assert (done.returncode, done.stdout) == (0, "vmx> \n")


def test_a_reset_by_the_guest_ends_the_console(folder: Path) -> None:
    done = piped(folder, "reset\nhelp\n", "tcg")
    assert done.returncode == 0
    assert "the machine ended: the guest asked for the end" in done.stderr


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.master, self.slave = pty.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
        )
        self.seen = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            ended = self.process.poll() is not None
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096)
            else:
                assert not ended, self.seen
        self.seen = self.seen.split(text, 1)[1]

    def send(self, text: bytes) -> None:
        os.write(self.master, text)

    def leave(self) -> None:
        """By the key, which stops the machine."""
        self.send(b"\x1d")
        assert self.process.wait(10) == 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(["console", "--engine", "tcg"])
    yield terminal
    terminal.close()


def test_a_person_types_and_leaves_by_the_key(terminal: Terminal) -> None:
    terminal.expect(b"Ctrl-] leaves")
    terminal.expect(b"vmx> ")
    raw = termios.tcgetattr(terminal.slave)
    assert not raw[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    terminal.send(b"\x01nonsense\x03")  # Ctrl-A is Home, and announces no frame; Ctrl-C abandons a line
    terminal.expect(b"^C")
    terminal.send(b"helpx\x7f\r")
    terminal.expect(b"this list")
    terminal.expect(b"vmx> ")
    terminal.send(b"he\x1d")
    assert terminal.process.wait(10) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.settings


def test_lines_that_are_pasted_are_answered_one_by_one(terminal: Terminal) -> None:
    """The monitor has room for a few bytes only while it works: the rest waits for the prompt."""
    terminal.expect(b"vmx> ")
    terminal.send(b"help\rhelp\r\ndecode 10\rhelp\ndecode 12\r")
    terminal.expect(b"reason         CPUID")
    terminal.expect(b"reason         HLT")
    terminal.expect(b"vmx> ")
    terminal.leave()


def test_an_idle_prompt_costs_nothing_and_wakes_at_a_key(terminal: Terminal, folder: Path) -> None:
    terminal.expect(b"vmx> ")
    (command,) = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and is_qemu_in(pid, folder)]
    deadline = time.monotonic() + 30
    while (command / "stat").read_text().rpartition(") ")[2][0] != "T":  # stopped
        assert time.monotonic() < deadline
    terminal.send(b"decode 12\r")
    terminal.expect(b"reason         HLT")
    terminal.leave()


def test_ctrl_c_does_not_end_what_l2_does_and_says_so(folder: Path) -> None:
    """Without a preemption timer nothing ends an endless loop but leaving."""
    terminal = Terminal(["console", "--engine", "bochs"])
    try:
        for line in (b"load", b"code eb fe", b"vmwrite PIN_BASED_CONTROLS 0x16"):
            terminal.expect(b"vmx> ")
            terminal.send(line + b"\r")
        terminal.expect(b"PIN_BASED_CONTROLS (0x4000) = 0x16")
        terminal.send(b"launch\r")
        terminal.expect(b"note: the preemption timer is not active")
        terminal.send(b"\x03")
        terminal.expect(b"(no prompt yet: the monitor, or L2, is at work; Ctrl-] leaves)")
        terminal.leave()
    finally:
        terminal.close()


def test_a_terminal_is_put_back_when_the_console_is_ended_by_a_signal(terminal: Terminal) -> None:
    terminal.expect(b"vmx> ")
    terminal.process.terminate()
    assert terminal.process.wait(10) == 128 + signal.SIGTERM
    assert termios.tcgetattr(terminal.slave) == terminal.settings


def test_a_machine_that_dies_under_the_console_is_a_crash_and_the_terminal_is_put_back(
    terminal: Terminal, folder: Path
) -> None:
    terminal.expect(b"vmx> ")
    (command,) = [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and is_qemu_in(pid, folder)]
    os.kill(int(command.name), signal.SIGKILL)
    terminal.expect(b"vmxlab: crash: the machine ended: the engine's process was ended by a signal")
    assert terminal.process.wait(10) == 4
    assert termios.tcgetattr(terminal.slave) == terminal.settings


def is_qemu_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "exe").readlink().name.startswith("qemu") and (
            process / "cwd"
        ).readlink().is_relative_to(folder)
    except OSError:
        return False


def test_a_run_shows_its_tables_on_a_terminal(folder: Path) -> None:
    terminal = Terminal(["run", "--engine", "bochs"])
    try:
        terminal.expect("\u2500\u2500".encode())  # a rule of rich
        terminal.expect(b"mov [0x100000]")
        terminal.expect(b"PASS")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_a_run_without_traceback_and_without_a_process_left(
    folder: Path, number: signal.Signals, status: int
) -> None:
    Path("cases.py").write_text(
        "from vmxlab import Case, Limits\n"
        "quick = Case()\n"
        "endless = Case(program='1: jmp 1b', limits=Limits(l2_tsc=1 << 31, seconds=100))\n"
    )
    process = subprocess.Popen(
        [*COMMAND, "run", "--engine", "bochs", "cases.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has it ignored, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    while "PASS  quick" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in said
    if number is signal.SIGINT:
        assert said.strip() == "vmxlab: interrupted"
