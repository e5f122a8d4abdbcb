"""A machine that dies in the middle of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vmxlab import Case, IOBitmap, Lab
from vmxlab.cases.memory import DATA
from vmxlab.cases.sweep import Instruction, Question
from vmxlab.cases.sweep_questions import KINDS
from vmxlab.cli import main
from vmxlab.console.run import Verdict
from vmxlab.console.sweep import ask_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadly(Question):
    """At the value 70 L2 tells Bochs to end: the word "Shutdown", written to port 8900H."""

    def case(self) -> Case:
        program = """
            cmp edx, 70
            jne 1f
            mov rsi, DATA
            mov edx, 0x8900
            mov ecx, 8
            rep outsb
        1:  vmcall
        """
        return replace(Question.case(self), program=program, data={DATA: b"Shutdown"})


def question(kind: type[Question], name: str) -> Question:
    return kind(
        name=name,
        instruction=Instruction.IN_AL,
        first=0,
        count=256,
        block=32,
        io_bitmap=IOBitmap.passthrough_all(),
    )


def test_it_is_a_crash_that_says_how_far_the_sweep_got_and_the_next_question_is_asked(tmp_path: Path) -> None:
    harmless = replace(question(Question, "next"), io_bitmap=IOBitmap.intercept_all())
    with Lab("bochs", log_dir=tmp_path) as lab:
        died, lived = ask_all(lab, [question(Deadly, "deadly"), harmless])
    assert died.verdict is Verdict.CRASH
    assert died.exits == 0
    assert "last record: @sweep n=0x0 at=0x20 exits=0x20 " in str(died.error)
    assert died.log_path is not None
    assert f"log: {died.log_path}" in str(died.error)
    assert (lived.verdict, lived.exits) == (Verdict.PASS, 256)


def test_the_command_line_says_so_and_its_status_is_4(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KINDS, "io", lambda seed, quick: [question(Deadly, "deadly")])
    assert main(["sweep", "io", "--engine", "bochs", "--log-dir", str(tmp_path)]) == 4
    out = capfd.readouterr().out
    assert "CRASH  deadly: 0 exits" in out
    assert "  last record: @sweep n=0x0 at=0x20" in out
    assert "0 exits verified" in out
    assert "1 crashed" in out
