"""Single steps: where they end, by what, and that nothing of them is left."""

from __future__ import annotations

import pytest

from vmxlab import ExitReason, Field, Lab, PrimaryControls, StepBy
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.console.live import stepping
from vmxlab.errors import MissingCapability, OutOfRange
from vmxlab.sdm.registers import InterruptibilityState

STATE = (
    Field.GUEST_RFLAGS,
    Field.EXCEPTION_BITMAP,
    Field.GUEST_PENDING_DEBUG_EXCEPTIONS,
    Field.PRIMARY_PROCESSOR_BASED_CONTROLS,
)


def at_start(vm, program: str) -> dict[Field, int]:
    vm.load(program)
    vm.rip = PROGRAM
    return {field: vm.vmread(field) for field in STATE}


def test_each_step_is_one_instruction_and_leaves_nothing(vm):
    before = at_start(vm, "nop; mov eax, 5; push rax; call 1f; 1: pop rcx; pop rdx")
    for length in (1, 6, 7, 12, 13, 14):
        stepped = vm.step()
        assert (stepped.by, stepped.complete) == (StepBy.TRAP_FLAG, True)
        assert stepped.exit.rip == vm.rip == PROGRAM + length
        assert {field: vm.vmread(field) for field in STATE} == before
    assert vm.registers["rdx"] == 5
    assert str(stepped) == f"1 step by RFLAGS.TF, RIP {PROGRAM + 14:#x}"


def test_many_steps_end_at_an_instruction_that_exits_by_itself(vm):
    before = at_start(vm, "nop; nop; cpuid; nop")
    stepped = vm.step(5)
    assert [e.rip - PROGRAM for e in stepped.exits] == [1, 2, 2]
    assert not stepped.complete
    assert stepped.exit.reason is ExitReason.CPUID
    assert str(stepped).startswith("2 steps by RFLAGS.TF")
    assert {field: vm.vmread(field) for field in STATE} == before
    vm.skip()
    assert vm.step().complete
    with pytest.raises(OutOfRange):
        vm.step(0)


def test_a_fault_is_an_exit_of_its_own(vm):
    before = at_start(vm, "ud2")
    stepped = vm.step()
    assert (stepped.complete, stepped.exit.interruption.vector) == (False, 6)
    assert {field: vm.vmread(field) for field in STATE} == before


def test_a_step_ends_the_shadow_of_sti_and_mov_ss_holds_the_trap_back(vm):
    """SDM Vol. 3C, 27.3.1.5: with TF and blocking by STI, VM entry would want a pending trap. Vol. 3A, 6.8.3:
    behind MOV SS the trap comes only after the next instruction."""
    at_start(vm, "mov ax, ss; mov ss, ax; nop; sti; nop; cli")
    assert [e.rip - PROGRAM for e in vm.step(5).exits] == [3, 6, 7, 8, 9]


def test_the_shadow_stays_where_the_instruction_is_still_to_come(vm):
    at_start(vm, "cpuid")
    vm.rflags = 0x202
    vm.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, InterruptibilityState.BLOCKING_BY_STI)
    assert not vm.step().complete
    assert vm.vmread(Field.GUEST_INTERRUPTIBILITY_STATE) == InterruptibilityState.BLOCKING_BY_STI


def test_l2_is_entered_without_the_shadow(vm):
    """SDM Vol. 3C, 27.3.1.5. Bochs checks it not: known difference entry-pending-single-step-not-checked."""
    at_start(vm, "nop")
    vm.rflags = 0x202
    vm.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, InterruptibilityState.BLOCKING_BY_STI)
    assert vm.step().complete
    entered = next(run for run in vm.link.recent if run.exits)
    at_entry = next(record for record in entered.records if record.kind == "snapshot")
    assert at_entry.values[f"f{int(Field.GUEST_INTERRUPTIBILITY_STATE):04x}"] == "0x0"
    assert at_entry.values[f"f{int(Field.GUEST_RFLAGS):04x}"] == "0x302"


def test_tf_and_the_exception_bitmap_are_put_back_as_they_were(vm):
    vm.vmwrite(Field.EXCEPTION_BITMAP, 0)
    at_start(vm, "nop; nop")
    assert vm.step().complete
    assert vm.vmread(Field.EXCEPTION_BITMAP) == 0
    vm.rflags = 0x102
    assert vm.step().complete
    assert vm.rflags == 0x102


def test_a_step_is_a_step_of_a_string_instruction(vm):
    at_start(vm, "rep stosb")
    vm.registers["rcx"], vm.registers["rdi"] = 3, DATA
    assert [e.registers["rcx"] for e in vm.step(2).exits] == [2, 1]


def test_the_monitor_trap_flag_is_not_taken_where_it_is_lacking(vm):
    with pytest.raises(MissingCapability, match="MONITOR_TRAP_FLAG"):
        vm.step(by=StepBy.MONITOR_TRAP_FLAG)


def test_the_monitor_trap_flag_is_not_trusted_where_it_is_known_to_do_nothing(tmp_path, monkeypatch):
    """Where Bochs's flag begins to work, the known difference goes, and so does the last line here."""
    with Lab("bochs", model="corei7_icelake_u", log_dir=tmp_path) as lab:
        vm = lab.live()
        assert vm.capabilities.supports(PrimaryControls.MONITOR_TRAP_FLAG)
        before = at_start(vm, "nop; nop")
        assert vm.step().by is StepBy.TRAP_FLAG
        monkeypatch.setattr(stepping, "KNOWN_DIFFERENCES", {})
        stepped = vm.step()
        assert stepped.by is StepBy.MONITOR_TRAP_FLAG
        assert {field: vm.vmread(field) for field in STATE} == before
        assert stepped.exit.reason is ExitReason.HLT
