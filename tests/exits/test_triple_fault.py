"""Triple faults: an exit of their own, and what it saves.

SDM Vol. 3C, 26.2 (triple fault), 28.2.2, 28.2.4 (it is no event delivery), 28.3.3 (RIP);
Vol. 3A, 6.15, #DF.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, SecondaryControls
from vmxlab.cases.memory import PROGRAM, STACK_TOP
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, Vector

from .events import handlers, injected

STATE = (
    Field.GUEST_ACTIVITY_STATE,
    Field.GUEST_INTERRUPTIBILITY_STATE,
    Field.GUEST_PENDING_DEBUG_EXCEPTIONS,
    Field.GUEST_CS_SELECTOR,
    Field.GUEST_SS_SELECTOR,
)

NO_IDT = {Field.EXCEPTION_BITMAP: 0}
"""No exception exits, and the baseline's IDT has no gate: #DF meets a #GP."""

MODES = pytest.mark.parametrize(
    "mode",
    [
        Mode.LONG,
        Mode.PROTECTED,
        pytest.param(Mode.REAL, marks=pytest.mark.vmx_needs(SecondaryControls.UNRESTRICTED_GUEST)),
    ],
    ids=lambda mode: mode.name.lower(),
)


def check_triple_fault(exit_, rip: int, *, stack: int = STACK_TOP) -> None:
    """The exit has nothing to say but that it came: no qualification, no event, no delivery."""
    assert exit_.full_reason == ExitReason.TRIPLE_FAULT, exit_
    assert exit_.raw_qualification == 0
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert exit_.rip == rip
    assert exit_.registers["rsp"] == stack


FAULTS = {
    # What begins it, and where the return pointer of the double fault is: of a fault, the instruction.
    "ud2": ("nop; ud2", 1),
    "int-n": ("nop; int 0x80", 1),
    "int3": ("nop; int3", 1),
    "gp": ("mov eax, 0x88; mov ds, eax", 5),
}


@pytest.mark.parametrize(("program", "at"), FAULTS.values(), ids=FAULTS)
def test_a_fault_without_any_handler_is_a_triple_fault(vmxlab, program, at):
    """Vol. 3C, 26.2 and 28.3.3: RIP as the double fault would have pushed it; the state before is saved."""
    (exit_,) = vmxlab.run(Case(program=program, fields=NO_IDT, watch=STATE)).exits
    check_triple_fault(exit_, PROGRAM + at)
    assert exit_.rflags & ~RFLAGS.RF == 2
    assert list(exit_.watched.values()) == [0, 0, 0, 0x08, 0x10]


@MODES
def test_it_is_the_same_in_each_mode(vmxlab, mode):
    """In real mode the vectors are there, so the IDT's limit has to forbid them."""
    fields = {**NO_IDT, Field.GUEST_IDTR_LIMIT: 0}
    (exit_,) = vmxlab.run(Case(program="nop; ud2", mode=mode, fields=fields)).exits
    check_triple_fault(exit_, PROGRAM + 1)


def test_a_handler_without_a_stack_is_a_triple_fault(vmxlab):
    """#UD, #DF and the #SS between have gates, but no frame can be pushed where RSP is not canonical."""
    arguments = handlers("ud2", [Vector.UD, Vector.DF, Vector.SS], registers={"rsp": 1 << 63})
    (exit_,) = vmxlab.run(Case(**arguments)).exits
    check_triple_fault(exit_, PROGRAM, stack=1 << 63)


@pytest.mark.parametrize(
    ("vector", "type_", "error_code"),
    [
        (Vector.DF, InterruptionType.HARDWARE_EXCEPTION, True),
        (Vector.UD, InterruptionType.HARDWARE_EXCEPTION, False),
        (Vector.NMI, InterruptionType.NMI, False),
        (0x30, InterruptionType.EXTERNAL_INTERRUPT, False),
    ],
    ids=["df", "ud", "nmi", "external-interrupt"],
)
def test_an_injected_event_may_end_in_a_triple_fault(vmxlab, vector, type_, error_code):
    """Vol. 3C, 27.6.1.2: its delivery is as in L2: no VM-entry failure, and RIP is that of the entry."""
    information = injected(vector, type_, error_code=error_code)
    fields = {
        **NO_IDT,
        Field.ENTRY_INTERRUPTION_INFORMATION: information,
        Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2,
    }
    (exit_,) = vmxlab.run(Case(fields=fields)).exits
    check_triple_fault(exit_, PROGRAM)


# --- on the way there --------------------------------------------------------------------------------------


def bitmap(*vectors: Vector) -> int:
    return sum(1 << vector for vector in vectors)


def test_a_double_fault_that_exits_is_no_triple_fault(vmxlab):
    """Vol. 3C, 28.2.2 and 28.2.4: #DF with error code 0, and no event delivery: the event "results in" it."""
    fields = {Field.EXCEPTION_BITMAP: bitmap(Vector.DF)}
    (exit_,) = vmxlab.run(Case(program="mov eax, 0x88; mov ds, eax", fields=fields)).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    information = exit_.interruption
    assert (information.vector, information.type) == (Vector.DF, InterruptionType.HARDWARE_EXCEPTION)
    assert information.error_code_valid
    assert exit_.interruption_error_code == 0
    assert not exit_.idt_vectoring.valid
    assert exit_.raw_qualification == 0
    assert exit_.rip == PROGRAM + 5


def test_a_nested_exception_that_exits_comes_before_the_double_fault(vmxlab):
    """Vol. 3C, 26.2 and 28.2.4: the #GP of a missing gate exits; the #UD is what was being delivered."""
    fields = {Field.EXCEPTION_BITMAP: bitmap(Vector.GP)}
    (exit_,) = vmxlab.run(Case(program="nop; ud2", fields=fields)).exits
    assert exit_.interruption.vector == Vector.GP
    assert exit_.interruption_error_code == Vector.UD << 3 | 0b11  # IDT, EXT
    assert (exit_.idt_vectoring.vector, exit_.idt_vectoring.valid) == (Vector.UD, True)
    assert not exit_.idt_vectoring.error_code_valid
    assert exit_.rip == PROGRAM + 1


def test_an_exception_in_the_delivery_of_a_double_fault_may_exit(vmxlab):
    """Vol. 3C, 26.2: instead of the triple fault; #DF with its error code is what was being delivered."""
    # The gate of #DF is beyond the limit.
    fields = {
        Field.EXCEPTION_BITMAP: bitmap(Vector.GP),
        Field.GUEST_IDTR_LIMIT: 8 * 16 - 1,
        Field.ENTRY_INTERRUPTION_INFORMATION: injected(
            Vector.DF, InterruptionType.HARDWARE_EXCEPTION, error_code=True
        ),
    }
    (exit_,) = vmxlab.run(Case(fields=fields)).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert exit_.interruption.vector == Vector.GP
    assert exit_.interruption_error_code == Vector.DF << 3 | 0b11
    delivery = exit_.idt_vectoring
    assert (delivery.vector, delivery.type) == (Vector.DF, InterruptionType.HARDWARE_EXCEPTION)
    assert delivery.error_code_valid
    assert exit_.idt_vectoring_error_code == 0
    assert exit_.rip == PROGRAM
