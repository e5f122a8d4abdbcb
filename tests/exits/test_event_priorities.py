"""Which of several events comes first: right after VM entry all of them are there at once.

SDM Vol. 3C, 27.7.3 to 27.7.8 (events after VM entry), 26.2, 26.5.1, 26.5.2; Vol. 3A, table 6-2 (priorities).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitControls, ExitReason, Field, PinControls, PrimaryControls
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, Vector

from .events import SWITCH_ON, before_entry, handlers, injected, interrupt

TIMER = Field.VMX_PREEMPTION_TIMER_VALUE
PENDING_DEBUG = Field.GUEST_PENDING_DEBUG_EXCEPTIONS
SINGLE_STEP = 1 << 14
WITH_TRAP = int(RFLAGS.IF | RFLAGS.TF) | 2

DEBUG = ExitReason.EXCEPTION_OR_NMI

# Highest priority first. What each needs: fields, controls, and steps before VM entry.
SOURCES: dict[ExitReason, dict[str, object]] = {
    ExitReason.EXCEPTION_OR_NMI: {"fields": {PENDING_DEBUG: SINGLE_STEP, Field.GUEST_RFLAGS: WITH_TRAP}},
    ExitReason.PREEMPTION_TIMER: {
        "fields": {TIMER: 0},
        "enable": (PinControls.ACTIVATE_PREEMPTION_TIMER,),
    },
    ExitReason.NMI_WINDOW: {
        "enable": (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS, PrimaryControls.NMI_WINDOW_EXITING)
    },
    ExitReason.INTERRUPT_WINDOW: {"enable": (PrimaryControls.INTERRUPT_WINDOW_EXITING,)},
    ExitReason.EXTERNAL_INTERRUPT: {
        "enable": (PinControls.EXTERNAL_INTERRUPT_EXITING,),
        "steps": (SWITCH_ON, *before_entry(interrupt(0x50))),
    },
}
ORDER = list(SOURCES)
KVM = pytest.mark.vmx_known_difference("kvm-external-interrupt-before-the-windows")
WINDOWS = (ExitReason.NMI_WINDOW, ExitReason.INTERRUPT_WINDOW)
PAIRS = [
    pytest.param(
        first,
        second,
        id=f"{first.name}-{second.name}",
        marks=KVM if first in WINDOWS and second is ExitReason.EXTERNAL_INTERRUPT else (),
    )
    for i, first in enumerate(ORDER)
    for second in ORDER[i + 1 :]
]


def all_of(*reasons: ExitReason) -> Case:
    fields: dict[Field, int] = {Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2}
    enable: list[object] = []
    steps = before_entry()
    for reason in reversed(reasons):
        source = SOURCES[reason]
        fields |= source.get("fields", {})  # type: ignore[arg-type]
        enable += source.get("enable", ())  # type: ignore[arg-type]
        steps = source.get("steps", steps)  # type: ignore[assignment]
    return Case(program="nop; hlt", fields=fields, enable=enable, steps=steps)


@pytest.mark.parametrize("reason", ORDER, ids=lambda reason: reason.name)
def test_each_alone_comes_before_the_first_instruction(vmxlab, reason):
    """What the pairs below stand on."""
    (exit_,) = vmxlab.run(all_of(reason)).exits
    assert exit_.full_reason == reason
    assert exit_.rip == PROGRAM
    if reason is DEBUG:
        assert exit_.interruption.vector == Vector.DB
        assert exit_.qualification.bs


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_of_two_the_one_with_priority_comes(vmxlab, first, second):
    """Vol. 3C, 27.7.3 to 27.7.6: debug trap, timer, NMI window, interrupt window, external interrupt."""
    (exit_,) = vmxlab.run(all_of(first, second)).exits
    assert exit_.full_reason == first
    assert exit_.rip == PROGRAM


def test_an_injected_event_comes_before_all_of_them(vmxlab):
    """Vol. 3C, 27.7.4 to 27.7.6: the exits follow the injection: RIP is that of the handler."""
    vector = 0x33
    case = all_of(*ORDER[1:])
    fields = {
        **case.fields,
        Field.ENTRY_INTERRUPTION_INFORMATION: injected(vector, InterruptionType.EXTERNAL_INTERRUPT),
    }
    run = vmxlab.run(
        Case(**handlers("nop; hlt", [vector], fields=fields), enable=case.enable, steps=case.steps)
    )
    assert run.reasons == [ExitReason.PREEMPTION_TIMER]
    assert run.exits[0].rip == PROGRAM + 0x400


@pytest.mark.vmx_known_difference("kvm-external-interrupt-before-the-windows")
def test_the_interrupt_that_waited_is_still_there(vmxlab):
    """Vol. 3C, 27.7.5: the window exit takes nothing away: with the control off the interrupt exits."""
    window = all_of(ExitReason.INTERRUPT_WINDOW, ExitReason.EXTERNAL_INTERRUPT)
    assert vmxlab.run(window).reasons == [ExitReason.INTERRUPT_WINDOW]
    plain = all_of(ExitReason.EXTERNAL_INTERRUPT)
    case = Case(
        program="nop; hlt",
        fields=plain.fields,
        enable=(*plain.enable, ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT),
        steps=plain.steps,
    )
    (exit_,) = vmxlab.run(case).exits
    assert exit_.interruption.vector == 0x50
