"""PAUSE in loops: "PAUSE-loop exiting" with its gap and window (SDM Vol. 3C, 25.6.13 and 26.1.3)."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmxlab import Case, ExitReason, Field, PrimaryControls, SecondaryControls
from vmxlab.cases.case import Limits
from vmxlab.cases.memory import PROGRAM

from .guest_setups import user_mode

P, S = PrimaryControls, SecondaryControls
LONG = 0xFFFF_FFFF
GAP = 10_000
"""TSC ticks: more than a round of a loop takes, and less than L1 does between two entries."""
ROUNDS = 20_000
LOOP = f"mov ebx, {ROUNDS}; 1: inc eax; pause; dec ebx; jnz 1b; vmcall"
PAUSE_AT = PROGRAM + 7


def loop_case(*, gap: int, window: int, program: str = LOOP, **more) -> Case:
    return Case(
        program=program,
        enable=S.PAUSE_LOOP_EXITING,
        disable=P.PAUSE_EXITING,
        fields={Field.PLE_GAP: gap, Field.PLE_WINDOW: window, **more.pop("fields", {})},
        limits=Limits(exits=3),
        **more,
    )


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_a_loop_longer_than_the_window_exits(vmxlab):
    """Vol. 3C, 26.1.3: PAUSE exits where its loop, from the first PAUSE on, took longer than PLE_Window."""
    rounds = []
    for window in (500, 5000):
        run = vmxlab.run(loop_case(gap=GAP, window=window))
        assert run.reasons[0] is ExitReason.PAUSE
        exit_ = run.exits[0]
        assert exit_.full_reason == ExitReason.PAUSE
        assert (exit_.rip, exit_.instruction_length) == (PAUSE_AT, 2)
        assert exit_.raw_qualification == 0
        assert not exit_.interruption.valid
        assert exit_.registers["rax"] > 1  # the first PAUSE of a loop can't exit
        rounds.append(exit_.registers["rax"])
    assert rounds[0] < rounds[1]


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_a_loop_goes_on_behind_the_exit(vmxlab):
    """Vol. 3C, 26.1.3: VM entry starts anew: each exit needs another loop of that length."""
    run = vmxlab.run(loop_case(gap=GAP, window=500))
    assert run.reasons == [ExitReason.PAUSE] * 3
    counts = [0, *(exit_.registers["rax"] for exit_ in run.exits)]
    assert all(later - earlier > 1 for earlier, later in pairwise(counts))


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
@pytest.mark.vmx_known_difference("ple-first-pause-after-vm-entry")
def test_the_first_pause_behind_vm_entry_starts_a_loop(vmxlab):
    """Vol. 3C, 26.1.3: it is the first in a loop, however long the gap may be; it can't exit."""
    run = vmxlab.run(loop_case(gap=LONG, window=500))
    counts = [0, *(exit_.registers["rax"] for exit_ in run.exits)]
    assert 1 not in [later - earlier for earlier, later in pairwise(counts)]


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_a_loop_within_the_window_does_not_exit(vmxlab):
    """Vol. 3C, 26.1.3: below PLE_Window PAUSE is executed as ever."""
    assert vmxlab.run(loop_case(gap=LONG, window=LONG)).reasons[0] is ExitReason.VMCALL


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_pauses_farther_apart_than_the_gap_are_no_loop(vmxlab):
    """Vol. 3C, 26.1.3: more than PLE_Gap behind the last one, PAUSE is the first of a new loop."""
    program = "mov ebx, 50; 1: inc eax; pause; mov ecx, 2000; 2: dec ecx; jnz 2b; dec ebx; jnz 1b; vmcall"
    assert vmxlab.run(loop_case(gap=200, window=1000, program=program)).reasons[0] is ExitReason.VMCALL
    assert vmxlab.run(loop_case(gap=LONG, window=1000, program=program)).reasons[0] is ExitReason.PAUSE


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_loops_at_privilege_level_3_do_not_exit(vmxlab):
    """Vol. 3C, 26.1.3: "PAUSE-loop exiting" is ignored for CPL over 0."""
    assert vmxlab.run(loop_case(gap=LONG, window=500, **user_mode())).reasons[0] is ExitReason.VMCALL


@pytest.mark.vmx_needs(S.PAUSE_LOOP_EXITING)
def test_pause_exiting_comes_first(vmxlab):
    """Vol. 3C, 26.1.3: with "PAUSE exiting" 1 the first PAUSE exits, whatever gap and window are."""
    case = Case(
        program=LOOP,
        enable=(S.PAUSE_LOOP_EXITING, P.PAUSE_EXITING),
        fields={Field.PLE_GAP: LONG, Field.PLE_WINDOW: LONG},
        limits=Limits(exits=1),
    )
    run = vmxlab.run(case)
    assert run.exits[0].reason is ExitReason.PAUSE
    assert run.exits[0].registers["rax"] == 1


@pytest.mark.vmx_needs(S.ENABLE_EPT)
def test_pause_exits_at_privilege_level_3_by_its_own_control(vmxlab):
    """Vol. 3C, 26.1.3: "PAUSE exiting" is for any CPL."""
    run = vmxlab.run(Case(program="nop; pause", enable=P.PAUSE_EXITING, **user_mode()))
    assert run.exits[0].full_reason == ExitReason.PAUSE
    assert run.exits[0].rip == PROGRAM + 1
