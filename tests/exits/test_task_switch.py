"""Task switches of L2 in 32-bit mode: they exit always, by whatever they are asked for.

SDM Vol. 3C, 26.2 and 26.4.2 (treatment of task switches), 28.1 (what is not modified), 28.2.1 with table 28-2
(qualification), 28.2.4 and 28.2.5 (task gates in the IDT), 28.3.3 (RIP and RFLAGS); Vol. 3A, chapter 8.
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, ExitReason, Field, Mode, PinControls, SecondaryControls
from vmxlab.cases.memory import DATA, IDT, PROGRAM, STACK_TOP, TSS, machine_address
from vmxlab.cases.steps import ReportMemory
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.qualifications import TaskSwitchSource
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState, Vector

from .events import LENGTH_OF_SENDING, NMI, SWITCH_ON, before_entry, injected, interrupt, sends, with_apic

# What L2's GDT holds here besides the baseline's flat code (08H) and data (10H), and its own TSS (18H).
OWN_TSS, NEW_TSS, GATE, ABSENT_TSS, BUSY_TSS, NO_TSS = 0x18, 0x20, 0x28, 0x30, 0x38, 0x40

AVAILABLE, BUSY, TASK_GATE_TYPE, PRESENT = 0x9, 0xB, 0x5, 0x80
GDT, SPARE_TSS = DATA, DATA + 0x100


def tss_descriptor(base: int, rights: int) -> int:
    return 0x67 | (base & 0xFFFFFF) << 16 | rights << 40 | base >> 24 << 56


def task_gate(selector: int) -> int:
    return selector << 16 | (PRESENT | TASK_GATE_TYPE) << 40


DESCRIPTORS = (
    0,
    0x00CF9B000000FFFF,
    0x00CF93000000FFFF,
    tss_descriptor(TSS, PRESENT | BUSY),
    tss_descriptor(SPARE_TSS, PRESENT | AVAILABLE),
    task_gate(NEW_TSS),
    tss_descriptor(SPARE_TSS, AVAILABLE),
    tss_descriptor(SPARE_TSS, PRESENT | BUSY),
    0x00CF93000000FFFF,
)

WATCHED = (
    Field.GUEST_TR_SELECTOR,
    Field.GUEST_TR_BASE,
    Field.GUEST_TR_ACCESS_RIGHTS,
    Field.GUEST_CS_SELECTOR,
    Field.GUEST_INTERRUPTIBILITY_STATE,
)
UNCHANGED = [OWN_TSS, TSS, 0x8B, 0x08, 0]

STATE_AFTER = (
    ReportMemory(machine_address(GDT), 8 * len(DESCRIPTORS)),
    ReportMemory(machine_address(TSS), 0x68),
)


def switching(
    program: str, *, gates: tuple[int, ...] = (), link: int = 0, fields=None, steps=(), **case
) -> Case:
    """L2 in 32-bit mode; `gates`: vectors with a task gate to NEW_TSS; `link`: of its own TSS."""
    idt = {IDT + 8 * vector: struct.pack("<Q", task_gate(NEW_TSS)) for vector in gates}
    return Case(
        mode=Mode.PROTECTED,
        program=program,
        data={GDT: struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS), TSS: struct.pack("<H", link), **idt},
        fields={
            Field.GUEST_GDTR_BASE: GDT,
            Field.GUEST_GDTR_LIMIT: 8 * len(DESCRIPTORS) - 1,
            Field.GUEST_IDTR_LIMIT: 0x7FF,
            Field.EXCEPTION_BITMAP: 0,
            **(fields or {}),
        },
        watch=WATCHED,
        steps=(*(steps or before_entry()), *STATE_AFTER),
        **case,
    )


def check_switch(run, selector: int, source: TaskSwitchSource, rip: int):
    """The one exit of this run: to that TSS, by that; and nothing has been switched yet."""
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.TASK_SWITCH, exit_
    assert (exit_.qualification.selector, exit_.qualification.source) == (selector, source)
    assert exit_.raw_qualification == source << 30 | selector
    assert not exit_.interruption.valid
    assert exit_.rip == rip
    assert exit_.registers["rsp"] == STACK_TOP
    # 28.1: neither TR, nor the descriptors, nor a TSS has been touched.
    assert list(exit_.watched.values())[:4] == UNCHANGED[:4]
    descriptors, own = run.memory[machine_address(GDT)], run.memory[machine_address(TSS)]
    assert struct.unpack(f"<{len(DESCRIPTORS)}Q", descriptors) == DESCRIPTORS
    assert not any(own[2:])
    return exit_


def far(opcode: int, selector: int) -> str:
    return f".byte {opcode:#x}; .long 0; .word {selector:#x}"


JMP, CALL = 0xEA, 0x9A

DIRECT = {
    # name: (program, offset of the instruction, its length, source)
    "jmp": (f"nop; {far(JMP, NEW_TSS)}", 1, 7, TaskSwitchSource.JMP),
    "jmp-gate": (f"nop; {far(JMP, GATE)}", 1, 7, TaskSwitchSource.JMP),
    "call": (f"nop; {far(CALL, NEW_TSS)}", 1, 7, TaskSwitchSource.CALL),
    "call-gate": (f"nop; {far(CALL, GATE)}", 1, 7, TaskSwitchSource.CALL),
    "jmp-memory": (
        f"mov word ptr [DATA + 0x204], {NEW_TSS}; jmp fword ptr [DATA + 0x200]",
        9,
        6,
        TaskSwitchSource.JMP,
    ),
}


@pytest.mark.parametrize(("program", "at", "length", "source"), DIRECT.values(), ids=DIRECT)
def test_jmp_and_call_to_a_tss(vmxlab, program, at, length, source):
    """Vol. 3C, table 28-2: the selector is that of the TSS, also where a task gate leads to it."""
    exit_ = check_switch(vmxlab.run(switching(program)), NEW_TSS, source, PROGRAM + at)
    assert exit_.instruction_length == length
    assert not exit_.idt_vectoring.valid
    assert exit_.rflags == 2
    assert exit_.watched[Field.GUEST_INTERRUPTIBILITY_STATE] == 0


def test_iret_of_a_nested_task(vmxlab):
    """Vol. 3C, 26.4.2; Vol. 2A, IRET: with RFLAGS.NT set it goes by the link of its TSS, to a busy one."""
    nested = {Field.GUEST_RFLAGS: int(RFLAGS.NT) | 2}
    run = vmxlab.run(switching("nop; iretd", link=BUSY_TSS, fields=nested))
    exit_ = check_switch(run, BUSY_TSS, TaskSwitchSource.IRET, PROGRAM + 1)
    assert exit_.instruction_length == 1
    assert not exit_.idt_vectoring.valid
    assert exit_.rflags & RFLAGS.NT


# --- a task gate in the IDT --------------------------------------------------------------------------------

SOFTWARE = {
    "int-n": ("nop; int 0x80", 0x80, InterruptionType.SOFTWARE_INTERRUPT, 2),
    "int3": ("nop; int3", Vector.BP, InterruptionType.SOFTWARE_EXCEPTION, 1),
    "int1": ("nop; .byte 0xf1", Vector.DB, InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION, 1),
    "into": ("mov al, 0x7f; add al, 1; into", Vector.OF, InterruptionType.SOFTWARE_EXCEPTION, 1),
}


KVM_INT1 = pytest.mark.vmx_known_difference("kvm-int1-is-a-hardware-exception")


@pytest.mark.parametrize(
    ("program", "vector", "type_", "length"),
    [pytest.param(*row, id=name, marks=KVM_INT1 if name == "int1" else ()) for name, row in SOFTWARE.items()],
)
def test_a_software_event_that_meets_a_task_gate(vmxlab, program, vector, type_, length):
    """Vol. 3C, 28.2.4, 28.2.5, 28.3.3: the event that was being delivered, and the instruction behind it."""
    at = 4 if "into" in program else 1
    run = vmxlab.run(switching(program, gates=(vector,)))
    exit_ = check_switch(run, NEW_TSS, TaskSwitchSource.TASK_GATE, PROGRAM + at)
    event = exit_.idt_vectoring
    assert (event.valid, event.vector, event.type, event.error_code_valid) == (True, vector, type_, False)
    assert exit_.instruction_length == length
    assert exit_.rflags & RFLAGS.RF == 0


def test_a_fault_that_meets_a_task_gate(vmxlab):
    """Vol. 3C, 28.2.4 and 28.3.3: #UD; RIP and RF are as they would be saved in the old TSS."""
    run = vmxlab.run(switching("nop; ud2", gates=(Vector.UD,)))
    exit_ = check_switch(run, NEW_TSS, TaskSwitchSource.TASK_GATE, PROGRAM + 1)
    event = exit_.idt_vectoring
    assert (event.valid, event.vector, event.type) == (True, Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    assert not event.error_code_valid
    assert exit_.rflags == RFLAGS.RF | 2


def test_a_fault_with_an_error_code_that_meets_a_task_gate(vmxlab):
    """Vol. 3C, 28.2.4: the error code stands in its own field."""
    run = vmxlab.run(switching("mov eax, 0x88; mov es, eax", gates=(Vector.GP,)))
    exit_ = check_switch(run, NEW_TSS, TaskSwitchSource.TASK_GATE, PROGRAM + 5)
    assert exit_.idt_vectoring.vector == Vector.GP
    assert exit_.idt_vectoring.error_code_valid
    assert exit_.idt_vectoring_error_code == 0x88


def test_an_external_interrupt_that_meets_a_task_gate(vmxlab):
    """Vol. 3C, 28.1 and 28.2.4: it has been acknowledged, and is what was being delivered."""
    vector = 0x77
    case = switching(
        "nop; hlt",
        gates=(vector,),
        fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2},
        disable=PinControls.EXTERNAL_INTERRUPT_EXITING,
        steps=(SWITCH_ON, *before_entry(interrupt(vector))),
    )
    exit_ = check_switch(vmxlab.run(case), NEW_TSS, TaskSwitchSource.TASK_GATE, PROGRAM)
    event = exit_.idt_vectoring
    assert (event.valid, event.vector, event.type) == (True, vector, InterruptionType.EXTERNAL_INTERRUPT)


def nmi_by_task_gate() -> Case:
    return switching(
        f"{sends(NMI)}; hlt",
        gates=(Vector.NMI,),
        ept=with_apic(),
        disable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS),
    )


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_an_nmi_that_meets_a_task_gate(vmxlab):
    """Vol. 3C, 28.2.4: vector 2, type NMI."""
    # In 32-bit mode an absolute address takes a byte less than in 64-bit mode.
    behind = PROGRAM + LENGTH_OF_SENDING - 2
    exit_ = check_switch(vmxlab.run(nmi_by_task_gate()), NEW_TSS, TaskSwitchSource.TASK_GATE, behind)
    assert (exit_.idt_vectoring.vector, exit_.idt_vectoring.type) == (Vector.NMI, InterruptionType.NMI)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.vmx_known_difference("kvm-nmi-that-exits-in-its-delivery")
def test_an_nmi_that_meets_a_task_gate_blocks_others(vmxlab):
    """Vol. 3C, 28.1: an NMI that exits indirectly blocks NMIs before the exit."""
    (exit_,) = vmxlab.run(nmi_by_task_gate()).exits
    assert exit_.reason == ExitReason.TASK_SWITCH
    assert exit_.watched[Field.GUEST_INTERRUPTIBILITY_STATE] == InterruptibilityState.BLOCKING_BY_NMI


@pytest.mark.parametrize(
    ("vector", "type_", "length"),
    [
        (0x80, InterruptionType.SOFTWARE_INTERRUPT, 2),
        (0x90, InterruptionType.EXTERNAL_INTERRUPT, 0),
        (Vector.UD, InterruptionType.HARDWARE_EXCEPTION, 0),
    ],
    ids=["int-n", "external-interrupt", "ud"],
)
def test_an_injected_event_that_meets_a_task_gate(vmxlab, vector, type_, length):
    """Vol. 3C, 27.6.1.2: as in L2; the instruction length is that of the VM entry for a software event."""
    fields = {
        Field.ENTRY_INTERRUPTION_INFORMATION: injected(vector, type_),
        Field.ENTRY_INSTRUCTION_LENGTH: length,
        Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2,
    }
    run = vmxlab.run(switching("nop; nop; hlt", gates=(vector,), fields=fields))
    exit_ = check_switch(run, NEW_TSS, TaskSwitchSource.TASK_GATE, PROGRAM)
    assert (exit_.idt_vectoring.vector, exit_.idt_vectoring.type) == (vector, type_)
    if length:
        assert exit_.instruction_length == length


# --- what is no task switch --------------------------------------------------------------------------------

REFUSED = {
    "busy": (far(JMP, BUSY_TSS), Vector.GP, BUSY_TSS),
    "absent": (far(JMP, ABSENT_TSS), Vector.NP, ABSENT_TSS),
    "call-absent": (far(CALL, ABSENT_TSS), Vector.NP, ABSENT_TSS),
    "data-segment": (far(JMP, NO_TSS), Vector.GP, NO_TSS),
    "beyond-the-gdt": (far(CALL, 0x88), Vector.GP, 0x88),
}


@pytest.mark.parametrize(("program", "vector", "error_code"), REFUSED.values(), ids=REFUSED)
def test_the_checks_of_a_task_switch_come_before_its_exit(vmxlab, program, vector, error_code):
    """Vol. 3C, 26.4.2: what fails them is the fault it would be without VMX."""
    (exit_,) = vmxlab.run(switching(program, fields={Field.EXCEPTION_BITMAP: 0xFFFF_FFFF})).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (vector, error_code)
    assert exit_.rip == PROGRAM


def test_64_bit_mode_has_no_task_switches(vmxlab):
    """Vol. 3A, 8.7: a far JMP to a TSS is #GP(selector)."""
    program = f"mov word ptr [DATA + 0x208], {OWN_TSS:#x}; .byte 0x48; jmp fword ptr [DATA + 0x200]"
    (exit_,) = vmxlab.run(Case(program=program)).exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (Vector.GP, OWN_TSS)
