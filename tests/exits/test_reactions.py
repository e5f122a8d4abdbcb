"""What the monitor does on an exit, as the case says: registers, fields, memory, injection, skip, stop.

SDM Vol. 3C, 27.6 (event injection), 27.2.1.3 (its rules), 28.2.4 (events during delivery).
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import (
    Case,
    End,
    EntryControls,
    ExitReason,
    Field,
    InstructionError,
    Mode,
    PrimaryControls,
    SecondaryControls,
    guest_ept,
    on,
    port_is,
)
from vmxlab.cases.memory import DATA, GDT, IDT, PROGRAM, STACK_TOP, machine_address
from vmxlab.cases.reactions import Reaction
from vmxlab.cases.steps import STANDARD, Enter, ReportMemory
from vmxlab.errors import CaseError
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.registers import CR0, RFLAGS, InterruptibilityState, Vector

IO = ExitReason.IO_INSTRUCTION
VMCALL = ExitReason.VMCALL
HLT = ExitReason.HLT


# --- registers, fields, memory -----------------------------------------------------------------------------


def test_a_reaction_sets_registers(vmxlab):
    """Also RSP, which lives in the VMCS, and registers that the exit has nothing to do with."""
    reaction = on(VMCALL).set("rax", 0xFEDC_BA98_7654_3210).set("rsp", 0x7008).set("r15", 3).skip()
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=[reaction]))
    registers = run.exits[1].registers
    assert registers["rax"] == 0xFEDC_BA98_7654_3210
    assert (registers["rsp"], registers["r15"], registers["rbx"]) == (0x7008, 3, 0)


def test_an_in_instruction_gets_its_value_from_a_reaction(vmxlab):
    """How a device is emulated: RAX for the IN that exited, then on behind it."""
    reactions = [on(IO, qualification=port_is(port)).set("rax", port * 3).skip() for port in (0x60, 0x61)]
    case = Case(program="in al, 0x60; mov bl, al; in al, 0x61; mov cl, al; hlt", reactions=reactions)
    registers = vmxlab.run(case).exits[-1].registers
    assert (registers["rbx"], registers["rcx"]) == (0x60 * 3 & 0xFF, 0x61 * 3 & 0xFF)


def test_a_reaction_writes_a_field(vmxlab):
    """By name or as a Field; the next entry loads it."""
    reaction = on(VMCALL).vmwrite("guest_rflags", 0x47).vmwrite(Field.GUEST_FS_BASE, 0x1234).skip()
    case = Case(program="vmcall; hlt", reactions=[reaction], watch=[Field.GUEST_FS_BASE])
    run = vmxlab.run(case)
    assert run.exits[1].rflags & ~RFLAGS.RF == 0x47
    assert run.exits[1].watched[Field.GUEST_FS_BASE] == 0x1234


def test_a_vmwrite_that_fails_in_a_reaction_is_reported(vmxlab):
    """Nothing may look done that was not: the VMfail stands in the outcomes, the case goes on."""
    optional = {
        Field.GUEST_UINV: EntryControls.LOAD_UINV,
        Field.TSC_MULTIPLIER: SecondaryControls.USE_TSC_SCALING,
        Field.EPT_POINTER: SecondaryControls.ENABLE_EPT,
    }
    missing = next((f for f, control in optional.items() if not vmxlab.capabilities.supports(control)), None)
    if missing is None:
        pytest.skip("the processor has every field that this test could miss")
    reaction = on(VMCALL).vmwrite(missing, 0).skip()
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=[reaction]))
    assert run.reasons == [VMCALL, HLT]
    failed = [outcome for outcome in run.outcomes if not outcome.ok]
    assert [(o.field, o.error) for o in failed] == [(missing, InstructionError.UNSUPPORTED_COMPONENT)]


def test_a_reaction_writes_memory(vmxlab):
    """At the machine's address, which is where L2's page lies."""
    reaction = on(VMCALL).write(machine_address(DATA), b"\x01\x02\x03\x04\x05").skip()
    case = Case(
        program="mov rax, [DATA]; vmcall; mov rbx, [DATA]; hlt",
        data={DATA: b"\xff" * 8},
        reactions=[reaction],
        steps=(*STANDARD, ReportMemory(machine_address(DATA), 8)),
    )
    run = vmxlab.run(case)
    registers = run.exits[-1].registers
    assert registers["rax"] == 0xFFFF_FFFF_FFFF_FFFF
    assert registers["rbx"] == 0xFFFF_FF05_0403_0201
    assert run.memory[machine_address(DATA)] == b"\x01\x02\x03\x04\x05\xff\xff\xff"


# --- which reaction, and for which exits -------------------------------------------------------------------


def test_the_first_reaction_that_matches_wins(vmxlab):
    """Reactions stand in order; one exit has one of them."""
    reactions = [on(VMCALL).set("rax", 1).skip(), on(VMCALL).set("rax", 2).set("rbx", 2).skip()]
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=reactions))
    assert (run.exits[1].registers["rax"], run.exits[1].registers["rbx"]) == (1, 0)


def test_a_reaction_is_for_its_exit_reason_alone(vmxlab):
    """Any other exit has its default, skip or stop."""
    reactions = [on(ExitReason.CPUID).set("rax", 1).skip()]
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=reactions))
    assert run.reasons == [VMCALL, HLT]
    assert run.exits[1].registers["rax"] == 0


def answers(vmxlab, reactions: list[Reaction], count: int) -> list[int]:
    """What RAX is behind each of `count` VMCALLs, before which it is 9."""
    program = "; ".join(["mov eax, 9; vmcall; mov [rdi], al; inc rdi"] * count)
    steps = (*STANDARD, ReportMemory(machine_address(DATA), count))
    run = vmxlab.run(
        Case(program=f"{program}; hlt", registers={"rdi": DATA}, reactions=reactions, steps=steps)
    )
    return list(run.memory[machine_address(DATA)])


def test_times_limits_which_exits_a_reaction_answers(vmxlab):
    """The first so many that match; the default answers the rest."""
    assert answers(vmxlab, [on(VMCALL, times=2).set("rax", 1).skip()], 5) == [1, 1, 9, 9, 9]


def test_first_leaves_out_the_exits_before_it(vmxlab):
    """Counted from 0."""
    assert answers(vmxlab, [on(VMCALL, first=3).set("rax", 1).skip()], 5) == [9, 9, 9, 1, 1]


def test_first_and_times_together_choose_any_run_of_exits(vmxlab):
    """All reactions count an exit that matches, whichever of them answers it."""
    reactions = [
        on(VMCALL, times=1).set("rax", 1).skip(),
        on(VMCALL, first=1, times=2).set("rax", 2).skip(),
        on(VMCALL, first=4).set("rax", 3).skip(),
    ]
    assert answers(vmxlab, reactions, 6) == [1, 2, 2, 9, 3, 3]
    assert answers(vmxlab, reactions[::-1], 6) == [1, 2, 2, 9, 3, 3]


def test_a_special_case_stands_before_the_general_one(vmxlab):
    """The first that applies wins, so the third exit gets the narrow one."""
    narrow, wide = on(VMCALL, first=2, times=1).set("rax", 7).skip(), on(VMCALL).set("rax", 5).skip()
    assert answers(vmxlab, [narrow, wide], 4) == [5, 5, 7, 5]
    assert answers(vmxlab, [wide, narrow], 4) == [5, 5, 5, 5]


def test_a_reaction_can_be_narrowed_by_the_qualification(vmxlab):
    """By any bits of it: the port, the direction, the size."""
    is_out = (1 << 3, 0)
    four_bytes = (7, 3)
    reactions = [
        on(IO, qualification=port_is(0x70)).set("rbx", 1).skip(),
        on(IO, qualification=is_out).set("rcx", 2).skip(),
        on(IO, qualification=four_bytes).set("rsi", 3).skip(),
    ]
    program = "in al, 0x60; in al, 0x70; out 0x60, al; in eax, 0x60; out 0x70, eax; hlt"
    run = vmxlab.run(Case(program=program, reactions=reactions))
    seen = [tuple(exit_.registers[name] for name in ("rbx", "rcx", "rsi")) for exit_ in run.exits]
    assert seen == [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 2, 0), (1, 2, 3), (1, 2, 3)]


def test_a_qualification_that_could_never_match_is_refused(vmxlab):
    """A value with bits outside its mask is a mistake, not a reaction that never fires."""
    with pytest.raises(CaseError, match="could never match"):
        on(IO, qualification=(0xFF, 0x100))


def test_matches_by_qualification_are_counted_by_themselves(vmxlab):
    """`times` and `first` count exits that match in reason and qualification."""
    reaction = on(IO, qualification=port_is(0x70), first=1).stop()
    case = Case(program="in al, 0x60; in al, 0x70; in al, 0x60; in al, 0x70; hlt", reactions=[reaction])
    run = vmxlab.run(case)
    assert [exit_.qualification.port for exit_ in run.exits] == [0x60, 0x70, 0x60, 0x70]
    assert run.end is End.STOP


# --- how L2 goes on ----------------------------------------------------------------------------------------


def test_stop_ends_the_entry(vmxlab):
    """An exit that would have been skipped ends the case."""
    run = vmxlab.run(Case(program="cpuid; vmcall; hlt", reactions=[on(VMCALL).stop()]))
    assert run.reasons == [ExitReason.CPUID, VMCALL]
    assert run.end is End.STOP


def test_after_a_stop_the_next_step_follows(vmxlab):
    """A VMRESUME enters L2 where it was, behind nothing: the instruction that stopped it exits again."""
    steps = (*STANDARD, Enter(resume=True), Enter(resume=True))
    reactions = [on(VMCALL, times=2).stop()]
    run = vmxlab.run(Case(program="vmcall; hlt", steps=steps, reactions=reactions))
    assert run.reasons == [VMCALL, VMCALL, VMCALL, HLT]
    assert [exit_.rip for exit_ in run.exits[:3]] == [PROGRAM] * 3
    assert run.exits[-1].rip == PROGRAM + 3


def test_hlt_can_be_skipped_and_exits_go_on(vmxlab):
    """What stops by default goes on where a reaction says so."""
    run = vmxlab.run(Case(program="hlt; hlt; vmcall; hlt", reactions=[on(HLT, times=2).skip()]))
    assert run.reasons == [HLT, HLT, VMCALL, HLT]


def test_resume_without_a_change_exits_again(vmxlab):
    """RESUME leaves RIP alone: only a limit or another reaction ends this."""
    reactions = [on(VMCALL, times=3).resume(), on(VMCALL, first=3).stop()]
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=reactions))
    assert run.reasons == [VMCALL] * 4
    assert {exit_.rip for exit_ in run.exits} == {PROGRAM}


def test_a_reaction_without_skip_or_resume_resumes(vmxlab):
    """Setting something is all it does: L2 goes on at its RIP."""
    reactions = [on(VMCALL, times=1).vmwrite(Field.GUEST_RIP, PROGRAM + 3)]
    run = vmxlab.run(Case(program="vmcall; mov eax, 4; hlt", reactions=reactions))
    assert run.reasons == [VMCALL, HLT]
    assert run.exits[1].registers["rax"] == 4


@pytest.mark.vmx_needs(SecondaryControls.UNRESTRICTED_GUEST)
def test_skip_wraps_in_32_bit_code(vmxlab):
    """Vol. 1, 3.5: outside 64-bit mode the instruction pointer has 32 bits: behind FFFFFFFEH + 2 comes 0."""
    ept = guest_ept()
    ept.map(0xFFFF_F000, machine_address(0x1F000))
    cr0 = (CR0.ET | CR0.NE | CR0.PE | vmxlab.capabilities.cr0_fixed0) & ~CR0.PG
    case = Case(
        mode=Mode.PROTECTED,
        program="hlt",
        ept=ept,
        data={0x1FFFE: b"\x0f\xa2", 0: b"\xf4"},
        fields={Field.GUEST_CR0: int(cr0), Field.GUEST_CR3: 0, Field.GUEST_RIP: 0xFFFF_FFFE},
        enable=SecondaryControls.UNRESTRICTED_GUEST,
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.CPUID, HLT]
    assert [exit_.rip for exit_ in run.exits] == [0xFFFF_FFFE, 0]


def test_skip_ends_blocking_by_mov_ss(vmxlab):
    """Vol. 3A, 6.8.3: blocking by MOV SS lasts for one instruction; one that is skipped counts too."""
    field = Field.GUEST_INTERRUPTIBILITY_STATE
    run = vmxlab.run(Case(program="mov ax, ss; mov ss, ax; cpuid; vmcall; hlt", watch=[field]))
    assert run.reasons == [ExitReason.CPUID, VMCALL, HLT]
    seen = [exit_.watched[field] for exit_ in run.exits]
    assert seen == [InterruptibilityState.BLOCKING_BY_MOV_SS, 0, 0]


# --- injection ---------------------------------------------------------------------------------------------

HANDLER = PROGRAM + 0x100


def gate(offset: int, *, kind: int = 0x8E) -> bytes:
    """A 64-bit interrupt gate (Vol. 3A, 6.14.1) to the baseline's code segment."""
    return struct.pack("<HHBBHII", offset & 0xFFFF, 0x08, 0, kind, offset >> 16 & 0xFFFF, offset >> 32, 0)


def injecting(vector: int, reaction, *, handler: str, **case) -> Case:
    """A case whose first exit is a VMCALL that `reaction` answers; `handler` takes `vector`."""
    fields = {Field.GUEST_IDTR_LIMIT: 0xFFF, **case.pop("fields", {})}
    return Case(
        program=f"vmcall; mov r15d, 1; hlt; .org 0x100; {handler}",
        data={IDT + 16 * vector: gate(HANDLER)},
        reactions=[reaction],
        fields=fields,
        **case,
    )


def event(vector: int, kind: InterruptionType, *, error_code: bool = False) -> int:
    return InterruptionInformation(vector, kind, error_code_valid=error_code).bits


def test_an_injected_exception_reaches_the_handler(vmxlab):
    """Vol. 3C, 27.6.1: #UD is delivered through L2's IDT before any instruction; it returns to GUEST_RIP."""
    reaction = on(VMCALL).inject(event(Vector.UD, InterruptionType.HARDWARE_EXCEPTION))
    handler = "mov rax, [rsp]; mov rbx, [rsp + 8]; mov rcx, [rsp + 16]; mov rdx, [rsp + 24]; hlt"
    run = vmxlab.run(injecting(Vector.UD, reaction, handler=handler))
    assert run.reasons == [VMCALL, HLT]
    registers = run.exits[1].registers
    assert registers["rax"] == PROGRAM  # not skipped: the fault is that of the VMCALL
    assert registers["rbx"] == 0x08
    assert registers["rcx"] & RFLAGS.FIXED1
    assert registers["rdx"] == STACK_TOP
    assert registers["r15"] == 0
    assert run.exits[1].rip > HANDLER


def test_an_injected_exception_pushes_its_error_code(vmxlab):
    """Vol. 3C, 27.6.1.1: with the deliver-error-code bit the VM-entry exception error code is pushed."""
    reaction = on(VMCALL).inject(
        event(Vector.GP, InterruptionType.HARDWARE_EXCEPTION, error_code=True), error_code=0x1234
    )
    run = vmxlab.run(injecting(Vector.GP, reaction, handler="mov rax, [rsp]; mov rbx, [rsp + 8]; hlt"))
    registers = run.exits[1].registers
    assert (registers["rax"], registers["rbx"]) == (0x1234, PROGRAM)


def test_iret_from_an_injected_exception_goes_on(vmxlab):
    """Vol. 3C, 27.6.1: skip, then inject: the handler returns behind the instruction that exited."""
    reaction = on(VMCALL).skip().inject(event(Vector.UD, InterruptionType.HARDWARE_EXCEPTION))
    run = vmxlab.run(injecting(Vector.UD, reaction, handler="mov r14d, 2; iretq"))
    assert run.reasons == [VMCALL, HLT]
    assert (run.exits[1].registers["r14"], run.exits[1].registers["r15"]) == (2, 1)


@pytest.mark.parametrize(
    ("vector", "kind", "length"),
    [
        (0x30, InterruptionType.SOFTWARE_INTERRUPT, 3),
        (Vector.BP, InterruptionType.SOFTWARE_EXCEPTION, 3),
        (0x31, InterruptionType.EXTERNAL_INTERRUPT, None),
        (Vector.NMI, InterruptionType.NMI, None),
    ],
)
def test_injected_interrupts_and_software_events(vmxlab, vector, kind, length):
    """Vol. 3C, 27.6.1: of software events the instruction length is added to the RIP that is pushed."""
    reaction = on(VMCALL).inject(event(vector, kind), length=length)
    fields = {Field.GUEST_RFLAGS: int(RFLAGS.IF | RFLAGS.FIXED1)}
    case = injecting(vector, reaction, handler="mov rax, [rsp]; pushf; pop rbx; hlt", fields=fields)
    run = vmxlab.run(case)
    assert run.reasons == [VMCALL, HLT]
    assert run.exits[1].registers["rax"] == PROGRAM + (length or 0)
    assert not run.exits[1].registers["rbx"] & RFLAGS.IF  # an interrupt gate


def test_injection_happens_once(vmxlab):
    """Vol. 3C, 28.2: every exit clears the valid bit of the VM-entry interruption information."""
    field = Field.ENTRY_INTERRUPTION_INFORMATION
    information = event(Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    reaction = on(VMCALL, times=1).skip().inject(information)
    run = vmxlab.run(injecting(Vector.UD, reaction, handler="iretq", watch=[field]))
    assert [exit_.watched[field] >> 31 for exit_ in run.exits] == [0, 0]


def test_an_injected_exception_does_not_exit_by_the_exception_bitmap(vmxlab):
    """Vol. 3C, 27.6.1.2: injection is delivered whatever the exception bitmap says; its own faults exit.

    Here delivery itself faults, for want of an IDT entry: #GP with the injected event as the one that was
    being delivered (28.2.4).
    """
    information = event(Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    case = Case(
        program="vmcall; hlt",
        reactions=[on(VMCALL).inject(information)],
        fields={Field.EXCEPTION_BITMAP: 0xFFFF_FFFF, Field.GUEST_IDTR_LIMIT: 0},
    )
    run = vmxlab.run(case)
    assert run.reasons == [VMCALL, ExitReason.EXCEPTION_OR_NMI]
    exit_ = run.exits[1]
    assert (exit_.interruption.vector, exit_.interruption.type) == (
        Vector.GP,
        InterruptionType.HARDWARE_EXCEPTION,
    )
    assert exit_.interruption_error_code == Vector.UD << 3 | 0b11  # EXT and IDT
    assert exit_.raw_idt_vectoring_information == information
    assert exit_.rip == PROGRAM


def test_an_injected_error_code_is_kept_when_its_delivery_exits(vmxlab):
    """Vol. 3C, 28.2.4: the IDT-vectoring error code is that of the event that was being delivered."""
    information = event(Vector.SS, InterruptionType.HARDWARE_EXCEPTION, error_code=True)
    case = Case(
        program="vmcall; hlt",
        reactions=[on(VMCALL).inject(information, error_code=0x58)],
        fields={Field.GUEST_IDTR_LIMIT: 0},
    )
    exit_ = vmxlab.run(case).exits[1]
    assert exit_.idt_vectoring.vector == Vector.SS
    assert exit_.raw_idt_vectoring_information == information
    assert exit_.idt_vectoring_error_code == 0x58


def test_two_contributory_faults_are_a_double_fault_and_then_a_triple_fault(vmxlab):
    """Vol. 3C, 27.6.1.2 and Vol. 3A, 6.15: #GP while #GP is injected becomes #DF; no IDT: triple fault."""
    information = event(Vector.GP, InterruptionType.HARDWARE_EXCEPTION, error_code=True)
    reactions = [on(VMCALL).inject(information, error_code=0)]
    fields = {Field.GUEST_IDTR_LIMIT: 0, Field.EXCEPTION_BITMAP: 1 << Vector.DF}
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=reactions, fields=fields))
    assert run.exits[1].interruption.vector == Vector.DF
    run = vmxlab.run(
        Case(
            program="vmcall; hlt",
            reactions=reactions,
            fields=fields | {Field.EXCEPTION_BITMAP: 0},
        )
    )
    assert run.reasons == [VMCALL, ExitReason.TRIPLE_FAULT]


def test_an_injection_that_breaks_the_rules_is_a_vmfail_at_the_next_entry(vmxlab):
    """Vol. 3C, 27.2.1.3: vector 32 is no exception: VMRESUME is VMfail(7), and the case ends with it."""
    reaction = on(VMCALL).inject(event(32, InterruptionType.HARDWARE_EXCEPTION))
    run = vmxlab.run(Case(program="vmcall; hlt", reactions=[reaction]))
    assert run.reasons == [VMCALL]
    assert run.end is End.VMFAIL
    assert run.entry is not None
    assert run.entry.operation == "vmresume"
    assert run.entry.error is InstructionError.ENTRY_INVALID_CONTROL_FIELDS


# --- many --------------------------------------------------------------------------------------------------


def test_sixty_four_reactions_in_one_case(vmxlab):
    """As many as a case may have, each for its own port."""
    reactions = [on(IO, qualification=port_is(port)).set("rax", port + 1).skip() for port in range(64)]
    program = "; ".join(f"in al, {port}" for port in range(64))
    run = vmxlab.run(Case(program=f"{program}; hlt", reactions=reactions))
    assert [exit_.registers["rax"] for exit_ in run.exits[1:]] == [port + 1 for port in range(64)]


def test_a_reaction_for_a_reason_that_never_comes_is_harmless(vmxlab):
    """Reasons without a name too: the monitor compares numbers."""
    reactions = [on(200).stop(), on(0xFFFF).stop(), on(ExitReason.ENCLS).stop()]
    assert vmxlab.run(Case(reactions=reactions)).reasons == [HLT]


def test_a_changed_control_takes_effect_at_the_next_entry(vmxlab):
    """Vol. 3C, 25.11: VMWRITE of a control between exits; here RDTSC exiting is switched on half-way."""
    enable = PrimaryControls.RDTSC_EXITING
    vmxlab.require(enable)
    field = Field.PRIMARY_PROCESSOR_BASED_CONTROLS
    base = vmxlab.run(Case(watch=[field])).exits[0].watched[field] & ~enable
    reactions = [on(VMCALL).vmwrite(field, base | enable).skip()]
    run = vmxlab.run(Case(program="rdtsc; vmcall; rdtsc; hlt", reactions=reactions, disable=enable))
    assert run.reasons == [VMCALL, ExitReason.RDTSC, HLT]


def test_gdt_of_the_baseline_is_where_the_handler_needs_it(vmxlab):
    """Selector 08H is L2's code, in a GDT that L2 can read."""
    run = vmxlab.run(Case(program=f"mov rax, [{GDT + 8}]; hlt"))
    assert run.exits[0].registers["rax"] == 0x00AF_9B00_0000_FFFF
