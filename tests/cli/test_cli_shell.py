"""`vmxlab shell` with code, in a pipe, and at a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest

from vmxlab.cli import main
from vmxlab.cli.shell import status_of
from vmxlab.errors import CaseError, LiveStateLost, MachineHung

COMMAND = (sys.executable, "-m", "vmxlab.cli", "shell")


def called(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=60)


SCRIPT = """
vm
vm.io_bitmap.set_intercept(0x60, True)
vm.enter("mov ebx, 5; in al, 0x60")
vm.last_exit.qualification
vm.vmread(Field.PIN_BASED_CONTROLS) & 1, vm.vmread(Field.GUEST_RFLAGS)
vm.skip(); vm.step()
vm.vmptrst()
vm.changes
vm.snapshot()
"""


def test_what_expressions_give_is_shown_decoded(folder: Path, vmxlab_cli) -> None:
    done = called("--engine", "bochs", text=SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    head, _, snapshot = done.stdout.partition("\ncontrols: ")
    lines = head.splitlines()
    assert lines[0].startswith("<LiveMachine bochs ")
    assert lines[0].endswith("VMCS 0x1001000 clear>")
    assert lines[1:] == [
        "exit 0: IO_INSTRUCTION, IN port 0x60, 1 byte",
        "  rip=0x8005, 2 bytes; rflags=0x2 (FIXED1)",
        "  rbx=0x5 rsp=0x7ff0",
        "since the entry: GUEST_RIP 0x8000 -> 0x8005; rbx 0x0 -> 0x5",
        "IN port 0x60, 1 byte (0x600048)",
        "  size=0x1 direction_in=True string=False rep=False immediate_operand=True port=0x60",
        "(1, 0x2 (FIXED1))",
        "0 steps by RFLAGS.TF, RIP 0x8007; then exit 0: HLT, RIP 0x8007",
        "  rbx=0x5 rsp=0x7ff0",
        "VMPTRST: VMsucceed, 0x1001000",
        "EXIT_REASON 0x1e -> 0xc: HLT",
        "EXIT_INSTRUCTION_LENGTH 0x2 -> 0x1",
        "EXIT_QUALIFICATION 0x600048 -> 0x0",
    ]
    assert "EPT_POINTER" in snapshot
    assert "(code, readable, accessed, DPL 0, present, L, G)" in snapshot
    assert snapshot.splitlines()[-1] == "registers: rbx=0x5"
    assert not list(folder.rglob(".ipython"))
    (log,) = Path("logs/shell-1").glob("serial-*.log")
    story = vmxlab_cli("decode", log).out
    assert "\n  now  GUEST_RIP 0x8005, EXIT_REASON 0x1e (IO_INSTRUCTION)," in story
    assert "  0  0x8005  in al, 0x60  " in story
    assert "not known" not in story


@pytest.mark.parametrize(
    ("engine", "code", "status", "said"),
    [
        ("tcg", "assert vm.has_vmx", 1, ""),
        (
            "tcg",
            "vm.vmread(Field.GUEST_RIP)",
            3,
            "vmxlab: error: the processor lacks VMX (CPUID.1:ECX.VMX[5]",
        ),
        ("bochs", "vm.vmwrite(Field.HOST_CR3, 0x3f00000); vm.enter('hlt')", 4, "vmxlab: crash: the machine"),
    ],
)
def test_code_has_a_status_and_a_mistake_no_traceback(
    folder: Path, engine: str, code: str, status: int, said: str
) -> None:
    done = called("--engine", engine, "-c", code)
    assert (done.returncode, said in done.stderr) == (status, True), done
    assert not said or "Traceback" not in done.stdout + done.stderr
    if status == 4:
        assert "last record: @" in done.stderr
        assert "log: logs/shell-1/serial-1.log" in done.stderr
        assert "vm.restart()" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (AssertionError(), 1), (ZeroDivisionError(), 3), (CaseError("no"), 3), (MachineHung("no"), 4),
     (LiveStateLost("no"), 4), (KeyboardInterrupt(), 130), (SystemExit(7), 7), (SystemExit(None), 0)],
)  # fmt: skip
@pytest.mark.parametrize("place", ["error_in_exec", "error_before_exec"])
def test_the_status_is_that_of_the_error(place, error, status) -> None:
    result = SimpleNamespace(error_in_exec=None, error_before_exec=None)
    setattr(result, place, error)
    assert status_of(result) == status


def test_without_ipython_the_error_names_the_command(folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert main(["shell", "--engine", "tcg"]) == 3
    assert "pip install 'vmxlab[shell]'" in capsys.readouterr().err
    assert not Path("logs").exists()


def wait_for_an_entry(log: Path) -> None:
    """Until the last that the monitor said is what it says before a VM entry."""
    deadline = time.monotonic() + 60
    while not re.search(rb"@snapshot[^\n]*\*[0-9a-f]{4}\r\n$", log.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_person_types_interrupts_and_goes_on(folder: Path) -> None:
    terminal = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], "--engine", "bochs"],
        env={**os.environ, "HOME": str(folder), "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"},
        dimensions=(50, 150),
        timeout=60,
        encoding="utf-8",
    )
    try:
        terminal.expect("vm is a live machine, set up and not entered")
        terminal.expect(r"\[1\]: ")
        terminal.sendline("vm.enter('cpuid; hlt')")
        terminal.expect("exit 0: CPUID, leaf 0x0, subleaf 0x0")
        terminal.expect(r"\[2\]: ")
        terminal.sendline("vm.vmread('GUEST_RIQ')")
        terminal.expect("vmxlab: error: there is no VMCS field")
        terminal.expect(r"\[3\]: ")
        # L2 sleeps for good: no HLT exit, no timer.
        terminal.sendline(
            "vm.disable(PrimaryControls.HLT_EXITING); vm.vmwrite(Field.PIN_BASED_CONTROLS, 0x16)"
        )
        terminal.expect(r"\[4\]: ")
        terminal.sendline("vm.skip(); vm.resume()")
        wait_for_an_entry(folder / "logs/shell-1/serial-1.log")
        terminal.sendintr()
        terminal.expect("waiting for the machine's answer")
        terminal.sendintr()
        terminal.expect("vmxlab: interrupted, in the middle of a command: the machine was given up")
        terminal.expect(r"\[5\]: ")
        terminal.sendline("vm.restart(); vm.enter('hlt').reason")
        terminal.expect("ExitReason.HLT: 12")
        terminal.expect(r"\[6\]: ")
        terminal.sendline("exit")
        terminal.expect(pexpect.EOF)
        assert "Traceback" not in terminal.before
    finally:
        terminal.close(force=True)
    assert terminal.exitstatus == 0
