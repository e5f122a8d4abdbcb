"""Asking a machine the questions of a sweep, and holding its digests against the oracle's.

Where a digest differs, its block is asked again in smaller ones, and those that differ with each exit's full
record: what remains are exactly the values whose exits are not what the SDM says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vmxlab.cases.sweep import Instruction, Question
from vmxlab.console.run import End, Exit, Run, Verdict
from vmxlab.console.unfinished import failed_run
from vmxlab.errors import ProtocolError, VmxlabError
from vmxlab.oracle.sweep import Digest, SweptExit, predict_exits, predict_sweep

if TYPE_CHECKING:
    from vmxlab.console.lab import Lab
    from vmxlab.console.lab_by_need import LabByNeed
    from vmxlab.structures import Capabilities

CHUNK_EXITS = 0x8000
"""A question is asked in cases of about so many exits: what a bar can show, and a dead machine costs."""

NARROW_BLOCK = 64
"""Values in a digest the second time; what differs then is asked with full records."""

NAMED = 256
"""So many differing values of a question are named; blocks behind them that differ as well are counted."""


@dataclass(frozen=True, slots=True)
class SweepDifference:
    """One access that did something else. `seen` None: when it was asked again it did as predicted."""

    instruction: Instruction
    value: int
    """Port or MSR."""
    walked: int | None
    """The port or MSR whose bit was changed for it."""
    predicted: SweptExit
    seen: Exit | None

    def __str__(self) -> str:
        what = "port" if self.instruction.is_io else "MSR"
        text = f"{self.instruction.text}, {what} {self.value:#x}"
        if self.walked is not None:
            text += f" (while the bit of {what} {self.walked:#x} was changed)"
        predicted = swept_text(self.predicted)
        if self.seen is None:
            return f"{text}: predicted {predicted}; seen something else once, and not again"
        return f"{text}: predicted {predicted}; seen {self.seen}, length {self.seen.instruction_length}"


def swept_text(exit_: SweptExit) -> str:
    """An exit that was predicted, in the words of `Exit`."""
    words = Exit(
        number=0,
        full_reason=exit_.full_reason,
        raw_qualification=exit_.qualification,
        rip=exit_.rip,
        instruction_length=exit_.instruction_length,
    )
    return f"{str(words).removeprefix('exit 0: ')}, length {exit_.instruction_length}"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What came of a question. `exits`: so many were compared. `error`: why not all were, or none."""

    question: Question
    exits: int = 0
    seconds: float = 0.0
    differences: tuple[SweepDifference, ...] = ()
    more: tuple[Digest, ...] = ()
    """Blocks that differ too, and were not looked into: there were enough differences before them."""
    failure: str | None = None
    """A VMX instruction of the case failed, or L1 took a fault: nothing can be said about the exits."""
    error: Exception | None = None
    log_path: Path | None = None
    verdict_on_error: Verdict | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS where every exit was as predicted."""
        if self.verdict_on_error is not None:
            return self.verdict_on_error
        return Verdict.FAIL if self.differences or self.more or self.failure else Verdict.PASS


@dataclass(slots=True)
class _Answer:
    """The answer as it grows."""

    exits: int = 0
    differences: list[SweepDifference] = field(default_factory=list)
    more: list[Digest] = field(default_factory=list)
    failure: str | None = None
    log_path: Path | None = None

    @property
    def is_full(self) -> bool:
        return len(self.differences) >= NAMED


def ask_all(
    lab: Lab | LabByNeed, questions: Iterable[Question], progress: Callable[[int], None] = lambda exits: None
) -> Iterator[SweepResult]:
    """Ask one after the other. A question that can't be asked, or kills the machine, has that as its result.

    `progress` is called with the number of exits of each piece that is done.
    """
    for question in questions:
        yield ask(lab, question, progress=progress)


def ask(
    lab: Lab | LabByNeed,
    question: Question,
    *,
    predicted: Question | None = None,
    progress: Callable[[int], None] = lambda exits: None,
) -> SweepResult:
    """Ask a question and compare; never raises for what the machine does.

    `predicted`: the oracle is asked this instead, which must be about the same values (a test of the sweep
    itself: what the machine gets is not what the oracle knows).
    """
    start = time.monotonic()
    answer = _Answer()
    error: VmxlabError | None = None
    verdict = None
    try:
        asked = question.suited_to(lab.capabilities)
        expected = (predicted or question).suited_to(lab.capabilities)
        asker = _Asker(lab, lab.capabilities, answer)
        for at, count in _chunks(question):
            part = asked.part(at, count)
            asker.ask(part, expected.part(at, count))
            progress(part.exits)
            if answer.failure:
                break
    except VmxlabError as raised:
        error = raised
        run = failed_run(question.case(), 0, raised)
        verdict, answer.log_path = run.verdict, raised.log_path or answer.log_path
    return SweepResult(
        question,
        answer.exits,
        time.monotonic() - start,
        tuple(answer.differences),
        tuple(answer.more),
        answer.failure,
        error,
        answer.log_path,
        verdict,
    )


def _chunks(question: Question) -> Iterator[tuple[int, int]]:
    per_value = len(question.offsets)
    step = max(1, CHUNK_EXITS // per_value // question.block) * question.block
    for at in range(0, question.count, step):
        yield at, min(step, question.count - at)


class _Asker:
    """Runs the cases of a question, and narrows down where they differ."""

    def __init__(self, lab: Lab | LabByNeed, capabilities: Capabilities, answer: _Answer) -> None:
        self._lab = lab
        self._capabilities = capabilities
        self._answer = answer

    def ask(self, question: Question, predicted: Question) -> None:
        """One case; then the blocks that differ in smaller ones, or their exits one by one."""
        with ThreadPoolExecutor(max_workers=1) as pool:  # the oracle works while the machine does
            digests = pool.submit(predict_sweep, predicted, self._capabilities)
            run = self._run(question)
            expected = digests.result()
        if run.end is End.STOP:
            self._stopped(question, predicted, run)
            return
        if run.end is not End.DONE:
            self._answer.failure = run.difference() or f"the case ended with {run.end}"
            return
        seen = digests_of(run)
        if [(d.at, d.exits) for d in seen] != [(d.at, d.exits) for d in expected]:
            raise ProtocolError(
                f"the sweep {question.name!r} reported {len(seen)} digests of {len(expected)}, or of others"
            )
        self._answer.exits += question.exits
        for one, other in zip(seen, expected, strict=True):
            if one != other:
                self._narrow(question, predicted, other)

    def _run(self, question: Question) -> Run:
        run = self._lab.run(question.case())
        self._answer.log_path = run.log_path
        return run

    def _narrow(self, question: Question, predicted: Question, digest: Digest) -> None:
        """A block whose digest differs."""
        answer = self._answer
        if answer.is_full:
            answer.more.append(digest)
            return
        count = min(question.block, question.count - digest.at)
        before, exits = len(answer.differences) + len(answer.more), answer.exits
        if count > NARROW_BLOCK:
            self.ask(
                question.part(digest.at, count, block=NARROW_BLOCK),
                predicted.part(digest.at, count, block=NARROW_BLOCK),
            )
        else:
            asked = question.part(digest.at, count, report_all=True)
            self._compare(asked, predicted.part(digest.at, count), self._run(asked))
        answer.exits = exits  # asked again, but verified once
        if len(answer.differences) + len(answer.more) == before and not answer.failure:
            first = next(predict_exits(predicted.part(digest.at, count), self._capabilities))
            answer.differences.append(SweepDifference(question.instruction, first.value, None, first, None))

    def _compare(self, question: Question, predicted: Question, run: Run) -> None:
        """The full records of a block against the oracle, one by one."""
        wanted = predict_exits(predicted, self._capabilities)
        for index, (want, have) in enumerate(zip(wanted, run.exits, strict=False)):
            if not matches(want, have, question):
                self._differ(question, index, want, have)

    def _differ(self, question: Question, index: int, want: SweptExit, have: Exit) -> None:
        walked = None
        if question.walk is not None:
            walked = question.first + index // len(question.offsets) * question.stride
        self._answer.differences.append(
            SweepDifference(question.instruction, want.value & question.operand_mask, walked, want, have)
        )

    def _stopped(self, question: Question, predicted: Question, run: Run) -> None:
        """An exit that ends a sweep came: its record is the last one. What is behind it is asked anew."""
        answer, per_value = self._answer, len(question.offsets)
        done = sum(digest.exits for digest in digests_of(run))
        wanted = list(predict_exits(predicted, self._capabilities))
        self._differ(question, done, wanted[done], run.exits[-1])
        value = done // per_value
        rest = question.count - value - 1
        if answer.is_full:
            answer.more.append(Digest(value + 1, rest * per_value, 0))
            return
        # The values before it came to no whole block that could be compared.
        if value:
            self.ask(question.part(0, value), predicted.part(0, value))
        if rest:
            self.ask(question.part(value + 1, rest), predicted.part(value + 1, rest))


def digests_of(run: Run) -> list[Digest]:
    """The digests of a run's (last) sweep."""
    records = [record for record in run.records if record.kind == "sweep"]
    last = max((record.number("n") for record in records), default=0)
    return [
        Digest(record.number("at"), record.number("exits"), record.number("crc"))
        for record in records
        if record.number("n") == last
    ]


def matches(want: SweptExit, have: Exit, question: Question) -> bool:
    """Whether a full record says what the oracle does."""
    return want == SweptExit(
        value=have.registers[question.instruction.register],
        full_reason=have.full_reason,
        rip=have.rip,
        qualification=have.raw_qualification,
        instruction_length=have.instruction_length,
    )
