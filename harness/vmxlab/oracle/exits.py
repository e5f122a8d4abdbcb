"""A VM exit on its way: what caused it, and what it records (SDM Vol. 3C, 28.2 and 28.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmxlab.oracle.prediction import INVALID_INTERRUPTION
from vmxlab.oracle.values import UNDEFINED, Rule, Undefined, Value
from vmxlab.sdm.exit_reasons import ExitReason

SAVED_RF = Rule("value saved for RFLAGS.RF", "Vol. 3C, 28.3.3")
INFORMATION = Rule("VM-exit information", "Vol. 3C, 28.2")


@dataclass
class VmExit(Exception):
    """An exit: raised by the rule that says so.

    `rf`: the value saved for RFLAGS.RF; None keeps what it was; UNDEFINED: the SDM does not say clearly.
    `rip`: where it is not that of the current
    instruction.
    """

    reason: ExitReason
    rules: tuple[Rule, ...]
    qualification: Value = 0
    length: Value = UNDEFINED
    information: Value = UNDEFINED
    linear: Value = UNDEFINED
    physical: Value = UNDEFINED
    interruption: Value = INVALID_INTERRUPTION
    error_code: Value = UNDEFINED
    idt_vectoring: Value = INVALID_INTERRUPTION
    idt_vectoring_error_code: Value = UNDEFINED
    rf: bool | Undefined | None = None
    rip: int | None = None
    field_rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """So that it can be shown."""
        super().__init__(self.reason)


def instruction_exit(
    reason: ExitReason,
    length: int,
    *rules: Rule,
    qualification: Value = 0,
    information: Value = UNDEFINED,
    linear: Value = UNDEFINED,
) -> VmExit:
    """An exit by an instruction that always exits, or by a control: fault-like, length recorded, RF 0."""
    return VmExit(
        reason,
        rules,
        qualification=qualification,
        length=length,
        information=information,
        linear=linear,
        rf=False,
    )
