"""External interrupts: when they exit, what is recorded, and when they go through L2's IDT instead.

SDM Vol. 3C, 26.2 (external interrupts), 26.3, 27.7.1 (blocking), 28.1 and 28.2.2 (what is recorded);
Vol. 3A, 11.8 (how the local APIC accepts interrupts).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitControls, ExitReason, Field, PinControls, SecondaryControls
from vmxlab.cases.memory import PROGRAM, STACK_TOP
from vmxlab.cases.steps import ApicRead, ApicWrite
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState

from .events import (
    APIC,
    LENGTH_OF_SENDING,
    SWITCH_ON,
    TRAP_GATE,
    before_entry,
    check_plain,
    delivered,
    frame,
    handlers,
    interrupt,
    sends,
    to_self,
    with_apic,
)

EXITING = PinControls.EXTERNAL_INTERRUPT_EXITING
ACKNOWLEDGE = ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT
NON_REGISTER_STATE = (Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_STATE)

VECTOR = 0x55
REQUESTED = ApicRead(ApicRegister.INTERRUPT_REQUEST_2)
IN_SERVICE = ApicRead(ApicRegister.IN_SERVICE_2)
BIT = 1 << VECTOR % 32
"""Of VECTOR in these two registers."""

IF_CLEAR = pytest.mark.vmx_known_difference("external-interrupt-while-if-is-clear")
BOTH = [
    pytest.param(int(RFLAGS.IF), id="if-set"),
    pytest.param(0, id="if-clear", marks=IF_CLEAR),
]


def pending(*, acknowledge: bool = False, flags: int = RFLAGS.IF, **case) -> Case:
    """L1 sends itself an interrupt right before it enters L2; behind, the APIC's registers are read."""
    case.setdefault("program", "nop; nop; hlt")
    return Case(
        enable=(EXITING, ACKNOWLEDGE) if acknowledge else EXITING,
        disable=() if acknowledge else ACKNOWLEDGE,
        steps=(SWITCH_ON, *before_entry(interrupt(VECTOR)), REQUESTED, IN_SERVICE),
        watch=NON_REGISTER_STATE,
        fields={Field.GUEST_RFLAGS: flags | 2, **case.pop("fields", {})},
        **case,
    )


def apic_after(run) -> tuple[int, int]:
    """IRR and ISR as read at the end."""
    requested, in_service = (o.value for o in run.outcomes if o.operation == "apic-read")
    return requested, in_service


@pytest.mark.parametrize("flags", BOTH)
def test_a_pending_interrupt_exits_before_l2_executes_anything(vmxlab, flags):
    """Vol. 3C, 26.2, 28.1, 28.2.2: it exits whatever RFLAGS.IF is; unacknowledged it stays requested."""
    run = vmxlab.run(pending(flags=flags))
    assert len(run.exits) == 1
    check_plain(run.exits[0], ExitReason.EXTERNAL_INTERRUPT, PROGRAM)
    assert run.exits[0].rflags == flags | 2
    assert set(run.exits[0].watched.values()) == {0}
    assert apic_after(run) == (BIT, 0)


@pytest.mark.parametrize("flags", BOTH)
def test_an_acknowledged_interrupt_is_named_and_in_service(vmxlab, flags):
    """Vol. 3C, 28.2.2: the exit acknowledges it, and interruption information holds its vector, type 0."""
    run = vmxlab.run(pending(acknowledge=True, flags=flags))
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXTERNAL_INTERRUPT
    assert exit_.raw_interruption_information == 1 << 31 | InterruptionType.EXTERNAL_INTERRUPT << 8 | VECTOR
    assert exit_.raw_qualification == 0
    assert not exit_.idt_vectoring.valid
    assert (exit_.rip, exit_.rflags) == (PROGRAM, flags | 2)
    assert set(exit_.watched.values()) == {0}
    assert apic_after(run) == (0, BIT)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("flags", BOTH)
def test_an_interrupt_that_comes_while_l2_runs_exits_behind_the_instruction(vmxlab, flags):
    """Vol. 3C, 28.3.3: RIP is the return pointer that delivery would have pushed."""
    case = Case(
        program=f"{sends(to_self(VECTOR))}; hlt",
        ept=with_apic(),
        enable=(EXITING, ACKNOWLEDGE),
        steps=(SWITCH_ON, *before_entry()),
        fields={Field.GUEST_RFLAGS: flags | 2},
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXTERNAL_INTERRUPT]
    assert run.exits[0].interruption.vector == VECTOR
    assert run.exits[0].rip == PROGRAM + LENGTH_OF_SENDING


@pytest.mark.vmx_known_difference("kvm-interrupt-in-the-shadow-of-sti-or-mov-ss")
@pytest.mark.parametrize(
    "blocking", [InterruptibilityState.BLOCKING_BY_STI, InterruptibilityState.BLOCKING_BY_MOV_SS]
)
def test_blocking_by_sti_or_mov_ss_puts_the_exit_off_by_one_instruction(vmxlab, blocking):
    """Vol. 3C, 27.7.1: such blocking holds events for one instruction of L2; IF alone does not matter."""
    run = vmxlab.run(pending(fields={Field.GUEST_INTERRUPTIBILITY_STATE: int(blocking)}))
    assert run.reasons == [ExitReason.EXTERNAL_INTERRUPT]
    assert run.exits[0].rip == PROGRAM + 1
    assert run.exits[0].watched[Field.GUEST_INTERRUPTIBILITY_STATE] == 0


def test_the_task_priority_holds_an_interrupt_back(vmxlab):
    """Vol. 3A, 11.8.3.1: an interrupt of no higher class than the task priority is not delivered."""
    raised = ApicWrite(ApicRegister.TASK_PRIORITY, VECTOR & 0xF0)
    case = Case(enable=EXITING, steps=(SWITCH_ON, raised, *before_entry(interrupt(VECTOR)), REQUESTED))
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.outcome("apic-read").value == BIT


@pytest.mark.parametrize("acknowledge", [False, True])
def test_of_two_interrupts_the_higher_vector_comes_first(vmxlab, acknowledge):
    """Vol. 3A, 11.8.3: the priority of an interrupt is its vector; each acknowledgement takes one."""
    lower, higher = 0x41, 0x91
    steps = (
        SWITCH_ON,
        *before_entry(interrupt(lower), interrupt(higher)),
        ApicRead(ApicRegister.IN_SERVICE_4),
    )
    case = Case(
        enable=(EXITING, ACKNOWLEDGE) if acknowledge else EXITING,
        disable=() if acknowledge else ACKNOWLEDGE,
        steps=steps,
        fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2},
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXTERNAL_INTERRUPT]
    assert run.exits[0].interruption.valid is acknowledge
    if acknowledge:
        assert run.exits[0].interruption.vector == higher
    assert run.outcome("apic-read").value == (1 << higher % 32 if acknowledge else 0)


# --- without exiting ---------------------------------------------------------------------------------------


def test_without_exiting_an_interrupt_goes_through_the_idt_of_l2(vmxlab):
    """Vol. 3C, 26.2: "external-interrupt exiting" 0: delivered normally, acknowledged, with IF cleared."""
    case = Case(
        **handlers("nop; nop; hlt", [VECTOR], fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2}),
        disable=EXITING,
        steps=(SWITCH_ON, *before_entry(interrupt(VECTOR)), REQUESTED, IN_SERVICE),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[0]) == VECTOR
    assert frame(run.exits[0])[:5] == [PROGRAM, 0x08, RFLAGS.IF | 2, STACK_TOP, 0x10]
    assert run.exits[0].rflags == 2
    assert run.exits[1].rflags == RFLAGS.IF | 2  # IRET has restored it
    assert apic_after(run) == (0, BIT)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_without_exiting_rflags_if_decides_when_it_is_delivered(vmxlab):
    """Vol. 2B, STI: with IF clear it waits; STI lets it in behind the instruction that follows STI."""
    program = f"{sends(to_self(VECTOR))}; mov r14, 1; sti; mov r15, 1; mov r15, 2; hlt"
    case = Case(
        **handlers(program, [VECTOR], ept=with_apic()),
        disable=EXITING,
        steps=(SWITCH_ON, *before_entry()),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[0]) == VECTOR
    assert (run.exits[0].registers["r14"], run.exits[0].registers["r15"]) == (1, 1)
    assert run.exits[1].registers["r15"] == 2


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_l2_ends_an_interrupt_by_an_eoi_and_gets_the_next(vmxlab):
    """Vol. 3A, 11.8.5: while one is in service, one of the same class waits for its EOI."""
    first, second = 0x52, 0x51
    case = Case(
        **handlers(
            f"mov dword ptr [{APIC + ApicRegister.EOI:#x}], 0; nop; hlt",
            [first, second],
            gate=TRAP_GATE,
            ept=with_apic(),
            fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2},
        ),
        disable=EXITING,
        steps=(SWITCH_ON, *before_entry(interrupt(first), interrupt(second))),
    )
    run = vmxlab.run(case)
    assert [delivered(exit_) for exit_ in run.exits[:2]] == [first, second]
    assert frame(run.exits[0])[0] == PROGRAM
    assert frame(run.exits[1])[0] == PROGRAM + 11  # behind the EOI
    assert run.reasons[2:] == [ExitReason.HLT]
