"""Interrupt-window and NMI-window exits: when they come, when they do not, and what they record.

SDM Vol. 3C, 26.2 (interrupt-window exiting, NMI-window exiting), 27.7.5 and 27.7.6 (right after VM entry),
27.7.1 (blocking), 28.3.3 (RIP).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ControlSet, ExitReason, Field, Limits, PinControls, PrimaryControls, on
from vmxlab.cases.controls import compute_controls
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState, Vector

from .conftest import IRET
from .events import TRAP_GATE, check_plain, delivered, handlers, injected

INTERRUPT_WINDOW = PrimaryControls.INTERRUPT_WINDOW_EXITING
NMI_WINDOW = PrimaryControls.NMI_WINDOW_EXITING
VIRTUAL_NMIS = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS, NMI_WINDOW)

BLOCKING = Field.GUEST_INTERRUPTIBILITY_STATE
STATE = (BLOCKING, Field.GUEST_ACTIVITY_STATE)
BY_STI = int(InterruptibilityState.BLOCKING_BY_STI)
BY_MOV_SS = int(InterruptibilityState.BLOCKING_BY_MOV_SS)
BY_NMI = int(InterruptibilityState.BLOCKING_BY_NMI)
IF = int(RFLAGS.IF)


def window(program: str, *, flags: int = 0, blocking: int = 0, **case) -> Case:
    case.setdefault("enable", INTERRUPT_WINDOW)
    fields = {Field.GUEST_RFLAGS: flags | 2, BLOCKING: blocking, **case.pop("fields", {})}
    return Case(program=program, fields=fields, watch=STATE, **case)


# --- interrupt window --------------------------------------------------------------------------------------


def test_an_open_window_exits_before_l2_executes_anything(vmxlab):
    """Vol. 3C, 27.7.5: with IF set and nothing blocking, right after VM entry."""
    (exit_,) = vmxlab.run(window("hlt", flags=IF)).exits
    check_plain(exit_, ExitReason.INTERRUPT_WINDOW, PROGRAM)
    assert exit_.rflags == IF | 2
    assert set(exit_.watched.values()) == {0}


def test_a_closed_window_does_not_exit(vmxlab):
    """Vol. 3C, 26.2: with IF clear nothing happens, whatever L2 does."""
    run = vmxlab.run(window("cli; nop; pushfq; popfq; hlt"))
    assert run.reasons == [ExitReason.HLT]


@pytest.mark.parametrize("blocking", [BY_STI, BY_MOV_SS], ids=["by-sti", "by-mov-ss"])
def test_blocking_keeps_the_window_shut_for_one_instruction(vmxlab, blocking):
    """Vol. 3C, 26.2 and 27.7.1: the window opens at the instruction behind the blocked one."""
    (exit_,) = vmxlab.run(window("nop; hlt", flags=IF, blocking=blocking)).exits
    check_plain(exit_, ExitReason.INTERRUPT_WINDOW, PROGRAM + 1)
    assert set(exit_.watched.values()) == {0}


OPENERS = {
    # name: (program, offset at which the window is open)
    "sti": ("nop; sti; nop; hlt", 3),
    "sti-sti": ("sti; sti; nop; hlt", 2),
    "popf": ("pushfq; or dword ptr [rsp], 0x200; popfq; nop; hlt", 9),
    "sti-cli": ("sti; cli; sti; nop; hlt", 4),
}


@pytest.mark.parametrize(("program", "at"), OPENERS.values(), ids=OPENERS)
def test_the_window_opens_as_l2_sets_if(vmxlab, program, at):
    """Vol. 2B, STI: behind the instruction that follows STI, if that does not clear IF; POPF has no delay."""
    (exit_,) = vmxlab.run(window(program)).exits
    check_plain(exit_, ExitReason.INTERRUPT_WINDOW, PROGRAM + at)
    assert exit_.rflags & IF
    assert exit_.watched[BLOCKING] == 0


def test_mov_ss_puts_the_window_off(vmxlab):
    """Vol. 3A, 6.8.3: with SS just loaded, the window opens behind what follows MOV SS."""
    program = "mov eax, ss; sti; mov ss, eax; nop; nop; hlt"
    (exit_,) = vmxlab.run(window(program)).exits
    # STI blocks at MOV SS, and MOV SS at the first NOP.
    check_plain(exit_, ExitReason.INTERRUPT_WINDOW, PROGRAM + 2 + 1 + 2 + 1)


def test_the_window_exits_again_and_again(vmxlab):
    """Vol. 3C, 26.2: at the beginning of each instruction; with the control still 1, L2 gets nowhere."""
    again = on(ExitReason.INTERRUPT_WINDOW).resume()
    run = vmxlab.run(window("nop; hlt", flags=IF, reactions=[again], limits=Limits(exits=4)))
    assert [(exit_.reason, exit_.rip) for exit_ in run.exits] == [(ExitReason.INTERRUPT_WINDOW, PROGRAM)] * 4


def test_the_control_taken_away_lets_l2_go_on(vmxlab):
    """Vol. 3C, 26.2: how an interrupt is injected when the guest is ready: window, then injection."""
    vector = 0x33
    event = injected(vector, InterruptionType.EXTERNAL_INTERRUPT)
    compiled = handlers("sti; nop; nop; hlt", [vector])
    answer = (
        on(ExitReason.INTERRUPT_WINDOW, times=1)
        .inject(event)
        .vmwrite(Field.PRIMARY_PROCESSOR_BASED_CONTROLS, controls_without(vmxlab, INTERRUPT_WINDOW))
        .resume()
    )
    run = vmxlab.run(Case(**compiled, enable=INTERRUPT_WINDOW, reactions=[answer]))
    assert run.reasons == [ExitReason.INTERRUPT_WINDOW, ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[1]) == vector


def controls_without(vmxlab, flag) -> int:
    """The primary controls of a case that enables nothing."""
    return compute_controls(Case(disable=flag), vmxlab.capabilities)[ControlSet.PRIMARY]


@pytest.mark.parametrize("gate", [TRAP_GATE, None], ids=["trap-gate", "interrupt-gate"])
def test_the_window_is_looked_at_behind_an_injected_event(vmxlab, gate):
    """Vol. 3C, 27.7.5: the event is delivered first; whether IF is set then depends on its gate."""
    vector = 0x31
    more = {"gate": gate} if gate else {}
    event = injected(vector, InterruptionType.EXTERNAL_INTERRUPT)
    fields = {Field.GUEST_RFLAGS: IF | 2, Field.ENTRY_INTERRUPTION_INFORMATION: event}
    run = vmxlab.run(Case(**handlers("hlt", [vector], fields=fields, **more), enable=INTERRUPT_WINDOW))
    if gate:
        check_plain(run.exits[0], ExitReason.INTERRUPT_WINDOW, PROGRAM + 0x400)
        assert len(run.exits) == 1
    else:
        # Behind the handler's IRET IF is set again.
        assert run.reasons == [ExitReason.VMCALL, ExitReason.INTERRUPT_WINDOW]
        assert run.exits[1].rip == PROGRAM


# --- NMI window --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, IF])
def test_an_open_nmi_window_exits_before_l2_executes_anything(vmxlab, flags):
    """Vol. 3C, 27.7.6: without virtual-NMI blocking, whatever RFLAGS.IF is."""
    (exit_,) = vmxlab.run(window("hlt", flags=flags, enable=VIRTUAL_NMIS)).exits
    check_plain(exit_, ExitReason.NMI_WINDOW, PROGRAM)
    assert exit_.rflags == flags | 2
    assert set(exit_.watched.values()) == {0}


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
def test_virtual_nmi_blocking_keeps_the_nmi_window_shut(vmxlab):
    """Vol. 3C, 26.2: as long as there is virtual-NMI blocking, nothing exits."""
    run = vmxlab.run(window("nop; sti; nop; nop; hlt", blocking=BY_NMI, enable=VIRTUAL_NMIS))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[BLOCKING] == BY_NMI


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
def test_iret_opens_the_nmi_window(vmxlab):
    """Vol. 3C, 26.2 and 26.3: IRET removes the blocking; the exit comes before the next instruction."""
    program = f"vmcall; {IRET}"
    run = vmxlab.run(window(program, blocking=BY_NMI, enable=VIRTUAL_NMIS))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.NMI_WINDOW]
    plain = vmxlab.run(window(program))
    check_plain(run.exits[1], ExitReason.NMI_WINDOW, plain.exits[-1].rip)  # where HLT is
    assert [exit_.watched[BLOCKING] for exit_ in run.exits] == [BY_NMI, 0]


def test_blocking_by_mov_ss_keeps_the_nmi_window_shut_for_one_instruction(vmxlab):
    """Vol. 3C, 26.2 and 27.7.6. (Whether STI does is the processor's choice.)"""
    (exit_,) = vmxlab.run(window("nop; hlt", blocking=BY_MOV_SS, enable=VIRTUAL_NMIS)).exits
    check_plain(exit_, ExitReason.NMI_WINDOW, PROGRAM + 1)
    assert exit_.watched[BLOCKING] == 0


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
def test_an_injected_nmi_shuts_the_window_until_its_iret(vmxlab):
    """Vol. 3C, 27.7.1 and 27.7.6: injecting an NMI begins virtual-NMI blocking."""
    event = injected(Vector.NMI, InterruptionType.NMI)
    case = Case(
        **handlers("hlt", [Vector.NMI], fields={Field.ENTRY_INTERRUPTION_INFORMATION: event}),
        enable=VIRTUAL_NMIS,
        watch=STATE,
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.NMI_WINDOW]
    assert delivered(run.exits[0]) == Vector.NMI
    assert run.exits[0].watched[BLOCKING] == BY_NMI
    check_plain(run.exits[1], ExitReason.NMI_WINDOW, PROGRAM)
    assert run.exits[1].watched[BLOCKING] == 0


def test_the_nmi_window_has_priority_over_the_interrupt_window(vmxlab):
    """Vol. 3C, 27.7.5 and 27.7.6: NMI window first, as NMIs come before interrupts."""
    run = vmxlab.run(window("hlt", flags=IF, enable=(*VIRTUAL_NMIS, INTERRUPT_WINDOW)))
    assert run.reasons == [ExitReason.NMI_WINDOW]
