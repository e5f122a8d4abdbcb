"""APIC registers in memory: which reads and writes of L2 are virtualized, which exit, and what is left.

SDM Vol. 3C, 30.4.2 (reads), 30.4.3.1 (writes), 30.4.3.2 (APIC-write emulation), 30.4.3.3 (APIC-write exits).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from vmxlab import Case, ExitReason, Field, Run, SecondaryControls, VirtualApicPage, on
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import VIRTUAL_APIC_PAGE
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.qualifications import ApicAccessType

from .virtual_apic_cases import (
    ACCESSES,
    APIC,
    DELIVERY,
    REGISTERS,
    and_report,
    apic_ept,
    check_trap_like,
    page_after,
)

TPR, EOI, ICR_LOW = ApicRegister.TASK_PRIORITY, ApicRegister.EOI, ApicRegister.INTERRUPT_COMMAND_LOW
ICR_HIGH = ApicRegister.INTERRUPT_COMMAND_HIGH
REGISTER_VIRTUALIZATION = SecondaryControls.APIC_REGISTER_VIRTUALIZATION

WRITABLE = {
    *(0x020, 0x080, 0x0B0, 0x0D0, 0x0E0, 0x0F0, 0x280, 0x300, 0x310),
    *range(0x320, 0x380, 0x10),
    *(0x380, 0x3E0),
}
READABLE = WRITABLE | {0x030, *range(0x100, 0x280, 0x10)}
OFFSETS = [*range(0, 0x400, 0x10), 0x400, 0x800, 0xFF0]

ACCESS_AT, BEHIND = PROGRAM + 2, PROGRAM + 4
SWEEP = (
    "jmp again; access: {access}; mov [rdi], eax; add rsi, 2; add rdi, 4; dec ecx; jz done;"
    "again: movzx ebx, word ptr [rsi]; add ebx, {apic}; mov eax, 0xfedcba98; jmp access; done: hlt"
)
VALUE = 0xFEDC_BA98
RESULTS = DATA + 0x1000
pytestmark = pytest.mark.vmx_needs(*ACCESSES)


@dataclass(frozen=True)
class Seen:
    accesses: set[int]
    writes: set[int]
    values: dict[int, int]
    run: Run


def sweep(vmxlab, access: str, enable, page: VirtualApicPage, steps=STANDARD) -> Seen:
    """Access all OFFSETS, one after the other: what exited how, and what EAX was behind each."""
    run = vmxlab.run(
        Case(
            program=SWEEP.format(access=access, apic=APIC),
            enable=enable,
            ept=apic_ept(),
            virtual_apic_page=page,
            data={DATA: struct.pack(f"<{len(OFFSETS)}H", *OFFSETS)},
            registers={"rsi": DATA, "rdi": RESULTS, "rcx": len(OFFSETS)},
            reactions=[
                on(ExitReason.APIC_ACCESS).vmwrite(Field.GUEST_RIP, BEHIND).resume(),
                on(ExitReason.APIC_WRITE).resume(),
            ],
            steps=(*steps, ReportMemory(machine_address(RESULTS), 4 * len(OFFSETS))),
        )
    )
    assert run.reasons[-1] == ExitReason.HLT
    values = struct.unpack(f"<{len(OFFSETS)}I", run.memory.pop(machine_address(RESULTS)))
    return Seen(
        {e.qualification.offset for e in run.exits if e.reason == ExitReason.APIC_ACCESS},
        {e.qualification.offset for e in run.exits if e.reason == ExitReason.APIC_WRITE},
        dict(zip(OFFSETS, values, strict=True)),
        run,
    )


def pattern() -> VirtualApicPage:
    return VirtualApicPage(
        {offset: 0xA000_0000 | offset for offset in OFFSETS if offset != TPR} | {TPR: 0xF5}
    )


@pytest.mark.parametrize(
    ("enable", "virtualized"),
    [
        (ACCESSES, {TPR}),
        ((*ACCESSES, *DELIVERY), {TPR}),
        (REGISTERS, READABLE),
        ((*REGISTERS, *DELIVERY), READABLE),
    ],
    ids=["tpr-shadow", "interrupt-delivery", "registers", "both"],
)
def test_reads(vmxlab, enable, virtualized):
    """Vol. 3C, 30.4.2: which offsets are read from the virtual-APIC page; any other is an exit."""
    page = pattern()
    seen = sweep(vmxlab, "mov eax, [rbx]", enable, page)
    assert seen.accesses == set(OFFSETS) - virtualized
    assert seen.writes == set()
    assert seen.values == {o: page[o] if o in virtualized else VALUE for o in OFFSETS}
    for exit_ in seen.run.exits[:-1]:
        assert exit_.qualification.access_type == ApicAccessType.LINEAR_READ
        assert exit_.rip == ACCESS_AT


@pytest.mark.parametrize(
    ("enable", "quiet", "exiting"),
    [
        (ACCESSES, {TPR}, set()),
        ((*ACCESSES, *DELIVERY), {TPR, EOI}, {ICR_LOW}),
        (REGISTERS, {TPR, ICR_HIGH}, WRITABLE - {TPR, ICR_HIGH}),
        ((*REGISTERS, *DELIVERY), {TPR, EOI, ICR_HIGH}, WRITABLE - {TPR, EOI, ICR_HIGH}),
    ],
    ids=["tpr-shadow", "interrupt-delivery", "registers", "both"],
)
def test_writes(vmxlab, enable, quiet, exiting):
    """Vol. 3C, 30.4.3: a write is virtualized (with or without an APIC-write exit) or an APIC-access exit.

    After it VTPR has byte 0 alone, VICR_HI byte 3 alone, and with virtual-interrupt delivery VEOI is 0.
    """
    seen = sweep(vmxlab, "mov [rbx], eax", enable, pattern(), and_report(whole=True))
    assert seen.accesses == set(OFFSETS) - quiet - exiting
    assert seen.writes == exiting
    for exit_ in seen.run.exits[:-1]:
        if exit_.reason == ExitReason.APIC_WRITE:
            check_trap_like(exit_, ExitReason.APIC_WRITE, exit_.qualification.offset, BEHIND)
        else:
            assert exit_.qualification.access_type == ApicAccessType.LINEAR_WRITE
            assert exit_.rip == ACCESS_AT
    after = page_after(seen.run)
    left = {TPR: VALUE & 0xFF, ICR_HIGH: VALUE & 0xFF00_0000, EOI: 0}
    before = pattern()
    for offset in OFFSETS:
        if offset in quiet:
            assert after[offset] == left[offset], hex(offset)
        elif offset == ApicRegister.PROCESSOR_PRIORITY and DELIVERY[1] in enable:
            # EOI virtualization has made vector 255 SVI, the highest in the pattern's VISR (30.1.3, 30.1.4).
            assert after[offset] == 0xF0
        else:
            assert after[offset] == (VALUE if offset in exiting else before[offset]), hex(offset)


@pytest.mark.vmx_needs(*REGISTERS)
def test_a_part_of_a_register_is_virtualized_too(vmxlab):
    """Vol. 3C, 30.4.2 and 30.4.3.1: an access within a register's four bytes; not one that leaves them."""
    page = VirtualApicPage({0x020: 0x4433_2211, 0x024: 0x8877_6655, TPR: 0xFF})
    program = (
        f"mov al, [{APIC + 0x21}]; mov bx, [{APIC + 0x22}]; mov cx, [{APIC + 0x21}];"
        f"mov byte ptr [{APIC + TPR}], 0x95; mov edx, [{APIC + TPR}]; hlt"
    )
    run = vmxlab.run(Case(program=program, enable=REGISTERS, ept=apic_ept(), virtual_apic_page=page))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert [registers[name] for name in ("rax", "rbx", "rcx", "rdx")] == [0x22, 0x4433, 0x3322, 0x95]
    for access in ("mov ax, [{}+0x23]", "mov eax, [{}+0x24]", "mov eax, [{}+0x21]", "mov rax, [{}+0x20]"):
        program = access.format(APIC)
        run = vmxlab.run(Case(program=program, enable=REGISTERS, ept=apic_ept(), virtual_apic_page=page))
        assert run.reasons == [ExitReason.APIC_ACCESS], access
        assert run.exits[0].qualification.access_type == ApicAccessType.LINEAR_READ


@pytest.mark.vmx_needs(*REGISTERS)
@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_a_read_modify_write_reads_and_then_writes(vmxlab):
    """Vol. 3C, 30.4.2 and 30.4.3: both are virtualized, and the write's exit follows the instruction.

    One to a register that can't be written exits as a write before it takes place; its read is virtualized.
    """
    version = ApicRegister.VERSION
    program = (
        f"or dword ptr [{APIC + ApicRegister.LVT_TIMER}], 0x10000; or dword ptr [{APIC + version}], 1; hlt"
    )
    page = VirtualApicPage({ApicRegister.LVT_TIMER: 0x0002_0040})
    run = vmxlab.run(
        Case(
            program=program,
            enable=REGISTERS,
            ept=apic_ept(),
            virtual_apic_page=page,
            steps=(*STANDARD, ReportMemory(VIRTUAL_APIC_PAGE + ApicRegister.LVT_TIMER, 4)),
            reactions=[on(ExitReason.APIC_WRITE).resume()],
        )
    )
    assert run.reasons == [ExitReason.APIC_WRITE, ExitReason.APIC_ACCESS]
    check_trap_like(run.exits[0], ExitReason.APIC_WRITE, ApicRegister.LVT_TIMER, PROGRAM + 11)
    assert run.exits[1].raw_qualification == ApicAccessType.LINEAR_WRITE << 12 | version
    assert run.exits[1].rip == PROGRAM + 11
    assert page_after(run) == VirtualApicPage({ApicRegister.LVT_TIMER: 0x0003_0040})


@pytest.mark.vmx_needs(*REGISTERS)
@pytest.mark.parametrize("flags", [0x2, 0x202], ids=["if-0", "if-1"])
def test_an_apic_write_exit_is_not_blocked(vmxlab, flags):
    """Vol. 3C, 30.4.3.2: RFLAGS.IF and blocking by MOV SS do not hold APIC-write emulation back."""
    program = f"mov ss, eax; mov dword ptr [{APIC + 0xF0}], 0x1ff; hlt"
    case = Case(
        program=program,
        enable=REGISTERS,
        ept=apic_ept(),
        fields={Field.GUEST_RFLAGS: flags},
        registers={"rax": 0x10},
        watch=[Field.GUEST_INTERRUPTIBILITY_STATE],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.APIC_WRITE]
    check_trap_like(run.exits[0], ExitReason.APIC_WRITE, 0xF0, PROGRAM + 2 + 11)
    assert run.exits[0].watched[Field.GUEST_INTERRUPTIBILITY_STATE] == 0
