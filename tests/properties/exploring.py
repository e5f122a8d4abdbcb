"""Running many generated cases and comparing each with the oracle; counting what was compared.

A difference that no known difference of the engine explains fails the test: Hypothesis makes the case as
small as it can, and the failure shows it as a test that can be pasted into a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vmxlab import Mode
from vmxlab.console.check import Comparison, Difference, compare
from vmxlab.console.known import explain
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.errors import VmxlabError
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, GENERAL_REGISTERS

from .drawing import Drawn

if TYPE_CHECKING:
    from vmxlab.console.run import Run

_NUMBERS = re.compile(r"0x[0-9a-f]+|\b\d+\b")


@dataclass(slots=True)
class Tally:
    """What generated cases have shown."""

    cases: int = 0
    whole: int = 0
    """Cases that the oracle predicted to their end."""
    exits: int = 0
    exits_predicted: int = 0
    compared: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    """Why predictions ended early, numbers left out."""
    failed: Drawn | None = None
    """The last case that differed, or that the machine did not survive."""
    known: Counter[str] = field(default_factory=Counter)
    """Known differences of the engine, by key: cases in which each was seen."""

    def add(self, run: Run, comparison: Comparison) -> None:
        """One case."""
        self.cases += 1
        self.whole += comparison.prediction.complete
        self.exits += len(run.exits)
        self.exits_predicted += comparison.exits_predicted
        self.compared += comparison.compared
        self.reasons.update(str(getattr(reason, "name", reason)) for reason in run.reasons)
        if comparison.prediction.unknown is not None:
            self.unknown[_NUMBERS.sub("#", comparison.prediction.unknown.why)] += 1

    @property
    def share(self) -> float:
        """Of the cases, those that were predicted to their end."""
        return self.whole / self.cases if self.cases else 1.0

    def counts(self) -> Counter[str]:
        """All of it as one counter, that can be added to others."""
        counts = Counter(
            cases=self.cases,
            whole=self.whole,
            exits=self.exits,
            predicted=self.exits_predicted,
            compared=self.compared,
        )
        for kind, some in (("reason", self.reasons), ("unknown", self.unknown), ("known", self.known)):
            counts.update({f"{kind} {name}": count for name, count in some.items()})
        return counts


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to generate: how many examples, and from which seed; None is the same ones each time."""

    examples: int
    seed: int | None = None


def explore(
    cases: st.SearchStrategy[Drawn],
    run: Callable[[Drawn], Run],
    plan: Plan,
    engine: str,
    version: str,
    tally: Tally,
) -> None:
    """Run generated cases. Raises AssertionError for the first that differs, as small as it can be made."""

    @given(cases)
    def agrees(drawn: Drawn) -> None:
        try:
            result = run(drawn)
        except VmxlabError as error:
            tally.failed = drawn
            error.add_note(f"the case as a test:\n\n{drawn.source()}")
            raise
        comparison = compare(result)
        tally.add(result, comparison)
        without_paging = _goes_on_without_paging(drawn, comparison.differences, engine, version)
        explained = [
            (difference, key or without_paging or _by_its_program(drawn, difference, engine, version))
            for difference, key in explain(comparison.differences, engine, version)
        ]
        tally.known.update({key for _, key in explained if key is not None})
        new = [difference for difference, key in explained if key is None]
        if new:
            tally.failed = drawn
            raise AssertionError(report(drawn, result, new, engine))

    chosen = settings(
        max_examples=plan.examples,
        derandomize=plan.seed is None,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    check = chosen(agrees)
    if plan.seed is not None:
        check = hypothesis.seed(plan.seed)(check)
    check()


_PAGING = "cr0-pg-not-fixed-in-32-bit-mode"


def _goes_on_without_paging(
    drawn: Drawn, differences: Sequence[Difference], engine: str, version: str
) -> str | None:
    """The known difference where #GP(0) is predicted, and L2 goes on with CR0.PG = 0: then all differs."""
    if drawn.mode is Mode.REAL or not KNOWN_DIFFERENCES[_PAGING].applies(engine, version):
        return None
    cleared = [
        difference
        for difference in differences
        if difference.attribute == Field.GUEST_CR0.name
        and difference.reason == ExitReason.EXCEPTION_OR_NMI
        and isinstance(difference.said, int)
        and difference.said & CR0.PG
        and not (difference.have or 0) & CR0.PG
    ]
    return _PAGING if cleared and differences[0].attribute == "full_reason" else None


_LMSW = "kvm-lmsw-drops-the-read-shadow"


def _by_its_program(drawn: Drawn, difference: Difference, engine: str, version: str) -> str | None:
    """A known difference that shows in what a register holds later: for that the program has to be known."""
    fields: Mapping[Field, int] = drawn.rest.get("fields", {})  # type: ignore[assignment]
    said, have = difference.said, difference.have
    if not KNOWN_DIFFERENCES[_LMSW].applies(engine, version) or difference.attribute not in GENERAL_REGISTERS:
        return None
    if not isinstance(said, int) or have is None or not any("lmsw" in line.text for line in drawn.lines):
        return None
    return _LMSW if not (said ^ have) & ~fields.get(Field.CR0_GUEST_HOST_MASK, 0) else None


def report(drawn: Drawn, run: Run, differences: list[Difference], engine: str) -> str:
    """What a failure says."""
    lines = [f"not what the SDM says, on {engine}:", *(f"  {difference}" for difference in differences)]
    return "\n".join([*lines, "as a test:", "", drawn.source()])
