"""Two logs, case by case and field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from vmxlab.console.run import Exit, Outcome, Run, Verdict
from vmxlab.image import layout
from vmxlab.oracle.prediction import EXIT_ATTRIBUTES
from vmxlab.reports.log_diff import may_differ
from vmxlab.reports.log_diff.may_differ import MayDiffer
from vmxlab.reports.runs import END_WORDS, field_name, msr_name
from vmxlab.reports.story import Storyteller, Told
from vmxlab.sdm.exit_reasons import ExitReason, describe_reason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS

NOTHING = "-"

_WORD_BYTES = 8
_CLOCK_EXITS = frozenset(
    {
        ExitReason.RDTSC,
        ExitReason.RDTSCP,
        ExitReason.RDPMC,
        ExitReason.RDRAND,
        ExitReason.RDSEED,
        ExitReason.IO_INSTRUCTION,
    }
)


@dataclass(frozen=True, slots=True)
class LogDifference:
    """One thing that is not the same. `left_out`: why it may differ, where it may.

    `where`: "exit 3 EPT_VIOLATION", "outcome 2", "end", "memory"; `what`: the field. `one` and `other` are in
    words.
    """

    where: str
    what: str
    one: str
    other: str
    left_out: MayDiffer | None = None


@dataclass(frozen=True, slots=True)
class ComparedCase:
    """A case that both logs have."""

    one: Told
    other: Told
    everything: tuple[LogDifference, ...]

    @property
    def differences(self) -> tuple[LogDifference, ...]:
        """What may not differ, and does."""
        return tuple(difference for difference in self.everything if difference.left_out is None)

    @property
    def left_out(self) -> tuple[LogDifference, ...]:
        """What differs, and may."""
        return tuple(difference for difference in self.everything if difference.left_out is not None)


@dataclass(frozen=True, slots=True)
class LogDiff:
    """What two logs have in common, and what not."""

    cases: tuple[ComparedCase, ...]
    only_one: tuple[Told, ...]
    only_other: tuple[Told, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs that may not."""
        return not (self.only_one or self.only_other or any(case.differences for case in self.cases))


def compare_logs(one: Storyteller, other: Storyteller) -> LogDiff:
    """Compare two logs that were read to their end, with `keep`."""
    pairs, only_one, only_other = _pairs(one.told, other.told)
    same_monitor = _build(one) == _build(other)
    same_processor = one.capabilities == other.capabilities
    cases = []
    for mine, theirs in pairs:
        comparer = _Comparer(mine, theirs, same_monitor, same_processor)
        cases.append(ComparedCase(mine, theirs, tuple(comparer.differences())))
    return LogDiff(tuple(cases), tuple(only_one), tuple(only_other))


def _build(log: Storyteller) -> str | None:
    return log.boot.values.get("build") if log.boot is not None else None


# --- which case is which ------------------------------------------------------------------------------------


def _pairs(
    one: Sequence[Told], other: Sequence[Told]
) -> tuple[list[tuple[Told, Told]], list[Told], list[Told]]:
    """Cases by name, the first of a name with the first; those without a name by number, else by position."""
    first, rest_one, rest_other = _matched(one, other, _by_name_or_number)
    second, only_one, only_other = _matched(rest_one, rest_other, _by_position)
    pairs = sorted([*first, *second], key=lambda pair: pair[0].line)
    return pairs, only_one, only_other


def _matched(
    one: Sequence[Told], other: Sequence[Told], key: Callable[[Told], object]
) -> tuple[list[tuple[Told, Told]], list[Told], list[Told]]:
    waiting: dict[object, list[Told]] = {}
    for told in other:
        waiting.setdefault(key(told), []).append(told)
    pairs, alone = [], []
    for told in one:
        candidates = waiting.get(key(told))
        if candidates:
            pairs.append((told, candidates.pop(0)))
        else:
            alone.append(told)
    rest = [told for told in other if any(told is left for lefts in waiting.values() for left in lefts)]
    return pairs, alone, rest


def _by_name_or_number(told: Told) -> object:
    return told.is_live, told.run.name or told.run.number


def _by_position(told: Told) -> object:
    """The n-th case without a name is the n-th one there; a name is a name."""
    return told.is_live, told.run.name


# --- one case -----------------------------------------------------------------------------------------------


class _Comparer:
    def __init__(self, one: Told, other: Told, same_monitor: bool, same_processor: bool) -> None:
        self.one, self.other = one.run, other.run
        self.same_monitor, self.same_processor = same_monitor, same_processor
        self.code = one.code or other.code
        self.rules = (one.broken_rules, other.broken_rules)
        asked = {e.rip for run in (self.one, self.other) for e in run.exits if e.reason in _CLOCK_EXITS}
        base = self.code.cs_base if self.code is not None else 0
        clocks = [clock for clock in may_differ.clocks_of(self.code) if clock.address - base not in asked]
        self.reader = may_differ.ClockReader(tuple(clocks), base)

    def differences(self) -> Iterator[LogDifference]:
        yield from self._outcomes()
        yield from self._exits()
        yield from self._vmcs()
        yield from self._memory()
        yield from self._faults()
        yield from _differ("end", "why", _end(self.one), _end(self.other))

    # --- outcomes -----------------------------------------------------------------------------------------

    def _outcomes(self) -> Iterator[LogDifference]:
        for number, (mine, theirs) in enumerate(zip_longest(self.one.outcomes, self.other.outcomes)):
            where = f"outcome {number}"
            if mine is None or theirs is None or mine.operation != theirs.operation:
                yield LogDifference(where, "instruction", _outcome(mine), _outcome(theirs))
                return  # from here on they are outcomes of different instructions
            where += f" {mine.operation.upper()}"
            if (mine.kind, mine.error, mine.vector, mine.error_code) != (
                theirs.kind,
                theirs.error,
                theirs.vector,
                theirs.error_code,
            ):
                yield LogDifference(where, "outcome", str(mine), str(theirs))
            yield from _differ(where, "field", mine.field, theirs.field)
            yield from _differ(where, "MSR", mine.msr, theirs.msr)
            yield from _differ(where, "register", mine.register, theirs.register)
            read = may_differ.of_value_read(mine)
            yield from _differ(where, "value", mine.value, theirs.value, read)
            count = None if self.same_processor else may_differ.COUNT
            yield from _differ(where, "fields written", mine.count, theirs.count, count)

    # --- exits --------------------------------------------------------------------------------------------

    def _exits(self) -> Iterator[LogDifference]:
        apart = False
        for mine, theirs in zip(self.one.exits, self.other.exits, strict=False):
            where = f"exit {mine.number} {mine.reason_name}"
            if mine.full_reason != theirs.full_reason:
                where = f"exit {mine.number}"
                yield LogDifference(where, "reason", _reason(mine), _reason(theirs))
            apart |= mine.reason != theirs.reason
            if not apart:  # behind a reason that differs, fields are those of different exits
                yield from self._exit(where, mine, theirs)
        first, second = (str(len(run.exits)) for run in (self.one, self.other))
        yield from _differ("exits", "number", first, second)

    def _exit(self, where: str, one: Exit, other: Exit) -> Iterator[LogDifference]:
        self.reader.follow(one, other)
        for attribute in EXIT_ATTRIBUTES[1:]:
            mine, theirs = getattr(one, attribute), getattr(other, attribute)
            if mine != theirs:
                why = may_differ.of_exit(attribute, one, other)
                name = attribute.removeprefix("raw_").replace("_", " ")
                words = (_value(attribute, one), _value(attribute, other))
                yield LogDifference(where, name, *words, why)
        for name in GENERAL_REGISTERS:
            mine, theirs = one.registers.get(name), other.registers.get(name)
            if mine != theirs:
                why = may_differ.of_exit(name, one, other) or self.reader.holding.get(name)
                yield from _differ(where, name, mine, theirs, why)
        for field in dict.fromkeys((*one.watched, *other.watched)):
            mine, theirs = one.watched.get(field), other.watched.get(field)
            if mine != theirs:
                why = may_differ.of_exit(field, one, other) or self._address(field)
                yield from _differ(where, field_name(field), mine, theirs, why)

    def _address(self, field: Field | int) -> MayDiffer | None:
        return None if self.same_monitor else may_differ.of_address(field)

    # --- the rest -----------------------------------------------------------------------------------------

    def _vmcs(self) -> Iterator[LogDifference]:
        mine, theirs = self.one.failed_vmcs, self.other.failed_vmcs
        yield from _differ(
            "failed VM entry", "broken rules", ", ".join(self.rules[0]), ", ".join(self.rules[1])
        )
        if not mine or not theirs:
            return  # that one failed and the other did not is an outcome, or an exit
        for field in dict.fromkeys((*mine, *theirs)):
            lacking = None in (mine.get(field), theirs.get(field)) and not self.same_processor
            why = may_differ.COUNT if lacking else may_differ.of_timer(field) or self._address(field)
            yield from _differ("failed VM entry", field_name(field), mine.get(field), theirs.get(field), why)

    def _memory(self) -> Iterator[LogDifference]:
        mine, theirs = self.one.memory, self.other.memory
        for address in dict.fromkeys((*mine, *theirs)):
            one, other = mine.get(address), theirs.get(address)
            where = f"memory at {address:#x}"
            if one is None or other is None or len(one) != len(other):
                yield LogDifference(where, "length", _length(one), _length(other))
                continue
            for offset in range(0, len(one), _WORD_BYTES):
                first, second = (m[offset : offset + _WORD_BYTES].hex(" ") for m in (one, other))
                yield from _differ(
                    where, f"at +{offset:#x}", first, second, _stored(address + offset, one, offset)
                )

    def _faults(self) -> Iterator[LogDifference]:
        for number, (mine, theirs) in enumerate(zip_longest(self.one.faults, self.other.faults)):
            moved = mine is not None and theirs is not None and not self.same_monitor
            same = moved and (mine.vector, mine.error_code) == (theirs.vector, theirs.error_code)
            why = may_differ.MONITOR if same else None
            yield from _differ(f"fault {number}", "in L1", _shown(mine), _shown(theirs), why)


def _differ(
    where: str, what: str, one: object, other: object, why: MayDiffer | None = None
) -> Iterator[LogDifference]:
    if one != other:
        yield LogDifference(where, what, _shown(one), _shown(other), why)


def _shown(value: object) -> str:
    if value is None or value == "":
        return NOTHING
    name = getattr(value, "name", None)
    if name:
        return str(name)
    return f"{value:#x}" if isinstance(value, int) else str(value)


def _reason(exit: Exit) -> str:
    return f"{describe_reason(exit.full_reason)} at {exit.rip:#x}"


def _value(attribute: str, exit: Exit) -> str:
    number: int = getattr(exit, attribute)
    text = ""
    if attribute == "raw_qualification":
        text = exit.qualification.describe()
    elif attribute == "raw_interruption_information":
        text = exit.interruption.describe()
    elif attribute == "raw_idt_vectoring_information":
        text = exit.idt_vectoring.describe()
    return f"{number:#x}" + (f" ({text})" if text not in ("", NOTHING, f"{number:#x}") else "")


def _length(memory: bytes | None) -> str:
    return "not reported" if memory is None else f"{len(memory)} bytes"


def _stored(address: int, memory: bytes, offset: int) -> MayDiffer | None:
    """Why a word in the area that VM exits store MSRs to may differ: an entry's second word is the value."""
    area = layout.EXIT_MSR_STORE_AREA
    if not area <= address < area + layout.MSR_AREA_BYTES or address % 16 != 8 or offset < 8:
        return None
    return may_differ.of_msr(int.from_bytes(memory[offset - 8 : offset - 4], "little"))


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return NOTHING
    about = f" of {msr_name(outcome.msr)}" if outcome.msr is not None else ""
    return f"{outcome}{about}"


def _end(run: Run) -> str:
    if run.end is not None:
        return END_WORDS[run.end]
    return "its end is missing" if run.verdict is Verdict.ERROR else "none: the log ends in it"
