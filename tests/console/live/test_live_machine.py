"""Entries of a live machine, the handler, launch states, and what becomes of it."""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    InstructionError,
    IOBitmap,
    Limits,
    Mode,
    Resume,
    Skip,
    Stop,
    Verdict,
)
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.steps import Enter, Vmclear, Vmptrld, Vmxon, WriteVmcs
from vmxlab.errors import (
    CaseError,
    EntryFailed,
    ExitLimit,
    InstructionFailed,
    LiveStateLost,
    MachineError,
    ProgramError,
)
from vmxlab.image import layout
from vmxlab.sdm.registers import InterruptibilityState

THREE_EXITS = "cpuid; rdtsc; cpuid; vmcall; hlt"


# --- entering ----------------------------------------------------------------------------------------------


def test_state_stays_from_one_call_to_the_next(vm):
    vm.registers["rbx"] = 7
    exit_ = vm.enter("cpuid; add rbx, 1")
    assert (exit_.reason, exit_.rip, exit_.registers["rbx"]) == (ExitReason.CPUID, PROGRAM, 7)
    assert vm.rip == PROGRAM
    vm.skip()
    assert vm.rip == PROGRAM + 2
    vm.registers["rbx"] = 41
    exit_ = vm.resume()
    assert (exit_.reason, exit_.registers["rbx"]) == (ExitReason.HLT, 42)
    assert vm.registers["rbx"] == 42
    assert vm.last_exit is exit_
    assert vm.entries == 2


def test_behind_a_program_stands_a_hlt_whatever_was_there(vm):
    vm.enter("ud2; ud2; ud2; ud2")
    assert vm.enter("nop").rip == PROGRAM + 1


def test_machine_code_is_entered_as_it_is(vm):
    assert vm.enter(b"\x0f\xa2").reason is ExitReason.CPUID


def test_rsp_rip_and_rflags_are_fields(vm):
    vm.rsp, vm.rflags = 0x6000, 0x202
    assert vm.registers["rsp"] == 0x6000
    vm.registers["rsp"] = 0x5000
    vm.load("push rax")
    vm.rip = PROGRAM
    exit_ = vm.resume()
    assert exit_.registers["rsp"] == 0x4FF8
    assert exit_.rflags & 0x202 == 0x202


def test_the_names_of_registers_are_checked(vm):
    with pytest.raises(CaseError, match="no general register"):
        vm.registers["eax"] = 1
    with pytest.raises(CaseError, match="no general register"):
        _ = vm.registers["rip"]
    assert len(vm.registers) == len(list(vm.registers)) == 16


def test_a_skip_ends_blocking_by_sti(vm):
    vm.rflags = 0x202
    vm.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, InterruptibilityState.BLOCKING_BY_STI)
    assert vm.enter("cpuid").reason is ExitReason.CPUID
    assert vm.vmread(Field.GUEST_INTERRUPTIBILITY_STATE) == InterruptibilityState.BLOCKING_BY_STI
    vm.skip()
    assert vm.vmread(Field.GUEST_INTERRUPTIBILITY_STATE) == 0
    assert vm.rip == PROGRAM + 2


def test_a_program_that_does_not_assemble_changes_nothing(vm):
    with pytest.raises(ProgramError, match="mvo"):
        vm.enter("mvo eax, 1")
    assert vm.entries == 0
    assert vm.enter("hlt").rip == PROGRAM


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.REAL])
def test_programs_are_assembled_for_the_mode_of_the_case(lab, mode):
    with lab.live(Case(mode=mode)) as vm:
        assert vm.enter("mov ax, cs; push ax").reason is ExitReason.HLT


def test_a_watched_field_comes_with_each_exit(lab):
    with lab.live(Case(watch=[Field.GUEST_CR0])) as vm:
        assert vm.enter("hlt").watched[Field.GUEST_CR0] == vm.vmread(Field.GUEST_CR0)


# --- the handler -------------------------------------------------------------------------------------------


def test_a_handler_is_called_at_each_exit_and_decides(vm):
    seen = []

    def handler(exit, machine):
        seen.append(exit.reason)
        if exit.reason is ExitReason.VMCALL:
            machine.registers["rcx"] = 0x77
            machine.rip = exit.rip + exit.instruction_length
            return Resume
        return Skip() if exit.reason is ExitReason.CPUID else Stop

    exits = vm.enter(THREE_EXITS, handler=handler)
    assert [e.reason for e in exits] == seen
    assert seen == [ExitReason.CPUID, ExitReason.CPUID, ExitReason.VMCALL, ExitReason.HLT]
    assert [e.number for e in exits] == [0, 1, 2, 3]
    assert exits[-1].registers["rcx"] == 0x77


def test_none_stops_and_anything_else_is_a_mistake(vm):
    assert len(vm.enter("cpuid", handler=lambda exit, machine: None)) == 1
    with pytest.raises(CaseError, match="'skip'"):
        vm.enter("cpuid", handler=lambda exit, machine: "skip")
    assert vm.resume().reason is ExitReason.CPUID


def test_what_a_handler_raises_reaches_the_caller_and_the_machine_goes_on(vm):
    def handler(exit, machine):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vm.enter("cpuid", handler=handler)
    assert vm.resume().reason is ExitReason.CPUID


def test_a_handler_that_goes_on_for_ever_is_ended(vm):
    with pytest.raises(ExitLimit, match="after 5 exits") as caught:
        vm.enter("again: cpuid; jmp again", handler=lambda exit, machine: Skip, limit=5)
    assert len(caught.value.exits) == 5
    assert vm.resume().reason is ExitReason.CPUID


# --- launch state, and entries that fail -------------------------------------------------------------------


def test_launch_and_resume_follow_the_launch_state(vm):
    def entered_by():
        vm.enter("hlt")
        return vm.link.recent[-1].entry.operation

    assert not vm.launched
    assert [entered_by(), entered_by()] == ["vmlaunch", "vmresume"]
    assert vm.launched
    vm.vmclear()
    assert not vm.launched
    vm.vmptrld()
    assert [entered_by(), entered_by()] == ["vmlaunch", "vmresume"]
    with pytest.raises(EntryFailed) as caught:
        vm.enter(resume=False)
    assert caught.value.outcome.error is InstructionError.VMLAUNCH_NON_CLEAR_VMCS


def test_a_failed_entry_names_the_broken_rules(vm):
    vm.vmwrite(Field.HOST_CR0, 0)
    with pytest.raises(EntryFailed, match="host-cr0-fixed") as caught:
        vm.enter("hlt")
    assert caught.value.outcome.error is InstructionError.ENTRY_INVALID_HOST_STATE
    assert [broken.rule.name for broken in caught.value.broken] == ["host-cr0-fixed"]
    assert caught.value.last_record


def test_a_late_failure_names_them_too_and_the_next_try_launches(vm):
    rights = vm.vmread(Field.GUEST_CS_ACCESS_RIGHTS)
    vm.vmwrite(Field.GUEST_CS_ACCESS_RIGHTS, rights & ~0x80)
    with pytest.raises(EntryFailed, match="guest-cs-present") as caught:
        vm.enter("hlt")
    assert caught.value.exit.reason is ExitReason.ENTRY_FAILURE_GUEST_STATE
    assert caught.value.exit.entry_failed
    assert not vm.launched
    vm.vmwrite(Field.GUEST_CS_ACCESS_RIGHTS, rights)
    assert vm.resume().reason is ExitReason.HLT


def test_rules_look_into_the_machine_s_memory(vm):
    """SDM Vol. 3C, 27.4: MSR loading fails at the second entry, whose reserved bits are not 0."""
    vm.memory.write(layout.FREE_PAGES, bytes(16) + b"\x74\x01\0\0\x01\0\0\0" + bytes(8))
    vm.memory.write_u32(layout.FREE_PAGES, 0x174)
    vm.vmwrite_all({Field.ENTRY_MSR_LOAD_ADDRESS: layout.FREE_PAGES, Field.ENTRY_MSR_LOAD_COUNT: 2})
    with pytest.raises(EntryFailed) as caught:
        vm.enter("hlt")
    assert caught.value.exit.reason is ExitReason.ENTRY_FAILURE_MSR_LOADING
    assert caught.value.exit.raw_qualification == 2
    assert len(caught.value.broken) == 1


def test_without_a_vmcs_an_entry_says_so(vm):
    vm.vmclear()
    with pytest.raises(EntryFailed, match="VMfailInvalid"):
        vm.resume()
    with pytest.raises(InstructionFailed, match="vmptrld"):
        vm.snapshot()


def test_a_failure_in_a_handler_s_loop_shows_the_exits_before_it(vm):
    def handler(exit, machine):
        machine.vmwrite(Field.HOST_CR0, 0)
        return Skip

    with pytest.raises(EntryFailed) as caught:
        vm.enter("cpuid", handler=handler)
    assert [e.reason for e in caught.value.exits] == [ExitReason.CPUID]


# --- beginning and end -------------------------------------------------------------------------------------


def test_a_case_undoes_it_and_it_can_begin_anew(lab, vm):
    vm.io_bitmap.set_intercept(0x60, True)
    vm.enter("in al, 0x60")
    run = lab.run(Case(program="vmxoff; hlt"))
    assert (run.verdict, run.reasons) == (Verdict.PASS, [ExitReason.VMXOFF, ExitReason.HLT])
    with pytest.raises(LiveStateLost, match="has run a case"):
        vm.resume()
    assert "restart" in repr(vm)
    vm.restart()
    assert vm.enter("in al, 0x60").reason is ExitReason.HLT, "as at the start"
    assert (vm.entries, vm.registers["rcx"]) == (1, 0)


def test_another_live_machine_takes_over(lab, vm):
    with lab.live() as other:
        assert other.enter("hlt").reason is ExitReason.HLT
        with pytest.raises(LiveStateLost):
            vm.resume()
    with pytest.raises(LiveStateLost, match="closed"):
        other.resume()


def test_a_machine_that_dies_is_told_of_once_and_then_referred_to(lab, vm):
    vm.vmwrite(Field.HOST_CR3, 0x3F00000)
    log = vm.log_path
    with pytest.raises(MachineError, match="triple fault") as caught:
        vm.enter("hlt")
    assert caught.value.last_record
    assert caught.value.log_path == log
    with pytest.raises(LiveStateLost, match="triple fault") as caught:
        vm.resume()
    assert caught.value.log_path == log
    vm.restart()
    assert vm.enter("hlt").reason is ExitReason.HLT
    assert vm.log_path != log
    assert lab.run(Case()).verdict is Verdict.PASS


def test_l2_that_runs_away_is_ended_by_the_preemption_timer(lab):
    with lab.live(Case(limits=Limits(l2_tsc=100_000))) as vm:
        assert vm.enter("jmp .").reason is ExitReason.PREEMPTION_TIMER


def test_steps_of_the_case_are_taken_up_to_its_entry(lab):
    steps = [Vmxon(), Vmclear(), Vmptrld(), WriteVmcs(), Enter(), Vmclear()]
    with lab.live(Case(steps=steps)) as vm:
        assert vm.enter("hlt").reason is ExitReason.HLT
    with lab.live(Case(steps=[Vmxon(), Enter()])) as vm:
        assert not vm.vmptrst().value + 1 & (1 << 64) - 1
        assert "no current VMCS" in repr(vm)


def test_a_set_up_that_fails_raises_what_failed(lab):
    with pytest.raises(InstructionFailed, match="VMCLEAR"):
        lab.live(Case(steps=[Vmxon(), Vmclear(layout.VMXON_REGION)]))
    with lab.live() as vm:
        assert vm.enter("hlt").reason is ExitReason.HLT


def test_the_log_tells_all_of_it_again(lab, vm):
    """Every run can be rebuilt from the serial log alone."""
    from vmxlab.console.rebuild import runs_from_records
    from vmxlab.console.records import parse_log

    vm.io_bitmap = IOBitmap.intercept_all()
    exit_ = vm.enter("in al, 0x60")
    records, broken = parse_log(vm.log_path.read_bytes())
    assert not broken
    assert runs_from_records(records)[-1].exits == (exit_,)
