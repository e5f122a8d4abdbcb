"""The activity states HLT and shutdown: what ends them, what is saved. (Wait-for-SIPI: test_init_and_sipi.)

SDM Vol. 3C, 25.4.2, 27.3.1.5 (checks), 27.6.1, 27.7.2 (what each state blocks), 27.7.4 to 27.7.6, 26.5.1
(timer), 28.1 and 28.3.4 (what is saved).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Limits, PinControls, PrimaryControls, SecondaryControls, on
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, ActivityState, InterruptibilityState, Vector
from vmxlab.structures import VmxMisc

from .events import (
    NMI,
    SWITCH_ON,
    before_entry,
    check_plain,
    delivered,
    frame,
    handlers,
    injected,
    interrupt,
    sends,
    with_apic,
)

ACTIVITY = Field.GUEST_ACTIVITY_STATE
BLOCKING = Field.GUEST_INTERRUPTIBILITY_STATE
EVENT = Field.ENTRY_INTERRUPTION_INFORMATION
TIMER = Field.VMX_PREEMPTION_TIMER_VALUE

HLT = pytest.param(ActivityState.HLT, id="hlt", marks=pytest.mark.vmx_needs(VmxMisc.activity_hlt))
SHUTDOWN = pytest.param(
    ActivityState.SHUTDOWN, id="shutdown", marks=pytest.mark.vmx_needs(VmxMisc.activity_shutdown)
)
WAIT_FOR_SIPI = pytest.param(
    ActivityState.WAIT_FOR_SIPI,
    id="wait-for-sipi",
    marks=pytest.mark.vmx_needs(VmxMisc.activity_wait_for_sipi),
)
INTERRUPTIBLE = int(RFLAGS.IF) | 2
SAVED = pytest.mark.vmx_known_difference("exit-from-an-inactive-state")
VECTOR = 0x55


def in_state(state: ActivityState, *, fields=None, **case) -> Case:
    """L2 starts in that state; what it would execute is one HLT behind a NOP."""
    case.setdefault("program", "nop; hlt")
    return Case(
        fields={ACTIVITY: int(state), Field.GUEST_RFLAGS: INTERRUPTIBLE, **(fields or {})},
        watch=[ACTIVITY, BLOCKING],
        limits=Limits(l2_tsc=5_000_000),
        **case,
    )


def interrupted(state: ActivityState, **case) -> Case:
    """An external interrupt is pending at VM entry, and would exit."""
    case.setdefault("enable", PinControls.EXTERNAL_INTERRUPT_EXITING)
    return in_state(state, steps=(SWITCH_ON, *before_entry(interrupt(VECTOR))), **case)


# --- what ends them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [HLT])
def test_an_external_interrupt_ends_hlt(vmxlab, state):
    """Vol. 3C, 27.7.2: HLT does not block it; it exits at RIP, where nothing has been executed."""
    (exit_,) = vmxlab.run(interrupted(state)).exits
    check_plain(exit_, ExitReason.EXTERNAL_INTERRUPT, PROGRAM)
    assert (exit_.rflags, exit_.watched[BLOCKING]) == (INTERRUPTIBLE, 0)


@SAVED
@pytest.mark.parametrize("state", [HLT])
def test_an_external_interrupt_that_exits_saves_hlt(vmxlab, state):
    """Vol. 3C, 28.1 and 28.3.4: L2 returns to the active state only after the exit."""
    (exit_,) = vmxlab.run(interrupted(state)).exits
    assert exit_.watched[ACTIVITY] == state


@pytest.mark.vmx_needs(PinControls.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("state", [SHUTDOWN])
def test_an_external_interrupt_does_not_end_shutdown(vmxlab, state):
    """Vol. 3C, 27.7.2: it is blocked, whatever "external-interrupt exiting" is; only the timer ends it."""
    (exit_,) = vmxlab.run(interrupted(state)).exits
    assert exit_.full_reason == ExitReason.PREEMPTION_TIMER


@pytest.mark.vmx_needs(PinControls.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("state", [HLT, SHUTDOWN])
@pytest.mark.parametrize("ticks", [0, 1000])
def test_the_preemption_timer_ends_hlt_and_shutdown(vmxlab, state, ticks):
    """Vol. 3C, 26.5.1: it counts in both states; the exit saves the state, at RIP."""
    (exit_,) = vmxlab.run(in_state(state, fields={TIMER: ticks})).exits
    check_plain(exit_, ExitReason.PREEMPTION_TIMER, PROGRAM)
    assert exit_.watched[ACTIVITY] == state


@pytest.mark.vmx_known_difference("interrupt-window-in-hlt")
@pytest.mark.parametrize("state", [HLT])
def test_an_interrupt_window_ends_hlt(vmxlab, state):
    """Vol. 3C, 27.7.5: the exit wakes a processor that VM entry has just put into HLT."""
    (exit_,) = vmxlab.run(in_state(state, enable=PrimaryControls.INTERRUPT_WINDOW_EXITING)).exits
    check_plain(exit_, ExitReason.INTERRUPT_WINDOW, PROGRAM)


@pytest.mark.vmx_known_difference("interrupt-window-in-hlt")
@pytest.mark.vmx_known_difference("kvm-interrupt-window-in-hlt")
@pytest.mark.parametrize("state", [HLT])
def test_an_interrupt_window_saves_hlt(vmxlab, state):
    """Vol. 3C, 28.1 and 28.3.4: L2 returns to the active state only after the exit."""
    (exit_,) = vmxlab.run(in_state(state, enable=PrimaryControls.INTERRUPT_WINDOW_EXITING)).exits
    assert (exit_.reason, exit_.watched[ACTIVITY]) == (ExitReason.INTERRUPT_WINDOW, state)


@pytest.mark.vmx_needs(PinControls.ACTIVATE_PREEMPTION_TIMER)
@pytest.mark.parametrize("state", [SHUTDOWN])
def test_an_interrupt_window_does_not_end_shutdown(vmxlab, state):
    """Vol. 3C, 27.7.5."""
    (exit_,) = vmxlab.run(in_state(state, enable=PrimaryControls.INTERRUPT_WINDOW_EXITING)).exits
    assert exit_.full_reason == ExitReason.PREEMPTION_TIMER


@pytest.mark.parametrize("state", [HLT])
def test_an_nmi_window_ends_hlt(vmxlab, state):
    """Vol. 3C, 27.7.6."""
    controls = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS, PrimaryControls.NMI_WINDOW_EXITING)
    (exit_,) = vmxlab.run(in_state(state, enable=controls)).exits
    check_plain(exit_, ExitReason.NMI_WINDOW, PROGRAM)


@SAVED
@pytest.mark.vmx_known_difference("kvm-interrupt-window-in-hlt")
@pytest.mark.parametrize("state", [HLT])
def test_an_nmi_window_saves_hlt(vmxlab, state):
    """Vol. 3C, 28.3.4: the activity state is saved as it was before the exit."""
    controls = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS, PrimaryControls.NMI_WINDOW_EXITING)
    (exit_,) = vmxlab.run(in_state(state, enable=controls)).exits
    assert exit_.watched[ACTIVITY] == state


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.vmx_known_difference("nmi-blocking-outlives-vm-entry")
@pytest.mark.parametrize("state", [HLT, SHUTDOWN])
def test_an_nmi_ends_hlt_and_shutdown(vmxlab, state):
    """Vol. 3C, 27.7.2: neither blocks it. A first one, which exits, blocks the second until L2 is entered."""
    then = (
        on(ExitReason.EXCEPTION_OR_NMI, times=1)
        .apic_write(ApicRegister.INTERRUPT_COMMAND_LOW, int(NMI))
        .vmwrite(ACTIVITY, int(state))
        .vmwrite(BLOCKING, 0)
        .resume()
    )
    case = Case(
        program=f"{sends(NMI)}; hlt",
        ept=with_apic(),
        enable=PinControls.NMI_EXITING,
        reactions=[then],
        limits=Limits(l2_tsc=5_000_000),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI] * 2
    assert run.exits[1].rip == run.exits[0].rip


# --- without exits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [HLT])
def test_an_interrupt_that_l2_takes_itself_ends_hlt(vmxlab, state):
    """Vol. 3C, 27.7.2: delivered through L2's IDT; behind its IRET L2 is active, at RIP."""
    arguments = handlers(
        "nop; hlt", [VECTOR], fields={ACTIVITY: int(state), Field.GUEST_RFLAGS: INTERRUPTIBLE}
    )
    case = Case(
        **arguments,
        disable=PinControls.EXTERNAL_INTERRUPT_EXITING,
        steps=(SWITCH_ON, *before_entry(interrupt(VECTOR))),
        watch=[ACTIVITY],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[0]) == VECTOR
    assert frame(run.exits[0])[0] == PROGRAM
    assert [exit_.watched[ACTIVITY] for exit_ in run.exits] == [0, 0]
    assert run.exits[1].rip == PROGRAM + 1


@pytest.mark.parametrize(
    ("vector", "type_"),
    [
        (VECTOR, InterruptionType.EXTERNAL_INTERRUPT),
        (Vector.NMI, InterruptionType.NMI),
        (Vector.DB, InterruptionType.HARDWARE_EXCEPTION),
        (Vector.MC, InterruptionType.HARDWARE_EXCEPTION),
    ],
    ids=["external-interrupt", "nmi", "db", "mc"],
)
@pytest.mark.parametrize("state", [HLT])
def test_an_injected_event_makes_l2_active(vmxlab, state, vector, type_):
    """Vol. 3C, 27.7.2: a vectoring VM entry ends in the active state, whatever the field says."""
    fields = {
        ACTIVITY: int(state),
        Field.GUEST_RFLAGS: INTERRUPTIBLE,
        EVENT: injected(vector, type_),
    }
    run = vmxlab.run(Case(**handlers("nop; hlt", [vector], fields=fields), watch=[ACTIVITY]))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[0]) == vector
    assert frame(run.exits[0])[0] == PROGRAM
    assert [exit_.watched[ACTIVITY] for exit_ in run.exits] == [0, 0]


def test_hlt_of_l2_is_ended_by_an_interrupt(vmxlab):
    """Vol. 2A, HLT: without "HLT exiting" L2 halts; an interrupt that STI held back comes behind it."""
    case = Case(
        **handlers("sti; hlt; nop; cli; vmcall", [VECTOR]),
        disable=(PrimaryControls.HLT_EXITING, PinControls.EXTERNAL_INTERRUPT_EXITING),
        steps=(SWITCH_ON, *before_entry(interrupt(VECTOR))),
        reactions=[on(ExitReason.VMCALL, first=1).stop()],
        watch=[ACTIVITY],
    )
    in_handler, behind = vmxlab.run(case).exits
    assert delivered(in_handler) == VECTOR
    assert frame(in_handler)[0] == PROGRAM + 2
    assert behind.rip == PROGRAM + 4
    assert [exit_.watched[ACTIVITY] for exit_ in (in_handler, behind)] == [0, 0]


# --- what VM entry refuses ---------------------------------------------------------------------------------

UD = injected(Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
INTERRUPT = injected(VECTOR, InterruptionType.EXTERNAL_INTERRUPT)
AN_NMI = injected(Vector.NMI, InterruptionType.NMI)
BY_STI = int(InterruptibilityState.BLOCKING_BY_STI)
BY_MOV_SS = int(InterruptibilityState.BLOCKING_BY_MOV_SS)

ALL = [HLT, SHUTDOWN, WAIT_FOR_SIPI]


def check_refused(vmxlab, state, fields) -> None:
    (exit_,) = vmxlab.run(in_state(state, fields=fields)).exits
    assert exit_.full_reason == 1 << 31 | ExitReason.ENTRY_FAILURE_GUEST_STATE, exit_
    assert exit_.raw_qualification == 0
    assert exit_.rip == PROGRAM


@pytest.mark.vmx_known_difference("kvm-inactive-state-not-checked")
@pytest.mark.parametrize("state", ALL)
@pytest.mark.parametrize("blocking", [BY_STI, BY_MOV_SS], ids=["by-sti", "by-mov-ss"])
def test_an_inactive_state_with_such_blocking_is_refused(vmxlab, state, blocking):
    """Vol. 3C, 27.3.1.5: by STI or MOV SS only an active processor is blocked."""
    check_refused(vmxlab, state, {BLOCKING: blocking})


@pytest.mark.vmx_known_difference("kvm-inactive-state-not-checked")
@pytest.mark.parametrize(
    ("state", "event"),
    [
        pytest.param(
            *HLT.values,
            UD,
            id="hlt-ud",
            marks=(*HLT.marks, pytest.mark.vmx_known_difference("injection-into-hlt-not-checked")),
        ),
        pytest.param(*SHUTDOWN.values, UD, id="shutdown-ud", marks=SHUTDOWN.marks),
        pytest.param(*SHUTDOWN.values, INTERRUPT, id="shutdown-interrupt", marks=SHUTDOWN.marks),
        pytest.param(
            *WAIT_FOR_SIPI.values, INTERRUPT, id="wait-for-sipi-interrupt", marks=WAIT_FOR_SIPI.marks
        ),
        pytest.param(*WAIT_FOR_SIPI.values, AN_NMI, id="wait-for-sipi-nmi", marks=WAIT_FOR_SIPI.marks),
    ],
)
def test_an_event_that_the_state_blocks_is_not_injected(vmxlab, state, event):
    """Vol. 3C, 27.3.1.5: HLT allows interrupts, NMI, #DB, #MC, MTF; shutdown NMI, #MC; the last, none."""
    check_refused(vmxlab, state, {EVENT: event})


def test_a_state_that_there_is_not_is_refused(vmxlab):
    """Vol. 3C, 27.3.1.5: the field holds 0 to 3."""
    (exit_,) = vmxlab.run(Case(fields={ACTIVITY: 4})).exits
    assert exit_.full_reason == 1 << 31 | ExitReason.ENTRY_FAILURE_GUEST_STATE
