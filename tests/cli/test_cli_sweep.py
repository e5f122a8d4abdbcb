"""`vmxlab sweep`: verdicts, statuses and what is printed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pexpect
import pytest

from vmxlab import Case, IOBitmap, SecondaryControls
from vmxlab.cases.sweep import Instruction, Question
from vmxlab.cases.sweep_questions import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(Question):
    """The machine gets a bitmap in which one bit is another than the oracle knows."""

    def case(self) -> Case:
        bitmap = self.io_bitmap.copy()
        bitmap.set_intercept(0x4321, not bitmap.intercepts(0x4321))
        return Question.case(replace(self, io_bitmap=bitmap))


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing(Question):
    """It needs what no processor here has."""

    def case(self) -> Case:
        return replace(Question.case(self), enable=SecondaryControls.ENABLE_ENCLV_EXITING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonsense(Question):
    """Its program does not assemble."""

    def case(self) -> Case:
        return replace(Question.case(self), program="foo bar")


def question(kind: type[Question], name: str) -> Question:
    return kind(
        name=name,
        instruction=Instruction.IN_AL,
        first=0x4300,
        count=256,
        io_bitmap=IOBitmap.intercept_all(),
    )


GOOD = question(Question, "good")
BROKEN = question(Broken, "broken")
MISSING = question(Missing, "missing")
NONSENSE = question(Nonsense, "nonsense")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """asked(*questions): what "io" stands for; "msr" stands for nothing."""

    def ask(*questions: Question) -> None:
        monkeypatch.setitem(KINDS, "io", lambda seed, quick: list(questions))
        monkeypatch.setitem(KINDS, "msr", lambda seed, quick: [])

    return ask


def test_a_quick_round_verifies_all_it_asks(vmxlab_cli) -> None:
    result = vmxlab_cli("sweep", "msr", "--quick", "--engine", "bochs")
    assert result.status == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0].startswith("engine  bochs ")
    assert lines[3] == "seed    0"
    assert "PASS  rdmsr-low-all-set: 135 exits, all as predicted" in lines
    assert lines[-2].startswith("6126 exits verified in ")
    assert lines[-2].endswith(": 38 passed")
    assert Path(lines[-1].removeprefix("log  ")).is_file()


def test_ports_that_are_never_read_are_named_with_the_reason(vmxlab_cli, asked) -> None:
    asked(GOOD)
    result = vmxlab_cli("sweep", "io", "--engine", "bochs")
    assert "ports 0x3f8 to 0x3ff are always intercepted: the UART that the harness talks over" in result.out


@pytest.mark.parametrize(
    ("questions", "status", "summary"),
    [
        ([GOOD, MISSING], 0, "1 passed, 1 skipped"),
        ([BROKEN, GOOD], 1, "1 passed, 1 failed"),
        ([BROKEN, NONSENSE, GOOD], 3, "1 passed, 1 failed, 1 had an error"),
    ],
    ids=["skip", "fail", "error"],
)
def test_the_worst_verdict_is_the_exit_status(vmxlab_cli, asked, questions, status, summary) -> None:
    asked(*questions)
    result = vmxlab_cli("sweep", "--engine", "bochs")
    assert result.status == status
    assert result.out.splitlines()[-2].endswith(f": {summary}")


def test_a_difference_is_named_with_what_was_predicted_and_seen(vmxlab_cli, asked) -> None:
    asked(BROKEN)
    result = vmxlab_cli("sweep", "--engine", "bochs")
    lines = result.out.splitlines()
    where = lines.index("FAIL  broken: 256 exits")
    assert lines[where + 1] == (
        "  IN AL, DX, port 0x4321: predicted IO_INSTRUCTION, IN port 0x4321, 1 byte, RIP 0x8000, length 1;"
        " seen exit 33: VMCALL, RIP 0x8001, length 3"
    )
    assert lines[where + 2] == ""


def test_json_has_each_question_and_each_difference(vmxlab_cli, asked) -> None:
    asked(GOOD, BROKEN, NONSENSE)
    shown = vmxlab_cli("sweep", "--engine", "bochs", "--json", "--seed", "5").json
    assert shown["engine"].startswith("bochs ")
    assert shown["seed"] == "5"
    assert shown["exits"] == 512
    assert shown["summary"] == "1 passed, 1 failed, 1 had an error"
    good, broken, nonsense = shown["questions"]
    assert (good["verdict"], good["exits"], good["differences"]) == ("PASS", 256, [])
    assert [difference["value"] for difference in broken["differences"]] == ["0x4321"]
    assert "does not assemble" in nonsense["error"]


def test_without_vmx_each_question_is_skipped_with_the_bit(vmxlab_cli, asked) -> None:
    asked(GOOD)
    result = vmxlab_cli("sweep", "io", "--engine", "tcg")
    assert result.status == 0
    assert "SKIP  good: 0 exits" in result.out
    assert "CPUID.1:ECX.VMX[5]" in result.out


@pytest.mark.parametrize("arguments", [["ports"], ["--seed", "x"], ["--seed", "0x100000000"]], ids=str)
def test_what_can_not_be_asked_is_a_usage_error(vmxlab_cli, arguments: list[str]) -> None:
    result = vmxlab_cli("sweep", *arguments)
    assert result.status == 2
    assert "Usage: " in result.err


def test_a_terminal_shows_a_bar(folder: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "vmxlab.cli", "sweep", "msr", "--quick", "--engine", "bochs"],
        env={"TERM": "xterm-256color", "PATH": "/usr/bin:/bin"},
        timeout=60,
        dimensions=(24, 120),
    )
    text = child.read()
    child.close()
    assert child.exitstatus == 0
    assert b"/6126" in text
    assert b"6126 exits verified" in text
    assert b"all as predicted" in text
