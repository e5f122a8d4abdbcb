"""Exits in the middle of event delivery: what was being delivered, and what of it has happened already.

SDM Vol. 3C, 27.6.1.2 (delivery of injected events), 28.1, 28.2.2 to 28.2.5, 28.3.3. (EPT violations of events
that L2 raises itself: test_ept_violation_delivery; task gates: test_task_switch.)
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, PinControls, SecondaryControls
from vmxlab.cases.memory import PROGRAM, STACK_TOP, UNMAPPED
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState, Vector

from .events import (
    LENGTH_OF_SENDING,
    NMI,
    SWITCH_ON,
    before_entry,
    handlers,
    injected,
    interrupt,
    sends,
    with_apic,
)

TYPE = InterruptionType
EVENT = Field.ENTRY_INTERRUPTION_INFORMATION
BLOCKING = Field.GUEST_INTERRUPTIBILITY_STATE
BY_NMI = int(InterruptibilityState.BLOCKING_BY_NMI)
INTERRUPTIBLE = int(RFLAGS.IF) | 2

EVENTS = [
    # vector, type, error code, length
    pytest.param(0x30, TYPE.EXTERNAL_INTERRUPT, None, 0, id="external-interrupt"),
    pytest.param(Vector.NMI, TYPE.NMI, None, 0, id="nmi"),
    pytest.param(Vector.UD, TYPE.HARDWARE_EXCEPTION, None, 0, id="ud"),
    pytest.param(Vector.NP, TYPE.HARDWARE_EXCEPTION, 0x1230, 0, id="np"),
    pytest.param(Vector.PF, TYPE.HARDWARE_EXCEPTION, 0x7, 0, id="pf"),
    pytest.param(0x80, TYPE.SOFTWARE_INTERRUPT, None, 2, id="int-n"),
    pytest.param(
        Vector.DB,
        TYPE.PRIVILEGED_SOFTWARE_EXCEPTION,
        None,
        1,
        id="int1",
        marks=pytest.mark.vmx_known_difference("kvm-injected-int1-is-lost"),
    ),
    pytest.param(Vector.BP, TYPE.SOFTWARE_EXCEPTION, None, 1, id="int3"),
    pytest.param(Vector.OF, TYPE.SOFTWARE_EXCEPTION, None, 1, id="into"),
]


def injecting(vector: int, type_: InterruptionType, error_code: int | None, length: int) -> dict[Field, int]:
    return {
        EVENT: injected(vector, type_, error_code=error_code is not None),
        Field.ENTRY_EXCEPTION_ERROR_CODE: error_code or 0,
        Field.ENTRY_INSTRUCTION_LENGTH: length,
        Field.GUEST_RFLAGS: INTERRUPTIBLE,
    }


def check_delivered(exit_, vector: int, type_: InterruptionType, error_code: int | None, length: int) -> None:
    """The IDT-vectoring fields (28.2.4), length of a software event (28.2.5); RIP and RSP as before it."""
    event = InterruptionInformation.from_bits(exit_.raw_idt_vectoring_information & ~(1 << 12))  # undefined
    assert event == InterruptionInformation(vector, type_, error_code_valid=error_code is not None)
    if error_code is not None:
        assert exit_.idt_vectoring_error_code == error_code
    if length:
        assert exit_.instruction_length == length
    assert not exit_.entry_failed
    assert (exit_.rip, exit_.registers["rsp"]) == (PROGRAM, STACK_TOP)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize(("vector", "type_", "error_code", "length"), EVENTS)
def test_an_injected_event_that_meets_an_ept_violation(vmxlab, vector, type_, error_code, length):
    """Vol. 3C, 27.6.1.2 and 28.2.4: the IDT lies where EPT maps nothing: an exit, not a failed entry."""
    fields = injecting(vector, type_, error_code, length)
    fields |= {Field.GUEST_IDTR_BASE: UNMAPPED, Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: 0}
    (exit_,) = vmxlab.run(Case(fields=fields)).exits
    assert exit_.full_reason == ExitReason.EPT_VIOLATION
    check_delivered(exit_, vector, type_, error_code, length)
    assert exit_.guest_linear_address & ~0xF == UNMAPPED + 16 * vector
    assert not exit_.interruption.valid


FIRST_EVENTS = [
    event for event in EVENTS if event.id in ("external-interrupt", "nmi", "ud", "int-n", "int1", "int3")
]


@pytest.mark.parametrize(("vector", "type_", "error_code", "length"), FIRST_EVENTS)
def test_an_injected_event_that_meets_an_exception_that_exits(vmxlab, vector, type_, error_code, length):
    """Vol. 3C, 28.2.2 and 28.2.4: the IDT is too short: #GP(selector), EXT by what was injected."""
    fields = injecting(vector, type_, error_code, length) | {Field.GUEST_IDTR_LIMIT: 0}
    (exit_,) = vmxlab.run(Case(fields=fields)).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    check_delivered(exit_, vector, type_, error_code, length)
    second = exit_.interruption
    assert (second.vector, second.type) == (Vector.GP, TYPE.HARDWARE_EXCEPTION)
    assert second.error_code_valid
    # Vol. 3A, 6.13: EXT is clear where INT n, INT3 or INTO met the fault.
    by_program = type_ in (TYPE.SOFTWARE_INTERRUPT, TYPE.SOFTWARE_EXCEPTION)
    assert exit_.interruption_error_code == vector << 3 | 0b10 | (0 if by_program else 1)


def test_an_injected_event_is_not_looked_up_in_the_exception_bitmap(vmxlab):
    """Vol. 3C, 27.6.1.2: injection causes no exit by the bitmap; only what its delivery raises does."""
    fields = injecting(Vector.UD, TYPE.HARDWARE_EXCEPTION, None, 0) | {Field.EXCEPTION_BITMAP: 0xFFFF_FFFF}
    run = vmxlab.run(Case(**handlers("hlt", [Vector.UD], fields=fields)))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]


@pytest.mark.parametrize("first", [Vector.GP, Vector.PF, Vector.DE], ids=lambda vector: vector.name.lower())
def test_an_injected_exception_that_meets_a_contributory_one_is_a_double_fault(vmxlab, first):
    """Vol. 3A, table 6-5, and Vol. 3C, 28.2.4: #DF exits, and counts as no delivery. (The second is #GP.)"""
    error_code = 0 if first.has_error_code else None
    fields = injecting(first, TYPE.HARDWARE_EXCEPTION, error_code, 0)
    fields |= {Field.EXCEPTION_BITMAP: 1 << Vector.DF, Field.GUEST_IDTR_LIMIT: 0}
    (exit_,) = vmxlab.run(Case(fields=fields)).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (Vector.DF, 0)
    assert exit_.interruption.error_code_valid
    assert not exit_.idt_vectoring.valid
    assert exit_.rip == PROGRAM


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
@pytest.mark.vmx_known_difference("kvm-nmi-that-exits-in-its-delivery")
def test_an_injected_nmi_that_exits_in_its_delivery_has_begun_virtual_nmi_blocking(vmxlab):
    """Vol. 3C, 28.1: with "virtual NMIs" the blocking is in effect before the exit commences."""
    fields = injecting(Vector.NMI, TYPE.NMI, None, 0) | {Field.GUEST_IDTR_LIMIT: 0}
    case = Case(fields=fields, enable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS), watch=[BLOCKING])
    (exit_,) = vmxlab.run(case).exits
    assert exit_.interruption.vector == Vector.GP
    assert exit_.watched[BLOCKING] == BY_NMI


# --- events that arrive ------------------------------------------------------------------------------------


def test_an_interrupt_that_exits_in_its_delivery_has_been_acknowledged(vmxlab):
    """Vol. 3C, 28.1: an external interrupt that exits indirectly is no longer pending."""
    case = Case(
        program="nop; hlt",
        fields={Field.GUEST_RFLAGS: INTERRUPTIBLE, Field.GUEST_IDTR_LIMIT: 0},
        disable=PinControls.EXTERNAL_INTERRUPT_EXITING,
        steps=(SWITCH_ON, *before_entry(interrupt(0x66))),
    )
    (exit_,) = vmxlab.run(case).exits
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (Vector.GP, 0x66 << 3 | 0b11)
    check_delivered(exit_, 0x66, TYPE.EXTERNAL_INTERRUPT, None, 0)
    assert exit_.rflags & ~RFLAGS.RF == INTERRUPTIBLE


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_an_nmi_that_exits_in_its_delivery_is_named(vmxlab):
    """Vol. 3C, 28.2.4: vector 2, type NMI; RIP is the return pointer."""
    case = Case(
        program=f"{sends(NMI)}; hlt",
        ept=with_apic(),
        disable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS),
        fields={Field.GUEST_IDTR_LIMIT: 0},
    )
    (exit_,) = vmxlab.run(case).exits
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (Vector.GP, Vector.NMI << 3 | 0b11)
    assert (exit_.idt_vectoring.vector, exit_.idt_vectoring.type) == (Vector.NMI, TYPE.NMI)
    assert exit_.rip == PROGRAM + LENGTH_OF_SENDING
