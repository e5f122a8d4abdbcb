"""INIT signals and start-up IPIs, sent by L2 itself or by a second processor, in each activity state.

SDM Vol. 3C, 26.2 (INIT signals, SIPIs), 27.7.2 (what each activity state blocks), 28.1, 28.2.1 (SIPI vector),
28.3.4 (what is saved); Vol. 3A, 11.6.1 (interrupt command register).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmxlab import Case, ExitReason, Field, Limits, PinControls, SecondaryControls, on
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import ApicWrite, Store
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.registers import RFLAGS, ActivityState
from vmxlab.structures import VmxMisc

from .events import (
    INIT,
    LENGTH_OF_SENDING,
    NMI,
    SWITCH_ON,
    before_entry,
    check_plain,
    sends,
    startup,
    with_apic,
)

STATE = (Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_STATE, Field.GUEST_PENDING_DEBUG_EXCEPTIONS)
ACTIVITY, BLOCKING, PENDING = STATE

LOW = f"dword ptr [APIC + {int(ApicRegister.INTERRUPT_COMMAND_LOW):#x}]"
HIGH = f"dword ptr [APIC + {int(ApicRegister.INTERRUPT_COMMAND_HIGH):#x}]"
FIXED = 1 << 14

ACTIVE_LOOP = "mov byte ptr [DATA], 1; again: pause; jmp again"
LOOP = range(PROGRAM + 8, PROGRAM + 12)

in_state = {
    state: pytest.mark.vmx_needs(need)
    for state, need in (
        (ActivityState.HLT, VmxMisc.activity_hlt),
        (ActivityState.SHUTDOWN, VmxMisc.activity_shutdown),
        (ActivityState.WAIT_FOR_SIPI, VmxMisc.activity_wait_for_sipi),
    )
}
WAITING = {ACTIVITY: int(ActivityState.WAIT_FOR_SIPI)}


def when_l2_runs(*commands: int) -> str:
    """A program of the second processor: it waits for L2's word, then sends each command once."""
    sent = "; ".join(f"mov {LOW}, {int(command):#x}" for command in commands)
    return f"wait: pause; cmp byte ptr [DATA], 1; jne wait; mov {HIGH}, 0; {sent}"


def again_and_again(*commands: int) -> str:
    """The commands one after the other, with a pause between rounds, until the case ends.

    A processor that is not in the wait-for-SIPI state discards SIPIs: it does not matter when L2 gets there.
    """
    sent = "; ".join(f"mov {LOW}, {int(command):#x}" for command in commands)
    return f"mov {HIGH}, 0; again: {sent}; mov ecx, 200; 1: pause; loop 1b; jmp again"


# --- INIT --------------------------------------------------------------------------------------------------


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("flags", [0, int(RFLAGS.IF)])
def test_an_init_exits_behind_the_instruction_that_sent_it(vmxlab, flags):
    """Vol. 3C, 26.2: INIT exits in VMX non-root operation, and does nothing else; no control is asked."""
    case = Case(
        program=f"mov eax, 0x1234; {sends(INIT)}; mov eax, 5; hlt",
        ept=with_apic(),
        fields={Field.GUEST_RFLAGS: flags | 2},
        watch=[*STATE, Field.GUEST_CR0, Field.GUEST_CS_SELECTOR],
    )
    (exit_,) = vmxlab.run(case).exits
    check_plain(exit_, ExitReason.INIT_SIGNAL, PROGRAM + 5 + LENGTH_OF_SENDING)
    assert exit_.rflags == flags | 2
    assert exit_.registers["rax"] == 0x1234
    assert [exit_.watched[field] for field in STATE] == [ActivityState.ACTIVE, 0, 0]
    assert exit_.watched[Field.GUEST_CS_SELECTOR] == 0x08  # not as after a reset


def test_an_init_of_another_processor_exits(vmxlab):
    """Vol. 3C, 26.2: from wherever it comes."""
    run = vmxlab.run(Case(program=ACTIVE_LOOP, second_program=when_l2_runs(INIT), watch=STATE))
    (exit_,) = run.exits
    check_plain(exit_, ExitReason.INIT_SIGNAL, exit_.rip)
    assert exit_.rip in LOOP
    assert [exit_.watched[field] for field in STATE] == [ActivityState.ACTIVE, 0, 0]


@pytest.mark.vmx_known_difference("init-stays-pending-behind-its-exit")
def test_an_init_exits_once(vmxlab):
    """Vol. 3C, 26.2: the exit is all that the INIT does; L2 goes on behind it."""
    run = vmxlab.run(
        Case(
            program=f"{sends(INIT)}; hlt",
            ept=with_apic(),
            reactions=[on(ExitReason.INIT_SIGNAL, times=1).resume()],
        )
    )
    assert run.reasons == [ExitReason.INIT_SIGNAL, ExitReason.HLT]


def in_inactive_state(state: ActivityState, *commands: int) -> Case:
    """L2 starts in that state, and is sent the commands some time after VM entry (or what looks like it)."""
    return Case(
        program="nop; hlt",
        fields={ACTIVITY: int(state)},
        second_program=when_l2_runs(*commands).replace("mov", "mov ecx, 50000; 1: pause; loop 1b; mov", 1),
        limits=Limits(l2_tsc=5_000_000),
        steps=before_entry(Store(machine_address(DATA), b"\x01")),
        watch=STATE,
    )


HLT_OR_SHUTDOWN = pytest.mark.parametrize(
    "state",
    [pytest.param(s, marks=in_state[s], id=s.name) for s in (ActivityState.HLT, ActivityState.SHUTDOWN)],
)


@HLT_OR_SHUTDOWN
def test_an_init_ends_hlt_and_shutdown(vmxlab, state):
    """Vol. 3C, 26.2 and 27.7.2: neither state blocks it."""
    (exit_,) = vmxlab.run(in_inactive_state(state, INIT)).exits
    check_plain(exit_, ExitReason.INIT_SIGNAL, PROGRAM)
    assert (exit_.rflags, exit_.watched[BLOCKING], exit_.watched[PENDING]) == (2, 0, 0)


@pytest.mark.vmx_known_difference("init-pending-at-entry-to-an-inactive-state")
@HLT_OR_SHUTDOWN
def test_an_init_that_is_pending_at_vm_entry_ends_them_too(vmxlab, state):
    """Vol. 3C, 26.2: VMX operation of L1 holds it back until then."""
    to_itself = (
        ApicWrite(ApicRegister.INTERRUPT_COMMAND_HIGH, 0),
        ApicWrite(ApicRegister.INTERRUPT_COMMAND_LOW, INIT),
    )
    case = Case(
        fields={ACTIVITY: int(state)}, steps=before_entry(*to_itself), limits=Limits(l2_tsc=5_000_000)
    )
    assert vmxlab.run(case).reasons == [ExitReason.INIT_SIGNAL]


@pytest.mark.vmx_known_difference("exit-from-an-inactive-state")
@HLT_OR_SHUTDOWN
def test_an_exit_by_init_saves_the_inactive_state(vmxlab, state):
    """Vol. 3C, 28.1 and 28.3.4: the return to the active state comes only after the exit."""
    (exit_,) = vmxlab.run(in_inactive_state(state, INIT)).exits
    assert exit_.watched[ACTIVITY] == state


# --- SIPI --------------------------------------------------------------------------------------------------


@in_state[ActivityState.WAIT_FOR_SIPI]
@pytest.mark.parametrize("vector", [0x00, 0x9F, 0xFF])
def test_a_sipi_in_wait_for_sipi_exits_with_its_vector(vmxlab, vector):
    """Vol. 3C, 26.2 and 28.2.1: the vector is in bits 7:0 of the qualification, the rest of it 0."""
    case = Case(program="nop; hlt", fields=WAITING, second_program=again_and_again(startup(vector)))
    (exit_,) = vmxlab.run(case).exits
    assert exit_.full_reason == ExitReason.SIPI
    assert exit_.qualification.vector == vector
    assert exit_.raw_qualification == vector
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert (exit_.rip, exit_.rflags) == (PROGRAM, 2)


@in_state[ActivityState.WAIT_FOR_SIPI]
@pytest.mark.vmx_known_difference("exit-from-an-inactive-state")
def test_a_sipi_exit_saves_the_wait_for_sipi_state(vmxlab):
    """Vol. 3C, 28.1 and 28.3.4: still waiting, and nothing blocked by anything else."""
    run = vmxlab.run(Case(fields=WAITING, second_program=again_and_again(startup(1)), watch=STATE))
    assert run.reasons == [ExitReason.SIPI]
    assert [run.exits[0].watched[field] for field in STATE] == [ActivityState.WAIT_FOR_SIPI, 0, 0]


def test_a_sipi_in_the_active_state_is_discarded(vmxlab):
    """Vol. 3C, 27.7.2: no exit; L2 sees that all of them have been sent."""
    commands = [startup(0x55)] * 20
    program = "mov byte ptr [DATA], 1; again: pause; cmp byte ptr [DATA], 2; jne again; hlt"
    case = Case(program=program, second_program=f"{when_l2_runs(*commands)}; mov byte ptr [DATA], 2")
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


@pytest.mark.vmx_known_difference("kvm-sipi-ends-hlt")
@HLT_OR_SHUTDOWN
def test_a_sipi_in_hlt_or_shutdown_is_discarded(vmxlab, state):
    """Vol. 3C, 27.7.2: only the INIT some time behind it ends the state."""
    case = in_inactive_state(state, *[startup(0x66)] * 5)
    later = f"mov ecx, 50000; 2: pause; loop 2b; mov {LOW}, {int(INIT):#x}"
    run = vmxlab.run(replace(case, second_program=f"{case.second_program}; {later}"))
    assert run.reasons == [ExitReason.INIT_SIGNAL]


@in_state[ActivityState.WAIT_FOR_SIPI]
@pytest.mark.parametrize("command", [FIXED | 0x44, INIT], ids=["external-interrupt", "init"])
def test_wait_for_sipi_blocks_interrupts_and_init(vmxlab, command):
    """Vol. 3C, 27.7.2: neither exits there, whatever the controls say; the SIPI does."""
    case = Case(
        fields={**WAITING, Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2},
        enable=PinControls.EXTERNAL_INTERRUPT_EXITING,
        steps=(SWITCH_ON, *before_entry(Store(machine_address(DATA), b"\x01"))),
        second_program=f"{when_l2_runs(command)}; {again_and_again(startup(0x12))}",
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.SIPI]
    assert run.exits[0].qualification.vector == 0x12


@in_state[ActivityState.WAIT_FOR_SIPI]
@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_wait_for_sipi_blocks_nmis(vmxlab):
    """Vol. 3C, 27.7.2. An exit by an NMI before it blocks NMIs in L1, for one that comes too early."""
    then = (
        on(ExitReason.EXCEPTION_OR_NMI, times=1)
        .vmwrite(ACTIVITY, int(ActivityState.WAIT_FOR_SIPI))
        .vmwrite(BLOCKING, 0)
        .write(machine_address(DATA), b"\x01")
        .resume()
    )
    case = Case(
        program=f"{sends(NMI)}; hlt",
        ept=with_apic(),
        enable=PinControls.NMI_EXITING,
        reactions=[then],
        second_program=f"{when_l2_runs(NMI)}; {again_and_again(startup(0x12))}",
    )
    assert vmxlab.run(case).reasons == [ExitReason.EXCEPTION_OR_NMI, ExitReason.SIPI]


def test_l2_and_the_second_processor_share_memory(vmxlab):
    """What these tests stand on: [DATA] of both is the same byte."""
    mine = "mov byte ptr [DATA], 1; 1: pause; cmp byte ptr [DATA], 2; jne 1b; mov eax, [DATA + 4]; hlt"
    its = "1: pause; cmp byte ptr [DATA], 1; jne 1b; mov dword ptr [DATA + 4], 77; mov byte ptr [DATA], 2"
    run = vmxlab.run(Case(program=mine, second_program=its))
    assert run.exits[0].registers["rax"] == 77
    assert run.outcome("second-processor").ok
