"""APIC-access exits: which accesses of L2 to the APIC-access page exit, and what the exit says of them.

SDM Vol. 3C, 30.4 (virtualizing memory-mapped APIC accesses), table 28-6 (exit qualification), 28.3.3 (RF).
Only "use TPR shadow" and "virtualize APIC accesses" are 1 here, or the latter alone.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, SecondaryControls, VirtualApicPage, guest_ept
from vmxlab.cases.memory import IDT, PAGE_TABLES, PROGRAM
from vmxlab.cases.steps import ReportMemory
from vmxlab.image.layout import APIC_ACCESS_PAGE
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.qualifications import ApicAccessType

from .virtual_apic_cases import ACCESSES, APIC, TPR_SHADOW, and_report, apic_ept, gate, page_after

ACCESS = SecondaryControls.VIRTUALIZE_APIC_ACCESSES
EPT = SecondaryControls.ENABLE_EPT
READ, WRITE = ApicAccessType.LINEAR_READ, ApicAccessType.LINEAR_WRITE
VTPR = ApicRegister.TASK_PRIORITY
VTPR_VALUE = 0x1122_3344
pytestmark = pytest.mark.vmx_needs(ACCESS)


def page_table_entry(linear: int, physical: int, *, table: int = PAGE_TABLES + 0x3000) -> dict[int, bytes]:
    """L2's memory with an entry that maps `linear`: L2's page tables are its own where there is no EPT."""
    return {table + linear // 0x1000 * 8: (physical | 3).to_bytes(8, "little")}


def access_case(program: str | bytes, *, with_ept: bool = True, enable=ACCESSES, **more) -> Case:
    """A case whose L2 has the APIC-access page at APIC, by EPT or by its own page tables."""
    if with_ept:
        more = {"ept": apic_ept(), **more}
    else:
        data = more.pop("data", {}) | page_table_entry(APIC, APIC_ACCESS_PAGE)
        more |= {"disable": EPT, "data": data}
    if TPR_SHADOW in enable:
        more = {"virtual_apic_page": VirtualApicPage({VTPR: VTPR_VALUE}), **more}
    return Case(program=program, enable=enable, **more)


def check(exit_, access: ApicAccessType, offset: int | None, rip: int) -> None:
    """Table 28-6, and what an exit says that is no event's; the offset is undefined where it is None."""
    assert exit_.full_reason == ExitReason.APIC_ACCESS
    assert exit_.qualification.access_type == access
    if offset is not None:
        assert exit_.qualification.offset == offset
        assert exit_.raw_qualification == access << 12 | offset
    assert not exit_.qualification.asynchronous
    assert not exit_.interruption.valid
    assert exit_.rip == rip


with_and_without_ept = pytest.mark.parametrize("with_ept", [True, False], ids=["ept", "no-ept"])


def run_access(vmxlab, instruction: str, **more):
    """The one exit of a program that executes `instruction` (behind a NOP); it is not valid anywhere else."""
    run = vmxlab.run(access_case(f"nop; {instruction}; hlt", **more))
    assert len(run.exits) == 1
    return run.exits[0]


# --- linear accesses ---------------------------------------------------------------------------------------


@with_and_without_ept
def test_a_read_exits_before_it_takes_place(vmxlab, with_ept):
    """Vol. 3C, 30.4.2 and table 28-6: type 0, the offset in bits 11:0; RIP at the instruction, no result."""
    for offset in (0x000, 0x020, 0x030, 0x300, 0x3F0, 0x400, 0xFF0, 0xFFC):
        exit_ = run_access(vmxlab, f"mov eax, [{APIC + offset}]", registers={"rax": 7}, with_ept=with_ept)
        check(exit_, READ, offset, PROGRAM + 1)
        assert exit_.registers["rax"] == 7


@with_and_without_ept
def test_a_write_exits_before_it_takes_place(vmxlab, with_ept):
    """Vol. 3C, 30.4.3.1 and table 28-6: type 1; neither page is written."""
    steps = (*and_report(), ReportMemory(APIC_ACCESS_PAGE, 16))
    for offset in (0x000, 0x0B0, 0x300):
        case = access_case(
            f"mov [{APIC + offset}], eax; hlt", registers={"rax": 7}, with_ept=with_ept, steps=steps
        )
        run = vmxlab.run(case)
        check(run.exits[0], WRITE, offset, PROGRAM)
        assert run.memory.pop(APIC_ACCESS_PAGE) == bytes(16)
        assert page_after(run) == VirtualApicPage({VTPR: VTPR_VALUE})


@pytest.mark.vmx_known_difference("apic-access-fetch")
def test_an_instruction_fetch_exits(vmxlab):
    """Vol. 3C, 30.4.2 and table 28-6: type 2, at any offset, the TPR's too; RIP is what was fetched."""
    for offset in (0x000, 0x080, 0x123):
        run = vmxlab.run(access_case(f"mov eax, {APIC + offset}; jmp rax"))
        assert len(run.exits) == 1
        check(run.exits[0], ApicAccessType.LINEAR_FETCH, offset, APIC + offset)


def test_a_read_modify_write_first_reads(vmxlab):
    """Vol. 3C, 30.4.2: the read of a read-modify-write instruction exits as a read; no write follows."""
    exit_ = run_access(vmxlab, f"add dword ptr [{APIC + 0x320}], 1")
    check(exit_, READ, 0x320, PROGRAM + 1)


def test_without_a_tpr_shadow_the_tpr_exits_too(vmxlab):
    """Vol. 3C, 30.4.2 and 30.4.3.1: with "use TPR shadow" 0 no access is virtualized."""
    for instruction, access in (("mov eax, [{}]", READ), ("mov [{}], eax", WRITE)):
        exit_ = run_access(vmxlab, instruction.format(APIC + VTPR), enable=(ACCESS,), disable=TPR_SHADOW)
        check(exit_, access, VTPR, PROGRAM + 1)


@pytest.mark.vmx_needs(TPR_SHADOW)
def test_the_tpr_is_read_and_written_on_the_virtual_apic_page(vmxlab):
    """Vol. 3C, 30.4.2 and 30.4.3: accesses of 1, 2 and 4 bytes at offset 80H go to VTPR; the rest is cleared.

    After a write VTPR keeps byte 0 alone, whatever the size of the access.
    """
    tpr = APIC + VTPR
    program = (
        f"mov eax, [{tpr}]; movzx ebx, word ptr [{tpr}]; movzx ecx, byte ptr [{tpr}];"
        f"mov dword ptr [{tpr}], 0xffffff5c; mov edx, [{tpr}]; mov byte ptr [{tpr}], 0x6d; mov esi, [{tpr}];"
        f"mov word ptr [{tpr}], 0xee7e; mov edi, [{tpr}]; or dword ptr [{tpr}], 0x180; mov r8, cr8; hlt"
    )
    run = vmxlab.run(access_case(program, steps=(*and_report(), ReportMemory(APIC_ACCESS_PAGE + VTPR, 4))))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert [registers[name] for name in ("rax", "rbx", "rcx")] == [0x1122_3344, 0x3344, 0x44]
    assert [registers[name] for name in ("rdx", "rsi", "rdi", "r8")] == [0x5C, 0x6D, 0x7E, 0xF]
    assert run.memory.pop(APIC_ACCESS_PAGE + VTPR) == bytes(4)
    assert page_after(run) == VirtualApicPage({VTPR: 0xFE})


@pytest.mark.vmx_needs(TPR_SHADOW)
def test_what_is_not_the_tprs_low_bytes_exits(vmxlab):
    """Vol. 3C, 30.4.2 and 30.4.3.1: no access wider than 32 bits, or at another offset, is virtualized."""
    for instruction, access, offset in (
        ("mov rax, [{}]", READ, 0x80),
        ("mov [{}], rax", WRITE, 0x80),
        ("mov al, [{}]", READ, 0x81),
        ("mov [{}], al", WRITE, 0x83),
        ("mov ax, [{}]", READ, 0x82),
        ("mov eax, [{}]", READ, 0x84),
        ("mov eax, [{}]", READ, 0x7E),
        ("mov [{}], ax", WRITE, 0x7F),
    ):
        exit_ = run_access(vmxlab, instruction.format(APIC + offset))
        check(exit_, access, offset, PROGRAM + 1)


@pytest.mark.vmx_needs(TPR_SHADOW)
@with_and_without_ept
def test_an_access_across_a_page_boundary_exits(vmxlab, with_ept):
    """Vol. 3C, 30.4.2: what reaches the APIC-access page from the page before it is not virtualized."""
    for instruction, access in (("mov eax, [{}]", READ), ("mov [{}], eax", WRITE)):
        exit_ = run_access(vmxlab, instruction.format(APIC - 2), with_ept=with_ept)
        assert exit_.full_reason == ExitReason.APIC_ACCESS
        assert exit_.qualification.access_type == access
        assert exit_.rip == PROGRAM + 1


@pytest.mark.vmx_needs(TPR_SHADOW)
def test_a_tpr_write_below_the_threshold_exits(vmxlab):
    """Vol. 3C, 30.4.3.2 and 30.1.2: TPR virtualization follows the write, reason 43 the instruction."""
    program = f"mov dword ptr [{APIC + VTPR}], 0x50; mov dword ptr [{APIC + VTPR}], 0x4f; hlt"
    case = access_case(
        program,
        fields={Field.TPR_THRESHOLD: 5},
        virtual_apic_page=VirtualApicPage({VTPR: 0x60}),
        steps=and_report(),
    )
    run = vmxlab.run(case)
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.TPR_BELOW_THRESHOLD]
    assert (run.exits[0].raw_qualification, run.exits[0].rip) == (0, PROGRAM + 2 * 11)
    assert page_after(run)[VTPR] == 0x4F


@pytest.mark.parametrize("mode", Mode)
def test_accesses_exit_in_each_mode(vmxlab, mode):
    """Vol. 3C, 30.4: the physical address alone decides; in real mode it is reached with a segment base."""
    fields = {Field.GUEST_DS_BASE: APIC} if mode is Mode.REAL else {}
    base = 0 if mode is Mode.REAL else APIC
    run = vmxlab.run(access_case(f"mov eax, ds:[{base + 0x30}]; hlt", mode=mode, fields=fields))
    assert len(run.exits) == 1
    check(run.exits[0], READ, 0x30, PROGRAM)


def test_without_the_control_the_page_is_memory(vmxlab):
    """Vol. 3C, 25.6.8: the APIC-access address means something with "virtualize APIC accesses" alone."""
    case = access_case(
        f"mov eax, [{APIC + 0x30}]; hlt",
        enable=(),
        disable=ACCESS,
        memory={APIC_ACCESS_PAGE + 0x30: b"\x44\x33\x22\x11"},
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == 0x1122_3344


def test_an_ept_violation_comes_before_an_apic_access(vmxlab):
    """Vol. 3C, 30.4.1: an access that EPT does not allow is an EPT violation."""
    ept = guest_ept()
    ept.map(APIC, APIC_ACCESS_PAGE, write=False)
    exit_ = run_access(vmxlab, f"mov [{APIC + 0x80}], eax", ept=ept)
    assert exit_.full_reason == ExitReason.EPT_VIOLATION
    check(run_access(vmxlab, f"mov eax, [{APIC + 0x30}]", ept=ept), READ, 0x30, PROGRAM + 1)


@pytest.mark.vmx_known_difference("apic-access-exit-rf-clear")
def test_an_access_that_exits_saves_rf(vmxlab):
    """Vol. 3C, 28.3.3: an APIC-access exit outside event delivery saves RFLAGS.RF as 1."""
    exit_ = run_access(vmxlab, f"mov eax, [{APIC}]")
    assert exit_.rflags >> 16 & 1


# --- during event delivery ---------------------------------------------------------------------------------


@with_and_without_ept
@pytest.mark.parametrize("injected", [True, False], ids=["injected", "int-n"])
def test_a_gate_on_the_page_exits_during_delivery(vmxlab, injected, with_ept):
    """Vol. 3C, table 28-6: reading the IDT is type 3; 28.2.4: the event is in the IDT-vectoring information.

    For INT n the instruction length is recorded (28.2.5) and RIP is that of the instruction.
    """
    fields = {Field.GUEST_IDTR_BASE: APIC, Field.GUEST_IDTR_LIMIT: 0xFFF, Field.GUEST_RFLAGS: 0x202}
    if injected:
        fields[Field.ENTRY_INTERRUPTION_INFORMATION] = 1 << 31 | 0x21
    run = vmxlab.run(access_case("int 0x21; hlt", fields=fields, with_ept=with_ept))
    assert len(run.exits) == 1
    exit_ = run.exits[0]
    check(exit_, ApicAccessType.LINEAR_EVENT_DELIVERY, 0x210, PROGRAM)
    assert exit_.raw_idt_vectoring_information == (1 << 31 | 0x21 if injected else 1 << 31 | 4 << 8 | 0x21)
    if not injected:
        assert exit_.instruction_length == 2


def test_a_stack_on_the_page_exits_during_delivery(vmxlab):
    """Vol. 3C, table 28-6: a push of event delivery is type 3 as well, not a write of type 1."""
    case = access_case(
        "ud2",
        fields={Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: 0},
        registers={"rsp": APIC + 0x800},
        data={IDT + 16 * 6: gate(0x1_1000)},
    )
    run = vmxlab.run(case)
    assert len(run.exits) == 1
    check(run.exits[0], ApicAccessType.LINEAR_EVENT_DELIVERY, None, PROGRAM)
    assert 0x800 - 5 * 8 <= run.exits[0].qualification.offset < 0x800
    assert run.exits[0].raw_idt_vectoring_information == 1 << 31 | 3 << 8 | 6


# --- guest-physical accesses -------------------------------------------------------------------------------


BEYOND = (1 << 30) + 0x10 * (2 << 20)
"""A linear address for which L2's page-directory-pointer table has an entry of its own."""
WALK = {PAGE_TABLES + 0x1000 + 8: (APIC | 3).to_bytes(8, "little")}
"""That entry: it leads to a page directory at L2's APIC, where BEYOND's entry is at the TPR's offset."""
BY_IDT = {Field.GUEST_IDTR_BASE: BEYOND, Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: 0}


@pytest.mark.vmx_needs(EPT)
def test_a_walk_through_the_page_exits(vmxlab):
    """Vol. 3C, 30.4.6.1: a guest-physical access exits, at the TPR's offset too; none is virtualized."""
    for program, rip in (
        (f"mov eax, [{BEYOND}]", PROGRAM),
        (f"mov [{BEYOND}], eax", PROGRAM),
        (f"mov eax, {BEYOND}; jmp rax", BEYOND),
    ):
        for enable in (ACCESSES, (ACCESS,)):
            run = vmxlab.run(access_case(program, enable=enable, data=WALK))
            assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.APIC_ACCESS]
            assert run.exits[0].rip == rip
            assert not run.exits[0].interruption.valid
            assert not run.exits[0].idt_vectoring.valid


@pytest.mark.vmx_needs(EPT)
def test_a_walk_during_event_delivery_exits(vmxlab):
    """Vol. 3C, 28.2.4 and 28.2.5: the event is in the IDT-vectoring information, the length that of INT3."""
    run = vmxlab.run(access_case("int3", fields=BY_IDT, data=WALK))
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.APIC_ACCESS]
    assert run.exits[0].raw_idt_vectoring_information == 1 << 31 | 6 << 8 | 3
    assert (run.exits[0].rip, run.exits[0].instruction_length) == (PROGRAM, 1)


@pytest.mark.vmx_needs(EPT)
@pytest.mark.vmx_known_difference("apic-access-by-a-walk-is-linear")
@pytest.mark.parametrize(
    ("program", "access"),
    [
        (f"mov eax, [{BEYOND}]", ApicAccessType.GUEST_PHYSICAL_INSTRUCTION),
        ("int3", ApicAccessType.GUEST_PHYSICAL_EVENT_DELIVERY),
    ],
    ids=["instruction", "event-delivery"],
)
def test_a_guest_physical_access_has_a_type_of_its_own(vmxlab, program, access):
    """Vol. 3C, table 28-6: type 15 where an instruction's access or fetch walks, 10 during event delivery."""
    run = vmxlab.run(access_case(program, fields=BY_IDT, data=WALK))
    check(run.exits[0], access, None, PROGRAM)
