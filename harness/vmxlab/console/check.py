"""A run against the oracle: `Run.check()`, field by field.

    differences = run.check()
    assert not differences, "\\n".join(map(str, differences))

Only what the oracle says is compared, not what the SDM leaves undefined, nor what the oracle does not know.
`compare` also counts: how many exits were predicted, how many single values were compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmxlab.errors import CaseError
from vmxlab.oracle.prediction import EXIT_ATTRIBUTES, PredictedExit, PredictedOutcome, Prediction
from vmxlab.oracle.values import Rule, Value, agrees, describe, is_said
from vmxlab.sdm.exit_reasons import ExitReason, basic_reason

if TYPE_CHECKING:
    from vmxlab.console.run import Exit, Outcome, Run


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as the oracle says.

    `where`: "exit 2: rflags", "outcome 4 (vmlaunch)", "end", ... `predicted`, `seen`: in words. `rules`: what
    the prediction rests on. Of an exit's difference: the exit's `number`, `attribute`, the exit `reason`
    predicted, and both values, `said` and `have` (None where there is no such exit). Of an outcome's: its
    operation, `outcome`. Of a byte of memory: "memory" as `attribute`, and both bytes where they are in
    their 8 bytes.
    """

    where: str
    predicted: str
    seen: str
    rules: tuple[Rule, ...] = ()
    attribute: str = ""
    reason: ExitReason | int | None = None
    said: Value | None = None
    have: int | None = None
    number: int | None = None
    outcome: str = ""

    @property
    def diverges(self) -> bool:
        """Whether from here on L2, or L1, goes another way than was predicted."""
        return bool(self.outcome) or self.attribute == "full_reason"

    def __str__(self) -> str:
        """One line."""
        because = "; ".join(map(str, self.rules))
        return f"{self.where}: the SDM says {self.predicted}, seen {self.seen}" + (
            f" [{because}]" if because else ""
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run beside its prediction.

    `compared`: single values that could have differed. `exits_predicted`: exits of the run that the oracle
    predicted; the others (`exits_unknown`) came after the end of its knowledge.
    """

    prediction: Prediction
    differences: tuple[Difference, ...]
    compared: int
    exits_predicted: int
    exits_unknown: int


def check(run: Run) -> tuple[Difference, ...]:
    """What is not as the SDM says, in the order of the run; empty where all is.

    Raises CaseError for a run that was read from a log: what case it was is not known.
    """
    return compare(run).differences


def compare(run: Run) -> Comparison:
    """The run beside its prediction. Raises CaseError as `check` does."""
    from vmxlab.oracle.predict import predict

    if run.compiled is None:
        raise CaseError(
            "a run without its compiled case can't be checked",
            advice="check runs that come from a Lab; one that was read from a log has no case",
        )
    return compare_with(run, predict(run.compiled))


def compare_with(run: Run, prediction: Prediction) -> Comparison:
    """The run beside any prediction."""
    comparer = _Comparer(run, prediction)
    comparer.compare()
    predicted = min(len(prediction.exits), len(run.exits))
    return Comparison(
        prediction,
        tuple(comparer.differences),
        comparer.compared,
        predicted,
        len(run.exits) - predicted,
    )


class _Comparer:
    def __init__(self, run: Run, prediction: Prediction) -> None:
        self.run = run
        self.prediction = prediction
        self.differences: list[Difference] = []
        self.compared = 0

    def compare(self) -> None:
        exits = len(self.prediction.exits)
        ended_by_deadline = self._deadline()
        if ended_by_deadline is not None:
            exits = ended_by_deadline
        self._exits(exits)
        if ended_by_deadline is None:
            self._outcomes()
            self._end()
            self._memory()

    def _deadline(self) -> int | None:
        """The number of the exit at which the timer that the case set expired, where it was not predicted."""
        if not self.prediction.deadline:
            return None
        for number, exit_ in enumerate(self.run.exits):
            predicted = self.prediction.exits[number : number + 1]
            if exit_.reason == ExitReason.PREEMPTION_TIMER and not (
                predicted and predicted[0].reason == ExitReason.PREEMPTION_TIMER
            ):
                return number
        return None

    # --- exits -------------------------------------------------------------------------------------------

    def _exits(self, count: int) -> None:
        seen = self.run.exits
        for predicted, exit_ in zip(self.prediction.exits[:count], seen, strict=False):
            for difference in self._exit(predicted, exit_):
                self.differences.append(difference)
        if count == len(self.prediction.exits):
            self._number_of_exits()

    def _number_of_exits(self) -> None:
        predicted, seen = len(self.prediction.exits), len(self.run.exits)
        if not self.prediction.complete:
            if seen < predicted:
                self._too_few(f"at least {predicted}")
            return
        self.compared += 1
        if seen < predicted:
            self._too_few(str(predicted))
        elif seen > predicted:
            what = f", the first too many {self.run.exits[predicted].reason_name}"
            self._differ("exits", str(predicted), f"{seen}{what}")

    def _too_few(self, predicted: str) -> None:
        seen = len(self.run.exits)
        missing = self.prediction.exits[seen]
        self.differences.append(
            Difference(
                "exits",
                predicted,
                str(seen),
                missing.rules,
                "full_reason",
                missing.reason,
                missing.full_reason,
                number=seen,
            )
        )

    def _exit(self, predicted: PredictedExit, seen: Exit) -> Iterator[Difference]:
        where = f"exit {predicted.number}"
        for attribute in EXIT_ATTRIBUTES:
            said: Value = getattr(predicted, attribute)
            yield from self._value(
                predicted, f"{where}: {attribute}", attribute, said, getattr(seen, attribute)
            )
        for name, said in predicted.registers.items():
            yield from self._value(predicted, f"{where}: {name}", name, said, seen.registers.get(name, 0))
        for field, said in predicted.watched.items():
            shown = seen.watched.get(field)
            if shown is None:
                self.compared += 1
                yield Difference(f"{where}: {field.name}", describe(said), "no value")
                continue
            yield from self._value(predicted, f"{where}: {field.name}", field.name, said, shown)

    def _value(
        self, predicted: PredictedExit, where: str, attribute: str, said: Value, seen: int
    ) -> Iterable[Difference]:
        if not is_said(said):
            return
        self.compared += 1
        if agrees(said, seen):
            return
        rules = predicted.rules_of(attribute)
        yield Difference(
            where,
            _words(attribute, said),
            _words(attribute, seen),
            rules,
            attribute,
            predicted.reason,
            said,
            seen,
            predicted.number,
        )

    # --- outcomes ----------------------------------------------------------------------------------------

    def _outcomes(self) -> None:
        predicted, seen = self.prediction.outcomes, self.run.outcomes
        for number, (said, outcome) in enumerate(zip(predicted, seen, strict=False)):
            self._outcome(number, said, outcome)
        if len(seen) < len(predicted) or (self.prediction.complete and len(seen) != len(predicted)):
            at_least = "" if self.prediction.complete else "at least "
            self._differ("outcomes", f"{at_least}{len(predicted)}", str(len(seen)))
        self.compared += self.prediction.complete

    def _outcome(self, number: int, said: PredictedOutcome, seen: Outcome) -> None:
        where = f"outcome {number} ({said.operation})"
        have = {"kind": seen.kind.value}
        for name in ("operation", "kind", "error", "vector", "error_code", "field", "msr", "count"):
            want, got = getattr(said, name), have.get(name, getattr(seen, name))
            self.compared += 1
            if want != got:
                self._differ(f"{where}: {name}", _number(want), _number(got), said.rules, said.operation)
        if said.value is None:
            if seen.value is not None:
                self._differ(f"{where}: value", "none", _number(seen.value), said.rules)
        elif is_said(said.value):
            self.compared += 1
            if seen.value is None or not agrees(said.value, seen.value):
                self._differ(f"{where}: value", describe(said.value), _number(seen.value), said.rules)

    # --- the rest ----------------------------------------------------------------------------------------

    def _end(self) -> None:
        end = self.run.end.value if self.run.end is not None else None
        if self.prediction.complete and self.prediction.end is not None:
            self.compared += 1
            if end != self.prediction.end:
                self._differ("end", self.prediction.end, str(end))

    def _memory(self) -> None:
        wrong: set[int] = set()
        for address, content in self.prediction.memory.items():
            seen = self.run.memory.get(address)
            for offset, byte in enumerate(content):
                if byte is None:
                    continue
                self.compared += 1
                have = None if seen is None or offset >= len(seen) else seen[offset]
                word = (address + offset) & -8
                if have != byte and word not in wrong:
                    wrong.add(word)  # one line for each says enough
                    self._byte_differs(address + offset, byte, have)

    def _byte_differs(self, address: int, said: int, have: int | None) -> None:
        rule = self.prediction.memory_rules.get(address & -8)
        self.differences.append(
            Difference(
                f"memory at {address:#x}",
                f"{said:#04x}",
                "nothing" if have is None else f"{have:#04x}",
                () if rule is None else (rule,),
                "memory",
                said=said << 8 * (address % 8),
                have=None if have is None else have << 8 * (address % 8),
            )
        )

    def _differ(
        self, where: str, predicted: str, seen: str, rules: tuple[Rule, ...] = (), outcome: str = ""
    ) -> None:
        self.differences.append(Difference(where, predicted, seen, rules, outcome=outcome))


def _words(attribute: str, value: Value) -> str:
    if attribute == "full_reason" and isinstance(value, int):
        reason = basic_reason(value)
        name = reason.name if isinstance(reason, ExitReason) else f"reason {reason:#x}"
        return f"{name} ({value:#x})"
    return describe(value)


def _number(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:#x}" if isinstance(value, int) else str(value)
