"""What tests of single VMX instructions say: sequences of steps, and the outcome of the last one."""

from __future__ import annotations

from vmxlab import Case, InstructionError, Outcome, OutcomeKind, Run
from vmxlab.cases.steps import Step, Vmclear, Vmptrld, Vmxon
from vmxlab.sdm.registers import Vector

WITH_VMCS = (Vmxon(), Vmclear(), Vmptrld())


def succeeds(outcome: Outcome) -> bool:
    return outcome.kind is OutcomeKind.SUCCEED


def fails_invalid(outcome: Outcome) -> bool:
    return outcome.kind is OutcomeKind.FAIL_INVALID


def fails_valid(outcome: Outcome, error: InstructionError) -> bool:
    return outcome.kind is OutcomeKind.FAIL_VALID and outcome.error == error


def faults(outcome: Outcome, vector: Vector) -> bool:
    """A fault without an error code, or with error code 0."""
    return outcome.kind is OutcomeKind.FAULT and outcome.vector == vector and not outcome.error_code


def steps(vmxlab, *sequence: Step, **case) -> Run:
    return vmxlab.run(Case(steps=sequence, **case))


def last(vmxlab, *sequence: Step, **case) -> Outcome:
    """The outcome of the last step; all before it must succeed."""
    run = steps(vmxlab, *sequence, **case)
    failed = [str(outcome) for outcome in run.outcomes[:-1] if not outcome.ok]
    assert not failed, failed
    return run.outcomes[-1]
