"""Asking a processor about many VM entries: what VMLAUNCH does with each of many VMCSs.

A case asks about a batch of them: for each the VMCS is cleared, written whole, changed, and launched. Where a
batch goes wrong (a machine dies, an answer is missing) its halves are asked, down to the one that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vmxlab.cases.case import Case, Limits
from vmxlab.cases.steps import Enter, Step, Vmclear, Vmptrld, Vmwrite, Vmxon, WriteVmcs
from vmxlab.console.records import Record
from vmxlab.console.run import End, Run, Verdict
from vmxlab.oracle.entry import EntryOutcome, EntryVerdict
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError

if TYPE_CHECKING:
    from vmxlab.console.run import Outcome
    from vmxlab.image.compiler import CompiledCase


class Asked(Protocol):
    """A lab, or what a test gets."""

    def run_all(self, cases: Sequence[Case], /) -> list[Run]:
        """Run every case; each has its verdict in its own run."""


BATCH = 24
"""VMCSs in a case."""

L2_TSC = 200_000
"""TSC ticks for an L2 that none of its own instructions ends."""


@dataclass(frozen=True, slots=True)
class SeenEntry:
    """What a VM entry did.

    `outcome` is None where it did nothing that a VM entry can do; then `problem` says what happened.
    `qualification` is that of a failed entry.
    """

    outcome: EntryOutcome | None
    qualification: int | None = None
    problem: str = ""
    died: bool = False

    def agrees_with(self, verdict: EntryVerdict) -> bool:
        """Whether this is one of the things that the rules let the processor do."""
        if self.outcome not in verdict.outcomes:
            return False
        if self.outcome is EntryOutcome.INVALID_GUEST_STATE:
            return self.qualification in verdict.qualifications
        if self.outcome is EntryOutcome.MSR_LOADING_FAILS:
            return self.qualification in verdict.msr_qualifications
        return True

    def __str__(self) -> str:
        if self.outcome is None:
            return self.problem
        text = self.outcome.value
        return text if self.qualification is None else f"{text} with qualification {self.qualification}"


_ERRORS = {
    InstructionError.ENTRY_INVALID_CONTROL_FIELDS: EntryOutcome.INVALID_CONTROLS,
    InstructionError.ENTRY_INVALID_HOST_STATE: EntryOutcome.INVALID_HOST_STATE,
}
_REASONS = {
    int(ExitReason.ENTRY_FAILURE_GUEST_STATE): EntryOutcome.INVALID_GUEST_STATE,
    int(ExitReason.ENTRY_FAILURE_MSR_LOADING): EntryOutcome.MSR_LOADING_FAILS,
}


def seen_entry(run: Run) -> SeenEntry:
    """What the VM entry of a run did, the first one where there are several."""
    answers = list(_answers(run))
    if answers:
        return answers[0]
    if run.error is not None:
        return SeenEntry(None, problem=str(run.error), died=run.verdict is Verdict.CRASH)
    failed = [str(outcome) for outcome in run.outcomes if not outcome.ok]
    return SeenEntry(None, problem=f"no VM entry was tried: {'; '.join(failed) or 'the case has none'}")


def ask_entries(
    lab: Asked,
    base: Case,
    changes: Sequence[Mapping[Field, int]],
    *,
    batch: int = BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[SeenEntry]:
    """What VMLAUNCH does with the VMCS of `base` after each of `changes`, one by one.

    All of them find the memory that `base` has. `progress` is told how many were answered.
    """
    seen: list[SeenEntry] = []
    for start in range(0, len(changes), batch):
        part = changes[start : start + batch]
        seen += _ask(lab, base, part)
        if progress is not None:
            progress(len(part))
    return seen


def ask_cases(lab: Asked, compiled: Sequence[CompiledCase]) -> list[SeenEntry]:
    """What VMLAUNCH does in each of these cases. Those whose memory is the same are asked about together."""
    groups: dict[object, list[int]] = {}
    for index, one in enumerate(compiled):
        case = one.case
        groups.setdefault((one.contents, case.enable, case.disable, case.needs), []).append(index)
    seen: dict[int, SeenEntry] = {}
    for indices in groups.values():
        base = compiled[indices[0]]
        changes = [_changed(base.fields, compiled[index].fields) for index in indices]
        seen |= dict(zip(indices, ask_entries(lab, base.case, changes), strict=True))
    return [seen[index] for index in range(len(compiled))]


def _changed(base: Mapping[Field, int], fields: Mapping[Field, int]) -> dict[Field, int]:
    return {field: value for field, value in fields.items() if base.get(field) != value}


def _ask(lab: Asked, base: Case, changes: Sequence[Mapping[Field, int]]) -> list[SeenEntry]:
    (run,) = lab.run_all([batch_case(base, changes)])
    answers = list(_answers(run))
    complete = run.error is None and run.end in (End.DONE, End.STOP, End.VMFAIL)
    if complete and len(answers) == len(changes):
        return answers
    if len(changes) == 1:
        return [seen_entry(run)]
    half = len(changes) // 2
    return _ask(lab, base, changes[:half]) + _ask(lab, base, changes[half:])


def batch_case(base: Case, changes: Iterable[Mapping[Field, int]]) -> Case:
    """The case that asks about each of the changed VMCSs."""
    steps: list[Step] = [Vmxon()]
    for changed in changes:
        steps += [Vmclear(), Vmptrld(), WriteVmcs()]
        steps += [Vmwrite(field, value) for field, value in changed.items()]
        steps.append(Enter(report_vmcs=False, go_on=True))
    return replace(base, steps=steps, limits=Limits(l2_tsc=L2_TSC))


def _answers(run: Run) -> Iterable[SeenEntry]:
    """One for each VM entry: a failed instruction, or the exit that names the instruction before it."""
    failed = iter([o for o in run.outcomes if o.operation == "vmlaunch" and not o.ok])
    for record in run.records:
        if record.kind == "exit" and "by" in record.values:
            yield _of_exit(record)
        elif record.kind == "vmx" and record.values.get("op") == "vmlaunch":
            yield _of_failure(next(failed))


def _of_exit(record: Record) -> SeenEntry:
    reason = record.number("reason")
    if not reason & ENTRY_FAILURE_BIT:
        return SeenEntry(EntryOutcome.ENTERS)
    qualification = record.number("qual") if "qual" in record.values else 0
    outcome = _REASONS.get(reason & 0xFFFF)
    problem = "" if outcome else f"VM-entry failure with exit reason {reason:#x}"
    return SeenEntry(outcome, qualification, problem)


def _of_failure(outcome: Outcome) -> SeenEntry:
    known = _ERRORS.get(outcome.error) if isinstance(outcome.error, InstructionError) else None
    return SeenEntry(known, problem="" if known else str(outcome))
