"""UMWAIT, TPAUSE, UMONITOR and RDPID in L2 (SDM Vol. 3C, 26.1.3 and 26.3)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, PrimaryControls, SecondaryControls
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector

P, S = PrimaryControls, SecondaryControls
WAITS = pytest.mark.parametrize("name", ["umwait", "tpause"])
REGISTERS = {name: 2 * i for i, name in enumerate(GENERAL_REGISTERS)} | {"rsp": 0x7000}


@pytest.mark.vmx_needs(S.ENABLE_USER_WAIT_AND_PAUSE)
@WAITS
def test_user_waits_exit_by_rdtsc_exiting(vmxlab, name):
    """Vol. 3C, 26.1.3 and table 28-13: with "enable user wait and pause" and "RDTSC exiting"; bits 6:3."""
    registers = ["eax", "ebx", "edi", "r9d", "r15d"]
    program = "; ".join(f"{name} {register}" for register in registers)
    enable = (S.ENABLE_USER_WAIT_AND_PAUSE, P.RDTSC_EXITING)
    run = vmxlab.run(Case(program=f"{program}; hlt", enable=enable, registers=REGISTERS))
    assert run.reasons == [ExitReason[name.upper()]] * len(registers) + [ExitReason.HLT]
    for number, exit_, following in zip((0, 3, 7, 9, 15), run.exits, run.exits[1:], strict=False):
        assert exit_.full_reason == ExitReason[name.upper()]
        assert exit_.instruction_information.register == number
        assert exit_.instruction_length == following.rip - exit_.rip
        assert exit_.raw_qualification == 0
        assert exit_.registers == REGISTERS


@pytest.mark.vmx_needs(S.ENABLE_USER_WAIT_AND_PAUSE)
@WAITS
def test_user_waits_are_executed_without_rdtsc_exiting(vmxlab, name):
    """Vol. 3C, 26.1.3: with a deadline that has passed they end at once."""
    case = Case(program=f"{name} eax; hlt", enable=S.ENABLE_USER_WAIT_AND_PAUSE, disable=P.RDTSC_EXITING)
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


@pytest.mark.parametrize("instruction", ["umwait eax", "tpause ebx", "umonitor rax"])
@pytest.mark.parametrize("exiting", [False, True])
def test_without_the_control_they_are_undefined(vmxlab, instruction, exiting):
    """Vol. 3C, 26.3: with "enable user wait and pause" 0 they are #UD, before "RDTSC exiting"."""
    run = vmxlab.run(Case(program=f"nop; {instruction}; hlt", enable=P.RDTSC_EXITING if exiting else ()))
    assert run.exits[0].full_reason == ExitReason.EXCEPTION_OR_NMI
    assert run.exits[0].interruption.vector == Vector.UD
    assert run.exits[0].rip == PROGRAM + 1


def test_rdpid_is_undefined_without_enable_rdtscp(vmxlab):
    """Vol. 3C, 26.3: "enable RDTSCP" 0 makes RDPID #UD too."""
    run = vmxlab.run(Case(program="nop; rdpid rax; hlt"))
    assert run.exits[0].interruption.vector == Vector.UD
    assert run.exits[0].rip == PROGRAM + 1
