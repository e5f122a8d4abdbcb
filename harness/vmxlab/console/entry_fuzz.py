"""Generated VMCSs, asked of the rules and of a processor; where they disagree, known or new."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from vmxlab.cases.case import Case
from vmxlab.console.entries import SeenEntry, ask_entries
from vmxlab.console.entry_differences import explain, known_keys
from vmxlab.image.compiler import CompiledCase, compile_case
from vmxlab.oracle.entry import RULES, EntryRule, EntryVerdict, Environment, check_entry
from vmxlab.oracle.entry.generate import HLT, GeneratedVmcs, Generator, base_cases, can_be_asked
from vmxlab.oracle.entry.of_case import environment_of
from vmxlab.sdm.fields import Field

if TYPE_CHECKING:
    from vmxlab.console.lab import Lab
    from vmxlab.console.lab_by_need import LabByNeed

CHUNK = 240
"""VMCSs that are generated before the processor is asked: those of one base go together."""


@dataclass(frozen=True, slots=True)
class EntryDisagreement:
    """A VMCS with which the processor did what neither the rules allow nor a known difference explains."""

    number: int
    """In the order of generation, from 0."""
    case: Case
    changes: Mapping[Field, int]
    verdict: EntryVerdict
    seen: SeenEntry

    def __str__(self) -> str:
        changed = ", ".join(f"{name.name} = {value:#x}" for name, value in self.changes.items())
        broken = "; ".join(map(str, self.verdict.broken)) or "none"
        allowed = ", ".join(sorted(outcome.value for outcome in self.verdict.outcomes))
        lines = [f"VMCS {self.number}: {changed}", f"  broken rules: {broken}", f"  so: {allowed}"]
        lines += [f"  {item}" for item in self.verdict.unchecked]
        return "\n".join([*lines, f"  seen: {self.seen}"])

    def source(self) -> str:
        """The test to paste."""
        from vmxlab.cases.source import case_source

        return case_source(self.case, name=f"test_vm_entry_{self.number}")


@dataclass
class EntryFuzz:
    """What came of it. `explained` counts by keys of known differences, `undecided` by what was missing."""

    seed: int
    asked: int = 0
    agreed: int = 0
    not_asked: int = 0
    """Generated, but the monitor could not have come back."""
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    undecided: Counter[str] = field(default_factory=Counter)
    undecided_entries: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    """By rule: VMCSs that broke it."""
    disagreements: list[EntryDisagreement] = field(default_factory=list)


def fuzz_entries(
    lab: Lab | LabByNeed,
    count: int,
    seed: int,
    *,
    rules: Sequence[EntryRule] = RULES,
    progress: Callable[[int], None] | None = None,
) -> EntryFuzz:
    """Ask about `count` VMCSs. Raises MissingCapability where the processor has no VMX.

    `rules`: others than the SDM's, to see that they are told apart.
    """
    target = lab.target
    bases = [compile_case(case, target, program=HLT) for case in base_cases(target.capabilities)]
    environments = [environment_of(base) for base in bases]
    keys = known_keys(lab.info.name, lab.info.version)
    result = EntryFuzz(seed)
    start = time.monotonic()
    questions = _questions(seed, bases, environments, result, rules)
    number = 0
    while number < count:
        chunk = list(islice(questions, min(CHUNK, count - number)))
        for index, base in enumerate(bases):
            part = [(number + i, q, v) for i, (q, v) in enumerate(chunk) if q.base == index]
            answers = ask_entries(lab, base.case, [q.changes for _, q, _ in part], progress=progress)
            for (at, question, verdict), seen in zip(part, answers, strict=True):
                _judge(result, at, base, environments[index], question, verdict, seen, keys, rules)
        number += len(chunk)
    result.disagreements.sort(key=lambda item: item.number)
    result.seconds = time.monotonic() - start
    return result


def _questions(
    seed: int,
    bases: Sequence[CompiledCase],
    environments: Sequence[Environment],
    result: EntryFuzz,
    rules: Sequence[EntryRule],
) -> Iterator[tuple[GeneratedVmcs, EntryVerdict]]:
    for generated in Generator(seed, bases):
        base = bases[generated.base]
        fields = {**base.fields, **generated.changes}
        verdict = check_entry(fields, environments[generated.base], rules)
        if can_be_asked(verdict, fields, base.fields):
            yield generated, verdict
        else:
            result.not_asked += 1


def _judge(
    result: EntryFuzz,
    number: int,
    base: CompiledCase,
    environment: Environment,
    question: GeneratedVmcs,
    verdict: EntryVerdict,
    seen: SeenEntry,
    keys: Sequence[str],
    rules: Sequence[EntryRule],
) -> None:
    result.asked += 1
    result.outcomes[seen.outcome.value if seen.outcome else seen.problem] += 1
    result.broken.update(verdict.names)
    if seen.agrees_with(verdict):
        # An answer that is one of several, because a rule could not be asked, proves little.
        if len(verdict.outcomes) > 1 and verdict.unchecked:
            result.undecided_entries += 1
            result.undecided.update({item.why for item in verdict.unchecked})
        else:
            result.agreed += 1
        return
    fields = {**base.fields, **question.changes}
    known = explain(fields, environment, verdict, seen, keys, rules)
    if known:
        result.explained[" and ".join(known)] += 1
        return
    case = replace(base.case, fields={**base.case.fields, **question.changes})
    result.disagreements.append(EntryDisagreement(number, case, question.changes, verdict, seen))
