"""#DB as an exit: breakpoints, single steps, and the exit qualification (SDM Vol. 3C, 28.2.1)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, PrimaryControls
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import DR6, RFLAGS, Vector

from .guest_setups import handled, merged

ENABLED = {0: 1 << 0, 1: 1 << 2, 2: 1 << 4, 3: 1 << 6}
"""Bits L0 to L3 of DR7."""
EXECUTE, WRITE, READ_WRITE = 0b00, 0b01, 0b11
LENGTHS = {1: 0b00, 2: 0b01, 4: 0b11, 8: 0b10}
DR7_FIXED = 1 << 10
BREAKPOINTS = int(DR6.B0 | DR6.B1 | DR6.B2 | DR6.B3)


def breakpoint_program(number: int, address: int, kind: int, size: int, access: str) -> str:
    dr7 = DR7_FIXED | ENABLED[number] | (LENGTHS[size] << 2 | kind) << 16 + 4 * number
    loads = f"movabs rax, {address:#x}; mov dr{number}, rax; movabs rax, {dr7:#x}; mov dr7, rax"
    return f"{loads}; {access}; nop; hlt"


def run_with_breakpoint(vmxlab, number: int, address: int, kind: int, size: int, access: str, **more):
    program = breakpoint_program(number, address, kind, size, access)
    return vmxlab.run(Case(program=program, disable=PrimaryControls.MOV_DR_EXITING, **more))


def check_debug_exception(run, *, rip: int, conditions: int) -> None:
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    event = exit_.interruption
    assert (event.vector, event.type) == (Vector.DB, InterruptionType.HARDWARE_EXCEPTION)
    assert not event.error_code_valid
    assert not exit_.idt_vectoring.valid
    # Table 28-1: of breakpoints whose condition is met, those that DR7 does not enable may be told as well.
    assert exit_.raw_qualification & conditions == conditions
    assert not exit_.raw_qualification & ~(conditions | BREAKPOINTS)
    assert exit_.rip == rip


CODE = PROGRAM + 2 * 10 + 2 * 3
"""Where `access` of the program starts."""


@pytest.mark.parametrize("number", ENABLED)
def test_a_data_breakpoint_is_a_trap(vmxlab, number):
    """Vol. 3C, Table 28-1, and Vol. 3B, 18.3.1.1: bit n of the qualification; RIP behind the instruction."""
    run = run_with_breakpoint(vmxlab, number, DATA, WRITE, 4, f"mov dword ptr [{DATA:#x}], 5")
    check_debug_exception(run, rip=CODE + 11, conditions=1 << number)


@pytest.mark.parametrize(("kind", "exits"), [(WRITE, False), (READ_WRITE, True)])
def test_a_read_meets_breakpoints_of_reads_alone(vmxlab, kind, exits):
    """Vol. 3B, 18.2.4: R/W of 01 is for writes, 11 for reads too."""
    run = run_with_breakpoint(vmxlab, 1, DATA + 4, kind, 4, f"mov ebx, [{DATA + 4:#x}]")
    if exits:
        check_debug_exception(run, rip=CODE + 7, conditions=2)
    else:
        assert run.reasons == [ExitReason.HLT]


@pytest.mark.parametrize("number", ENABLED)
def test_an_instruction_breakpoint_is_a_fault(vmxlab, number):
    """Vol. 3B, 18.3.1.1: it comes before the instruction is executed; RIP is at it."""
    run = run_with_breakpoint(vmxlab, number, CODE + 2, EXECUTE, 1, "mov bl, 7; mov bl, 9")
    check_debug_exception(run, rip=CODE + 2, conditions=1 << number)
    assert run.exits[0].registers["rbx"] == 7


def test_an_exit_leaves_dr6_alone_and_delivery_does_not(vmxlab):
    """Vol. 3C, 28.1: a #DB that exits does not change DR6; one that is delivered has its conditions there."""
    program = breakpoint_program(0, DATA, WRITE, 4, f"mov dword ptr [{DATA:#x}], 5")
    parts = handled(Vector.DB)
    handler = next(at for at in parts["data"] if at >= 0x1A000)
    parts["data"][handler] = bytes.fromhex("0f 21 f0 f4")  # mov rax, dr6; hlt
    run = vmxlab.run(
        Case(
            program=f"mov eax, 0xffff0ff0; mov dr6, rax; {program}",
            disable=PrimaryControls.MOV_DR_EXITING,
            **parts,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] & int(DR6.B0 | DR6.BS | DR6.BD) == DR6.B0


def test_a_single_step_and_a_breakpoint_are_told_together(vmxlab):
    """Vol. 3C, Table 28-1: the qualification has a bit for each condition that was met."""
    access = f"pushfq; or dword ptr [rsp], {int(RFLAGS.TF)}; popfq"
    store = f"mov dword ptr [{DATA:#x}], 5"
    program = breakpoint_program(2, DATA, WRITE, 4, f"{access}; {store}")
    # A store before all that: a hypervisor below may have to map the page, which is no matter of this test.
    run = vmxlab.run(Case(program=f"{store}; {program}", disable=PrimaryControls.MOV_DR_EXITING))
    # POPFQ itself is not followed by a trap: the step begins with the instruction behind it.
    check_debug_exception(run, rip=11 + CODE + 1 + 7 + 1 + 11, conditions=int(DR6.BS) | 1 << 2)


def test_delivery_of_a_single_step_clears_tf(vmxlab):
    """Vol. 3B, 18.3.1.4: the frame has TF set, the handler runs without; no exit on the way."""
    parts = merged(handled(Vector.DB), fields={Field.GUEST_RFLAGS: int(RFLAGS.TF | RFLAGS.FIXED1)})
    run = vmxlab.run(Case(program="nop; nop", **parts))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rdx"] & RFLAGS.TF
    assert not run.exits[0].rflags & RFLAGS.TF
