"""Predictions without a machine: a processor on paper, and a run made up of what was predicted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmxlab import Case
from vmxlab.console.run import End, Exit, Outcome, OutcomeKind, Run
from vmxlab.image.compiler import CompiledCase, Target, compile_case
from vmxlab.image.monitor import Monitor
from vmxlab.oracle.predict import predict
from vmxlab.oracle.prediction import EXIT_ATTRIBUTES, Prediction
from vmxlab.oracle.values import Bits, Value

_MONITOR = Monitor(
    elf=b"",
    code=b"",
    reset_stub=b"",
    entry=0x10_0020,
    exit_entry=0x10_1110,
    exit_stack_top=0x10_2220,
    page_table_root=0x10_3000,
    gdt=0x10_4440,
    gdt_bytes=0x28,
    idt=0x10_5550,
    idt_bytes=0x1000,
    tss=0x10_6660,
)


@pytest.fixture
def compile_for(processors) -> Callable[..., CompiledCase]:
    """compile_for(case, processor="skylake") -> CompiledCase."""

    def make(case: Case, processor: str = "skylake") -> CompiledCase:
        return compile_case(case, Target(processors[processor], _MONITOR, 1_000_000, 40))

    return make


@pytest.fixture
def predicted(compile_for) -> Callable[..., Prediction]:
    """predicted(program, processor="skylake", **case) -> Prediction."""

    def make(program: str | bytes = "hlt", *, processor: str = "skylake", **case: object) -> Prediction:
        return predict(compile_for(Case(program=program, **case), processor))

    return make


@pytest.fixture
def run_as_predicted(compile_for) -> Callable[[Case], tuple[Run, Prediction]]:
    """A run that does what is predicted: bits that are not said are 1 where that is possible."""

    def make(case: Case) -> tuple[Run, Prediction]:
        compiled = compile_for(case)
        prediction = predict(compiled)
        exits = tuple(
            Exit(
                number=exit_.number,
                **{name: _some(getattr(exit_, name)) for name in EXIT_ATTRIBUTES},
                registers={name: _some(value) for name, value in exit_.registers.items()},
                watched={field: _some(value) for field, value in exit_.watched.items()},
            )
            for exit_ in prediction.exits
        )
        outcomes = tuple(
            Outcome(
                one.operation,
                OutcomeKind(one.kind),
                error=one.error,
                vector=one.vector,
                error_code=one.error_code,
                field=one.field,
                msr=one.msr,
                value=None if one.value is None else _some(one.value),
                count=one.count,
            )
            for one in prediction.outcomes
        )
        memory = {
            address: bytes(0xA5 if byte is None else byte for byte in content)
            for address, content in prediction.memory.items()
        }
        end = None if prediction.end is None else End(prediction.end)
        return Run(case, 0, outcomes, exits, memory, end=end, compiled=compiled), prediction

    return make


def _some(value: Value) -> int:
    """A value that a prediction allows."""
    match value:
        case Bits():
            return value.value | ~value.known & 0xFFFF_FFFF
        case int():
            return value
        case _:
            return 0x1234_5678
