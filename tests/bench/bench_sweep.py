"""Sweeps: exits that are verified in a second, the oracle's work included.

Besides wall time there is the emulator's own CPU time: on a machine that does other work too, it alone says
how fast a sweep is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from vmxlab import Lab
from vmxlab.cases.sweep import Question
from vmxlab.cases.sweep_questions import io_questions, msr_questions
from vmxlab.console.run import Verdict
from vmxlab.console.sweep import ask_all

Line = Callable[[str, str, str], None]
GOALS = {"bochs": "at least 40000", "kvm-in-bochs": "at least 1500"}


def cpu_seconds(lab: Lab) -> float:
    """CPU time of the emulator of the lab's machine, user and system (proc(5), stat, fields 14 and 15)."""
    stat = Path(f"/proc/{lab.session().machine.pid}/stat").read_text(encoding="ascii")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def bench_sweep(line: Line, lab: Lab, *, quick: bool) -> None:
    """All that `vmxlab sweep` asks; with `quick` an eighth of each question, as it comes."""
    questions: list[Question] = [*io_questions(), *msr_questions()]
    if quick:
        questions = [question.part(0, (question.count + 7) // 8) for question in questions]
    lab.session()
    start, cpu_start = time.perf_counter(), cpu_seconds(lab)
    results = list(ask_all(lab, questions))
    seconds, cpu = time.perf_counter() - start, cpu_seconds(lab) - cpu_start
    wrong = [result.question.name for result in results if result.verdict is not Verdict.PASS]
    assert not wrong, wrong
    exits = sum(result.exits for result in results)
    goal = GOALS.get(lab.engine.name, "-")
    line(f"a sweep of {exits} exits, verified", f"{exits / seconds:.0f} exits/s", goal)
    line("the same by CPU time of the emulator", f"{exits / cpu:.0f} exits/s", goal)
