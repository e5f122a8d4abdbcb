"""How a case ends: by L2's own fault, by the preemption timer, by a limit, or because L1 did not survive.

SDM Vol. 3C, 26.2 (triple fault), 26.5.1 and 27.7.4 (preemption timer), 28.5 (host state), 28.7 (VMX abort).
The rest is the harness's own promise: a case never takes the next one down.
"""

from __future__ import annotations

import time

import pytest

from vmxlab import (
    Case,
    End,
    ExitControls,
    ExitReason,
    Field,
    Limits,
    Mode,
    Msr,
    OutcomeKind,
    PinControls,
    PrimaryControls,
    Run,
    SecondaryControls,
    Verdict,
)
from vmxlab.cases.memory import PROGRAM
from vmxlab.errors import MachineDied, MachineError, MachineHung
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.registers import CR0, CR4, ActivityState

TIMER = PinControls.ACTIVATE_PREEMPTION_TIMER

NOWHERE = 0x7FFF_DEAD_0000
"""A canonical linear address at which the monitor has mapped nothing."""

EPTP_TO_NOTHING = 1 << 32 | 3 << 3 | 6
"""Paging structures at 4 GiB, where no engine's machine has memory: four levels, write-back."""


def assert_next_case_runs(vmxlab) -> None:
    run = vmxlab.run(Case(program="cpuid; hlt"))
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert run.verdict is Verdict.PASS


# --- triple fault ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    ["ud2", "xor eax, eax; div eax", "mov rax, [1 << 62]", "int3"],
    ids=["ud", "de", "gp", "bp"],
)
def test_a_fault_that_can_not_be_delivered_is_a_triple_fault(vmxlab, program):
    """Vol. 3C, 26.2: faults with clear exception-bitmap bits and no IDT: reason 2, qualification 0.

    L2's RIP is that of the instruction (28.3.3), and no event is reported (28.2.2 and 28.2.4 speak of none).
    """
    run = vmxlab.run(Case(program=f"nop; {program}", fields={Field.EXCEPTION_BITMAP: 0}))
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.TRIPLE_FAULT]
    assert run.exits[0].raw_qualification == 0
    assert not run.exits[0].interruption.valid
    assert run.exits[0].rip >= PROGRAM + 1
    assert run.end is End.STOP


@pytest.mark.parametrize("mode", Mode)
def test_a_triple_fault_exits_in_each_mode(vmxlab, mode):
    """Vol. 3C, 26.2: an IDT (in real mode: IVT) with limit 0 can deliver nothing."""
    fields = {Field.EXCEPTION_BITMAP: 0, Field.GUEST_IDTR_LIMIT: 0}
    run = vmxlab.run(Case(program="ud2", mode=mode, fields=fields))
    assert run.reasons == [ExitReason.TRIPLE_FAULT]
    assert run.exits[0].rip == PROGRAM


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_a_triple_fault_leaves_l1_alone(vmxlab):
    """Vol. 3C, 26.2: a triple fault in L2 is an exit, not a shutdown."""
    vmxlab.run(Case(program="ud2", fields={Field.EXCEPTION_BITMAP: 0}))
    assert_next_case_runs(vmxlab)


# --- the preemption timer ----------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.vmx_needs(TIMER)
@pytest.mark.parametrize("mode", Mode)
def test_the_preemption_timer_ends_a_loop(vmxlab, mode):
    """Vol. 3C, 26.5.1 and 28.2.1: reason 52, nothing in the qualification, RIP within the loop."""
    case = Case(program="again: inc ecx; jmp again", mode=mode, limits=Limits(l2_tsc=5_000_000))
    run = vmxlab.run(case)
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.PREEMPTION_TIMER]
    exit_ = run.exits[0]
    assert exit_.raw_qualification == 0
    assert not exit_.interruption.valid
    assert PROGRAM <= exit_.rip < PROGRAM + 8
    assert exit_.registers["rcx"] > 0
    assert run.end is End.STOP


@pytest.mark.vmx_needs(TIMER)
def test_a_longer_timer_lets_l2_run_longer(vmxlab):
    """Vol. 3C, 26.5.1: the timer counts down in proportion to the TSC."""
    program = "again: inc rcx; jmp again"
    short, long = (
        vmxlab.run(Case(program=program, limits=Limits(l2_tsc=ticks))).exits[0].registers["rcx"]
        for ticks in (200_000, 5_000_000)
    )
    assert short < long


@pytest.mark.vmx_needs(TIMER)
@pytest.mark.parametrize("state", [ActivityState.ACTIVE, ActivityState.HLT])
def test_a_timer_of_zero_exits_before_the_first_instruction(vmxlab, state):
    """Vol. 3C, 27.7.4: with 0 in the field the exit comes at once, before any instruction and out of HLT."""
    if state not in vmxlab.capabilities.misc.activity_states:
        pytest.skip("the processor lacks the HLT activity state (IA32_VMX_MISC[6] is 0)")
    fields = {Field.VMX_PREEMPTION_TIMER_VALUE: 0, Field.GUEST_ACTIVITY_STATE: state}
    case = Case(program="inc ecx; vmcall", fields=fields, watch=[Field.GUEST_ACTIVITY_STATE])
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.PREEMPTION_TIMER]
    assert run.exits[0].rip == PROGRAM
    assert run.exits[0].registers["rcx"] == 0
    assert run.exits[0].watched[Field.GUEST_ACTIVITY_STATE] == state


@pytest.mark.vmx_needs(TIMER)
def test_the_timer_is_saved_only_with_its_control(vmxlab):
    """Vol. 3C, 28.3.1: "save VMX-preemption timer value" stores what is left; without it the field stays."""
    start = 0x1000_0000
    field = Field.VMX_PREEMPTION_TIMER_VALUE
    program = "vmcall; mov ecx, 10000; again: loop again; vmcall; hlt"
    run = vmxlab.run(Case(program=program, fields={field: start}, watch=[field]))
    assert [exit_.watched[field] for exit_ in run.exits] == [start] * 3
    if not vmxlab.capabilities.supports(ExitControls.SAVE_PREEMPTION_TIMER_VALUE):
        return
    enable = ExitControls.SAVE_PREEMPTION_TIMER_VALUE
    run = vmxlab.run(Case(program=program, fields={field: start}, watch=[field], enable=enable))
    left = [exit_.watched[field] for exit_ in run.exits]
    assert start >= left[0] > left[2]
    assert left == sorted(left, reverse=True)


@pytest.mark.vmx_needs(TIMER)
def test_a_saved_timer_of_zero_is_what_the_timer_exit_leaves(vmxlab):
    """Vol. 3C, 28.3.1 and 26.5.1: when the timer itself caused the exit, 0 is saved."""
    case = Case(
        program="again: jmp again",
        enable=ExitControls.SAVE_PREEMPTION_TIMER_VALUE,
        watch=[Field.VMX_PREEMPTION_TIMER_VALUE],
        limits=Limits(l2_tsc=100_000),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.PREEMPTION_TIMER]
    assert run.exits[0].watched[Field.VMX_PREEMPTION_TIMER_VALUE] == 0


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [1, 3, 50])
def test_the_exit_limit_ends_a_case(vmxlab, exits):
    """`Limits.exits`: after so many exits the case ends, however L2 goes on."""
    run = vmxlab.run(Case(program="again: cpuid; jmp again", limits=Limits(exits=exits)))
    assert run.reasons == [ExitReason.CPUID] * exits
    assert run.end is End.LIMIT
    assert run.verdict is Verdict.PASS


def test_a_program_without_an_end_is_stopped_by_the_exit_limit(vmxlab):
    """A program that runs off its code into zeros faults or exits; a limit stands behind all of it."""
    run = vmxlab.run(Case(program="nop", limits=Limits(exits=5)))
    assert run.exits
    assert run.end in (End.STOP, End.LIMIT)


def test_an_l2_that_never_exits_is_a_crash_at_the_deadline(vmxlab):
    """With no timer and no exit only the host's deadline ends it: MachineHung, and what arrived is kept."""
    hanging = Case(program="again: jmp again", name="hangs", disable=TIMER, limits=Limits(seconds=0.5))
    with pytest.raises(MachineHung) as caught:
        vmxlab.run(hanging)
    run = caught.value.run
    assert run is not None
    assert (run.end, run.verdict) == (End.HUNG, Verdict.CRASH)
    assert run.outcome("vmptrld").ok
    assert run.exits == ()
    assert caught.value.case == "hangs"
    assert caught.value.last_record is not None
    assert caught.value.log_path is not None and caught.value.log_path.is_file()
    assert_next_case_runs(vmxlab)


def test_a_hanging_case_among_others_costs_only_itself(vmxlab):
    """Each case of a series has its own verdict, and the ones behind a crash run on a fresh machine."""
    assert vmxlab.capabilities  # skips where there is no VMX
    good = Case(program="vmcall; hlt")
    hanging = Case(program="again: jmp again", disable=TIMER, limits=Limits(seconds=0.5))
    runs = vmxlab.run_all([good, hanging, good])
    assert [run.verdict for run in runs] == [Verdict.PASS, Verdict.CRASH, Verdict.PASS]
    assert [run.end for run in runs] == [End.STOP, End.HUNG, End.STOP]


# --- L1 does not survive -----------------------------------------------------------------------------------


def run_fatal(vmxlab, case: Case) -> tuple[MachineError, Run]:
    """The error of a case that must kill the machine, well before its deadline."""
    start = time.monotonic()
    with pytest.raises(MachineDied) as caught:
        vmxlab.run(case)
    assert time.monotonic() - start < 10  # a dead machine is noticed, not waited for (20 s)
    assert caught.value.run is not None
    return caught.value, caught.value.run


def test_a_host_state_that_can_not_run_is_a_crash_of_that_case_alone(vmxlab):
    """Vol. 3C, 28.5: an exit into page tables that map nothing triple-faults L1; the next case runs."""
    case = Case(name="no-page-tables", fields={Field.HOST_CR3: FREE_PAGES})
    error, run = run_fatal(vmxlab, case)
    assert (run.end, run.verdict) == (End.DIED, Verdict.CRASH)
    assert error.case == "no-page-tables"
    assert error.log_path is not None and error.log_path.is_file()
    assert error.last_record is not None
    assert_next_case_runs(vmxlab)


def test_a_vmx_abort_is_noticed_at_once(vmxlab):
    """Vol. 3C, 28.6 and 28.7: failing to load an MSR at an exit is a VMX abort: the processor is dead."""
    entry = int(Msr.IA32_FS_BASE).to_bytes(4, "little") + bytes(12)
    fields = {Field.EXIT_MSR_LOAD_COUNT: 1, Field.EXIT_MSR_LOAD_ADDRESS: FREE_PAGES}
    _, run = run_fatal(vmxlab, Case(fields=fields, memory={FREE_PAGES: entry}))
    assert (run.end, run.verdict) == (End.DIED, Verdict.CRASH)
    assert_next_case_runs(vmxlab)


def test_crashes_among_cases_of_one_image_cost_only_themselves(vmxlab):
    """What holds for cases sent to a machine holds for those of an image: the rest are booted again."""
    good = Case(program="vmcall; hlt")
    fatal = Case(fields={Field.HOST_CR3: FREE_PAGES})
    runs = vmxlab.run_image([good, fatal, good])
    assert [run.verdict for run in runs] == [Verdict.PASS, Verdict.CRASH, Verdict.PASS]
    assert [run.reasons for run in (runs[0], runs[2])] == [[ExitReason.VMCALL, ExitReason.HLT]] * 2


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_an_eptp_to_no_memory_costs_no_other_case(vmxlab):
    """What is read where there is no memory is the platform's; KVM 6.1 gives the whole machine up."""
    lost, good = vmxlab.run_all([Case(eptp=EPTP_TO_NOTHING), Case()])
    assert lost.verdict in (Verdict.PASS, Verdict.CRASH)
    assert lost.reasons in ([], [ExitReason.EPT_MISCONFIGURATION], [ExitReason.EPT_VIOLATION])
    assert good.reasons == [ExitReason.HLT]


@pytest.mark.parametrize("address", [NOWHERE, FREE_PAGES], ids=["unmapped", "undefined-code"])
def test_an_exit_to_a_wrong_address_is_a_fault_in_l1_that_is_survived(vmxlab, address):
    """Vol. 3C, 28.5: HOST_RIP is where L1 goes on; what it finds there faults, and the monitor lives on."""
    run = vmxlab.run(Case(fields={Field.HOST_RIP: address}, memory={FREE_PAGES: b"\x0f\x0b"}))
    assert run.end is End.FAULT
    assert [fault.rip for fault in run.faults] == [address]
    assert run.exits == ()
    assert_next_case_runs(vmxlab)


SURVIVABLE = {
    "GDTR": {Field.HOST_GDTR_BASE: NOWHERE},
    "IDTR": {Field.HOST_IDTR_BASE: NOWHERE},
    "TR": {Field.HOST_TR_BASE: NOWHERE},
    "FS and GS": {Field.HOST_FS_BASE: NOWHERE, Field.HOST_GS_BASE: 0xFFFF_8000_0000_0000},
    "RSP zero": {Field.HOST_RSP: 0},
    "RSP not canonical": {Field.HOST_RSP: 1 << 63},
    "selectors": {
        Field.HOST_CS_SELECTOR: 0xFFF8,
        Field.HOST_SS_SELECTOR: 0,
        Field.HOST_DS_SELECTOR: 0x1230,
        Field.HOST_ES_SELECTOR: 0,
        Field.HOST_FS_SELECTOR: 0x4560,
        Field.HOST_GS_SELECTOR: 0,
        Field.HOST_TR_SELECTOR: 0x7F8,
    },
    "SYSENTER": {
        Field.HOST_IA32_SYSENTER_CS: 0xFFFF_FFFF,
        Field.HOST_IA32_SYSENTER_ESP: NOWHERE,
        Field.HOST_IA32_SYSENTER_EIP: NOWHERE,
    },
}


@pytest.mark.parametrize("fields", SURVIVABLE.values(), ids=[name.replace(" ", "-") for name in SURVIVABLE])
def test_odd_host_state_is_survived(vmxlab, fields):
    """Vol. 3C, 28.5.2 to 28.5.4: an exit loads these as they are; the monitor makes its own state again."""
    run = vmxlab.run(Case(program="cpuid; vmcall; hlt", fields=fields))
    assert run.reasons == [ExitReason.CPUID, ExitReason.VMCALL, ExitReason.HLT]
    assert run.end is End.STOP
    assert_next_case_runs(vmxlab)


def test_odd_control_registers_of_the_host_are_survived(vmxlab):
    """Vol. 3C, 28.5.1: HOST_CR0 and HOST_CR4 are loaded at each exit, and put right by the monitor."""
    capabilities = vmxlab.capabilities
    cr0 = CR0.PG | CR0.PE | CR0.NE | CR0.ET | CR0.TS | CR0.EM | CR0.AM | capabilities.cr0_fixed0
    cr4 = CR4.PAE | CR4.VMXE | CR4.TSD | CR4.DE | CR4.PGE | capabilities.cr4_fixed0
    fields = {Field.HOST_CR0: int(cr0), Field.HOST_CR4: int(cr4)}
    run = vmxlab.run(Case(program="cpuid; hlt", fields=fields))
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert_next_case_runs(vmxlab)


# --- the end of a case -------------------------------------------------------------------------------------


def test_every_case_starts_from_the_same_state(vmxlab):
    """What one case did to L2's memory, registers and VMCS is not there in the next."""
    dirty = Case(
        program="mov qword ptr [DATA], -1; mov rbx, -1; mov r15, -1; vmcall",
        registers={"rdi": 0x55},
        fields={Field.GUEST_IA32_SYSENTER_CS: 0x1234},
    )
    vmxlab.run(dirty)
    run = vmxlab.run(Case(program="mov rax, [DATA]; hlt", watch=[Field.GUEST_IA32_SYSENTER_CS]))
    assert run.exits[0].registers == dict.fromkeys(run.exits[0].registers, 0) | {"rsp": 0x7FF0}
    assert run.exits[0].watched[Field.GUEST_IA32_SYSENTER_CS] == 0


def test_a_case_that_fails_to_enter_ends_and_the_next_runs(vmxlab):
    """A VMfail of VMLAUNCH is an outcome: the case ends with it."""
    run = vmxlab.run(Case(fields={Field.CR3_TARGET_COUNT: 0xFFFF}))
    assert run.end is End.VMFAIL
    assert run.entry is not None and run.entry.kind is OutcomeKind.FAIL_VALID
    assert run.exits == ()
    assert_next_case_runs(vmxlab)


def test_hlt_without_exiting_and_without_a_timer_hangs_no_longer_than_the_deadline(vmxlab):
    """HLT with interrupts off and nothing to wake it: the deadline ends it, though nothing executes."""
    disable = (TIMER, PrimaryControls.HLT_EXITING)
    with pytest.raises(MachineHung):
        vmxlab.run(Case(program="hlt", disable=disable, limits=Limits(seconds=0.5)))
    assert_next_case_runs(vmxlab)
