"""What must happen in a case: the oracle's counterpart of `vmxlab.console.run`.

Names are those of `Run`, `Exit` and `Outcome`; values may be unknown, undefined, or known in some bits only
(`vmxlab.oracle.values`). What is not predicted is not there: after `unknown` anything may follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmxlab.oracle.values import Bits, Rule, Undefined, Unknown, Value
from vmxlab.sdm.exit_reasons import ExitReason, basic_reason
from vmxlab.sdm.fields import Field

INVALID_INTERRUPTION = Bits(0, 1 << 31)
"""SDM Vol. 3C, 28.2.2 and 28.2.4: bit 31 is cleared, the remainder of the field is undefined."""


@dataclass(frozen=True, slots=True)
class PredictedOutcome:
    """The outcome of one instruction of L1. `kind` is the value of a `console.run.OutcomeKind`.

    None in an attribute is what `Outcome` has there where it does not apply.
    """

    operation: str
    kind: str
    error: int | None = None
    vector: int | None = None
    error_code: int | None = None
    field: int | None = None
    msr: int | None = None
    value: Value | None = None
    count: int | None = None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class PredictedExit:
    """One VM exit, with the rules that made it; `field_rules` are those of one attribute alone."""

    number: int
    full_reason: Value
    raw_qualification: Value = 0
    instruction_length: Value = Undefined.UNDEFINED
    raw_instruction_information: Value = Undefined.UNDEFINED
    guest_linear_address: Value = Undefined.UNDEFINED
    guest_physical_address: Value = Undefined.UNDEFINED
    raw_interruption_information: Value = INVALID_INTERRUPTION
    interruption_error_code: Value = Undefined.UNDEFINED
    raw_idt_vectoring_information: Value = INVALID_INTERRUPTION
    idt_vectoring_error_code: Value = Undefined.UNDEFINED
    rip: Value = Undefined.UNDEFINED
    rflags: Value = Undefined.UNDEFINED
    registers: Mapping[str, Value] = field(default_factory=dict)
    watched: Mapping[Field, Value] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    field_rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)

    @property
    def reason(self) -> ExitReason | int | None:
        """The basic exit reason, where it is known."""
        return basic_reason(self.full_reason) if isinstance(self.full_reason, int) else None

    def rules_of(self, attribute: str) -> tuple[Rule, ...]:
        """The rules that an attribute's value rests on."""
        return self.field_rules.get(attribute, self.rules)


EXIT_ATTRIBUTES = (
    "full_reason",
    "raw_qualification",
    "instruction_length",
    "raw_instruction_information",
    "guest_linear_address",
    "guest_physical_address",
    "raw_interruption_information",
    "interruption_error_code",
    "raw_idt_vectoring_information",
    "idt_vectoring_error_code",
    "rip",
    "rflags",
)
"""The attributes of an exit that are single values."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What must happen, as far as the oracle knows.

    `outcomes`, `exits`  in order; complete where `unknown` is None
    `end`        why the case ends: the value of a `console.run.End`; None where it is not known
    `memory`     what is reported of the machine's memory: by address, each byte or None where it is unknown
    `memory_rules`
                 by the address of 8 bytes of memory: why the processor itself wrote there
    `unknown`    why the prediction ends early; None where it is whole
    `notes`      what is unknown on the way, and does not end the prediction
    `entries`    VM entries that take place or fail late
    `deadline`   whether the case sets the VMX-preemption timer itself: it may expire at any time (26.5.1)
    """

    outcomes: tuple[PredictedOutcome, ...] = ()
    exits: tuple[PredictedExit, ...] = ()
    end: str | None = None
    memory: Mapping[int, tuple[int | None, ...]] = field(default_factory=dict)
    unknown: Unknown | None = None
    notes: tuple[Unknown, ...] = ()
    entries: int = 0
    deadline: bool = False
    memory_rules: Mapping[int, Rule] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the whole case is predicted."""
        return self.unknown is None
