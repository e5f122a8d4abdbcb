"""The monitor trap flag: exits on instruction boundaries (SDM Vol. 3C, 26.5.2 and 27.7.8)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, PrimaryControls, on
from vmxlab.cases.memory import DATA, IDT, PROGRAM, STACK_TOP
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.registers import DR6, RFLAGS, InterruptibilityState, Vector

from .guest_setups import gate, handled, handler_of, merged

MTF = PrimaryControls.MONITOR_TRAP_FLAG
pytestmark = pytest.mark.vmx_needs(MTF)

WATCH = [Field.GUEST_INTERRUPTIBILITY_STATE, Field.GUEST_PENDING_DEBUG_EXCEPTIONS]
STEP = [on(ExitReason.MONITOR_TRAP_FLAG).resume()]
PENDING_MTF = InterruptionInformation(0, InterruptionType.OTHER_EVENT).bits


def step_case(program: str, **more) -> Case:
    return Case(program=program, enable=MTF, watch=WATCH, reactions=STEP, **more)


def steps_of(run) -> list[int]:
    """Where the exits by the flag were, from PROGRAM on; checks all that is recorded for them."""
    exits = [exit_ for exit_ in run.exits if exit_.reason is ExitReason.MONITOR_TRAP_FLAG]
    for exit_ in exits:
        assert exit_.full_reason == ExitReason.MONITOR_TRAP_FLAG
        assert exit_.raw_qualification == 0
        assert not exit_.interruption.valid
        assert not exit_.idt_vectoring.valid
    return [exit_.rip - PROGRAM for exit_ in exits]


# --- single steps ------------------------------------------------------------------------------------------


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_each_instruction_is_one_step(vmxlab):
    """Vol. 3C, 26.5.2: where the first instruction causes no fault, the exit is on the boundary behind it."""
    program = "nop; mov eax, 5; lea rbx, [rax + 2]; push rbx; call 1f; 1: pop rcx; jmp 2f; ud2; 2: nop; hlt"
    run = vmxlab.run(step_case(program))
    assert steps_of(run) == [1, 6, 10, 11, 16, 17, 21, 22]
    assert run.exits[-1].reason is ExitReason.HLT
    assert run.exits[-1].rip == PROGRAM + 22
    assert [exit_.registers["rax"] for exit_ in run.exits[:3]] == [0, 5, 5]
    assert all(not any(exit_.watched.values()) for exit_ in run.exits)


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_an_instruction_that_exits_makes_no_step(vmxlab):
    """Vol. 3C, 26.5.2: an instruction that causes an exit has that one, and none by the flag."""
    program = "cpuid; vmcall; in al, 0x60; nop; hlt"
    run = vmxlab.run(step_case(program))
    assert run.reasons == [
        ExitReason.CPUID,
        ExitReason.VMCALL,
        ExitReason.IO_INSTRUCTION,
        ExitReason.MONITOR_TRAP_FLAG,
        ExitReason.HLT,
    ]
    assert steps_of(run) == [8]


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_an_exception_that_exits_makes_no_step(vmxlab):
    """Vol. 3C, 26.5.2: a fault that exits by the exception bitmap is that exit alone."""
    run = vmxlab.run(step_case("nop; ud2"))
    assert run.reasons == [ExitReason.MONITOR_TRAP_FLAG, ExitReason.EXCEPTION_OR_NMI]


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_each_iteration_is_one_step(vmxlab):
    """Vol. 3C, 26.5.2: with REP the exit is on the boundary behind the first iteration."""
    run = vmxlab.run(step_case("rep stosb; hlt", registers={"rcx": 3, "rdi": DATA, "rax": 0x41}))
    # Whether RIP is behind the instruction already after its last iteration is up to the processor.
    assert steps_of(run)[:2] == [0, 0]
    assert [exit_.registers["rcx"] for exit_ in run.exits[:3]] == [2, 1, 0]
    assert [exit_.registers["rdi"] - DATA for exit_ in run.exits[:3]] == [1, 2, 3]
    assert run.exits[-1].reason is ExitReason.HLT


def test_without_the_control_there_is_no_step(vmxlab):
    """Vol. 3C, 26.5.2: "monitor trap flag" 0."""
    run = vmxlab.run(Case(program="nop; nop; hlt", disable=MTF))
    assert run.reasons == [ExitReason.HLT]


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_the_flag_is_looked_at_by_each_entry(vmxlab):
    """Vol. 3C, 26.5.2: one step behind an entry with the control 1; L1 clears it, and L2 runs on."""
    controls = Field.PRIMARY_PROCESSOR_BASED_CONTROLS
    value = vmxlab.run(Case(watch=[controls], disable=MTF)).exits[0].watched[controls]
    off = on(ExitReason.MONITOR_TRAP_FLAG).vmwrite(controls, value).resume()
    run = vmxlab.run(Case(program="nop; nop; nop; hlt", enable=MTF, reactions=[off]))
    assert run.reasons == [ExitReason.MONITOR_TRAP_FLAG, ExitReason.HLT]


# --- blocking, and what is pending -------------------------------------------------------------------------


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_blocking_by_mov_ss_and_sti_does_not_hold_the_exit_back(vmxlab):
    """Vol. 3C, 26.5.2 and 28.3.4: the exit comes at once, and saves the blocking that is in effect."""
    program = "mov ax, ss; mov ss, ax; nop; sti; nop; cli; hlt"
    run = vmxlab.run(step_case(program))
    assert steps_of(run) == [3, 5, 6, 7, 8, 9]
    blocking = [exit_.watched[Field.GUEST_INTERRUPTIBILITY_STATE] for exit_ in run.exits]
    assert blocking == [
        0,
        InterruptibilityState.BLOCKING_BY_MOV_SS,
        0,
        InterruptibilityState.BLOCKING_BY_STI,
        0,
        0,
        0,
    ]


@pytest.mark.vmx_known_difference("mtf-single-step")
def test_a_single_step_trap_is_pending_behind_the_exit(vmxlab):
    """Vol. 3C, 26.5.2 and 28.3.4: the exit comes before the debug trap of RFLAGS.TF, which it saves (BS)."""
    case = step_case("nop; nop; hlt", fields={Field.GUEST_RFLAGS: int(RFLAGS.TF | RFLAGS.FIXED1)})
    run = vmxlab.run(case)
    assert run.exits[0].reason is ExitReason.MONITOR_TRAP_FLAG
    assert run.exits[0].rip == PROGRAM + 1
    assert run.exits[0].watched[Field.GUEST_PENDING_DEBUG_EXCEPTIONS] & DR6.BS
    # 27.7.3: the next entry delivers it before anything else; here that is an exit by the exception bitmap.
    assert run.exits[1].reason is ExitReason.EXCEPTION_OR_NMI
    assert run.exits[1].interruption.vector == Vector.DB
    assert run.exits[1].rip == PROGRAM + 1


# --- events ------------------------------------------------------------------------------------------------


@pytest.mark.vmx_known_difference("mtf-single-step")
@pytest.mark.parametrize("instruction", ["ud2", "int 0x30", "int3"])
def test_a_step_ends_at_the_handler_of_what_the_instruction_raises(vmxlab, instruction):
    """Vol. 3C, 26.5.2: a fault, INT n, INT3: the exit is on the boundary behind the delivery of the event."""
    vector = {"ud2": Vector.UD, "int 0x30": 0x30, "int3": Vector.BP}[instruction]
    parts = merged(handled(Vector.UD, Vector.BP), data={IDT + 16 * 0x30: gate(handler_of(Vector.UD))})
    run = vmxlab.run(step_case(f"nop; {instruction}", **parts))
    handler = handler_of(Vector.BP if vector == Vector.BP else Vector.UD)
    assert run.exits[1].reason is ExitReason.MONITOR_TRAP_FLAG
    assert run.exits[1].rip == handler
    assert run.exits[1].registers["rsp"] == STACK_TOP - 0x28
    assert steps_of(run)[:3] == [1, handler - PROGRAM, handler + 1 - PROGRAM]


@pytest.mark.vmx_known_difference("mtf-single-step")
@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        (Vector.UD, InterruptionType.HARDWARE_EXCEPTION),
        (0x30, InterruptionType.EXTERNAL_INTERRUPT),
        (0x31, InterruptionType.SOFTWARE_INTERRUPT),
        (Vector.NMI, InterruptionType.NMI),
    ],
    ids=["exception", "external", "software", "nmi"],
)
def test_behind_an_injected_event_the_exit_is_before_the_handler(vmxlab, vector, kind):
    """Vol. 3C, 26.5.2: an entry that injects an event exits before the handler's first instruction."""
    data = {IDT + 16 * vector: gate(handler_of(Vector.UD))}
    parts = merged(handled(Vector.UD), data=data)
    fields = {
        **parts["fields"],
        Field.GUEST_RFLAGS: int(RFLAGS.FIXED1 | RFLAGS.IF),
        Field.ENTRY_INTERRUPTION_INFORMATION: InterruptionInformation(vector, kind).bits,
        Field.ENTRY_INSTRUCTION_LENGTH: 2,
    }
    run = vmxlab.run(step_case("nop; hlt", data=parts["data"], fields=fields))
    assert run.exits[0].reason is ExitReason.MONITOR_TRAP_FLAG
    assert run.exits[0].rip == handler_of(Vector.UD)
    assert run.exits[0].registers["rsp"] == STACK_TOP - 0x28
    assert steps_of(run)[1] == handler_of(Vector.UD) + 1 - PROGRAM


@pytest.mark.parametrize("enabled", [False, True])
def test_a_pending_exit_can_be_injected(vmxlab, enabled):
    """Vol. 3C, 27.6.2 and 26.5.2: injecting type 7, vector 0 makes the entry exit before any instruction."""
    run = vmxlab.run(
        Case(
            program="nop; hlt",
            enable=MTF if enabled else (),
            disable=() if enabled else MTF,
            fields={Field.ENTRY_INTERRUPTION_INFORMATION: PENDING_MTF},
            watch=[*WATCH, Field.ENTRY_INTERRUPTION_INFORMATION],
        )
    )
    assert run.reasons == [ExitReason.MONITOR_TRAP_FLAG]
    assert steps_of(run) == [0]
    assert run.exits[0].rflags & ~RFLAGS.RF == RFLAGS.FIXED1
    # 28.2: the exit clears the valid bit, so that it is injected once.
    assert not run.exits[0].watched[Field.ENTRY_INTERRUPTION_INFORMATION] >> 31


def test_an_injected_pending_exit_finds_l2_as_it_was(vmxlab):
    """Vol. 3C, 27.6.2: nothing is delivered: with the valid bit clear again L2 runs from its RIP."""
    run = vmxlab.run(
        Case(
            program="nop; hlt",
            disable=MTF,
            fields={Field.ENTRY_INTERRUPTION_INFORMATION: PENDING_MTF},
            reactions=STEP,
        )
    )
    assert run.reasons == [ExitReason.MONITOR_TRAP_FLAG, ExitReason.HLT]
    assert run.exits[1].rip == PROGRAM + 1
    assert run.exits[1].registers["rsp"] == STACK_TOP
