"""`--gdb`: gdb's stub on QEMU, Bochs's own debugger on Bochs, and where there is neither."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

COMMAND = (sys.executable, "-m", "vmxlab.cli")
DEADLINE_S = 60


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=DEADLINE_S)


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """The next line of standard error that holds `text`."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"{text!r} never came")


class Remote:
    """The other end of a gdb stub: a few packets of the remote protocol."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(str(path))
        self.seen = b""

    def send(self, packet: str) -> None:
        self.socket.sendall(f"${packet}#{sum(packet.encode()) & 0xFF:02x}".encode())

    def receive(self) -> str:
        while (found := re.search(rb"\$([^#]*)#[0-9a-f]{2}", self.seen)) is None:
            piece = self.socket.recv(4096)
            assert piece, "the stub has hung up"
            self.seen += piece
        self.seen = self.seen[found.end() :]
        self.socket.sendall(b"+")
        return found[1].decode()

    def ask(self, packet: str) -> str:
        """The answer; that the machine has stopped, the stub says unasked as well."""
        self.send(packet)
        while (answer := self.receive()).startswith("T") and packet != "?":
            pass
        return answer


def test_cases_begin_when_a_debugger_has_let_the_machine_go_on(folder: Path) -> None:
    with started("run", "--gdb", "--engine", "tcg", "--program", "hlt") as process:
        command = line_with(process, "debugger: gdb")
        assert "target remote logs/run-1/gdb.sock" in command
        line_with(process, "the cases begin when gdb has attached")
        assert process.poll() is None
        remote = Remote(Path("logs/run-1/gdb.sock"))
        assert remote.ask("?").startswith("T")
        assert len(bytes.fromhex(remote.ask("m100000,10"))) == 16
        remote.send("c")
        out, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert "SKIP" in out, "there is no VMX, and that is what the case says"
    assert not Path("logs/run-1/gdb.sock").exists()


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_the_printed_command_attaches_gdb_with_symbols_and_sources(folder: Path) -> None:
    with started("run", "--gdb", "--engine", "tcg", "--program", "hlt") as process:
        command = shlex.split(line_with(process, "debugger: gdb").partition("debugger: ")[2])
        line_with(process, "the cases begin when gdb has attached")
        asked = [
            word for line in ("bt", "info line monitor_main", "continue&", "detach") for word in ("-ex", line)
        ]
        said = subprocess.run(
            [command[0], "-nx", "-batch", *command[1:], *asked],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        ).stdout
        assert re.search(r"#\d+ .*console_run \(\) at \S*console/console\.c:\d+", said), said
        assert re.search(r'Line \d+ of "\S*monitor/main\.c" starts at address 0x1\w+ <monitor_main>', said), (
            said
        )
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0


def test_a_shell_has_the_stub_all_the_time_and_an_idle_machine_is_not_held(folder: Path) -> None:
    code = (
        "import pathlib, time\n"
        "pathlib.Path('ready').touch()\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
        "vm.memory.read_u8(0x1000000)\n"
    )
    with started("shell", "--gdb", "--engine", "tcg", "-c", code) as process:
        wait_for(Path("ready").exists)
        remote = Remote(Path("logs/shell-1/gdb.sock"))
        assert remote.ask("?").startswith("T")
        remote.send("c")
        Path("go").touch()
        out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (0, "0\n"), err


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_on_bochs_its_debugger_has_the_terminal_and_ctrl_c(folder: Path) -> None:
    program = ["--program", "cpuid; again: jmp again"]
    terminal = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], "run", "--gdb", "--engine", "bochs", *program],
        env={**os.environ, "TERM": "dumb"},
        dimensions=(50, 150),
        timeout=DEADLINE_S,
        encoding="utf-8",
    )
    try:
        terminal.expect("debugger: Bochs's own")
        terminal.expect("<bochs:1> ")
        terminal.sendline('ldsym global "monitor.sym"')
        terminal.expect("<bochs:2> ")
        terminal.sendline("vmexitbp")
        terminal.expect("<bochs:3> ")
        terminal.sendline("c")
        terminal.expect("Caught VMEXIT breakpoint")
        terminal.expect("vmx_exit_entry")  # by its name: the symbols are there
        terminal.expect("<bochs:4> ")
        terminal.sendline("vmexitbp")
        terminal.expect("<bochs:5> ")
        terminal.sendline("c")
        log = Path("logs/run-1/serial-1.log")
        wait_for(lambda: "reason=0xa" in log.read_text())
        terminal.sendintr()  # L2 runs in a circle
        terminal.expect("<bochs:6> ")
        terminal.sendline("q")
        terminal.expect("crash|CRASH")
        terminal.expect(pexpect.EOF)
        assert "Traceback" not in terminal.before
    finally:
        terminal.close(force=True)


def test_beside_a_shell_bochs_s_prompt_waits_at_a_socket(folder: Path) -> None:
    with started("shell", "--gdb", "--engine", "bochs", "-c", "vm.enter('hlt').reason.name") as process:
        line = line_with(process, "waits for a terminal: nc -U ")
        path = Path(line.split()[-1])
        with socket.socket(socket.AF_UNIX) as prompt:
            prompt.settimeout(DEADLINE_S)
            prompt.connect(str(path))
            seen = b""
            while b"<bochs:1> " not in seen:
                seen += prompt.recv(4096)
            prompt.sendall(b"c\n")
            out, err = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (0, "'HLT'\n"), err
        assert not path.exists()


def test_where_there_is_no_debugger_that_is_said(vmxlab_cli) -> None:
    for command in (("run",), ("shell", "-c", "1")):
        result = vmxlab_cli(*command, "--gdb", "--engine", "kvm-in-bochs")
        assert result.status == 3
        assert "there is no debugger for its machines" in result.err
        assert "on tcg and kvm it is gdb" in result.err


def test_an_image_can_not_wait_for_a_debugger(vmxlab_cli) -> None:
    assert vmxlab_cli("run", "--gdb", "--image").status == 2
