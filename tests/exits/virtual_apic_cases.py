"""What the tests of APIC virtualization share: an APIC-access page in L2, handlers, the page afterwards."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmxlab import (
    Ept,
    Exit,
    ExitReason,
    Field,
    PinControls,
    PrimaryControls,
    Run,
    SecondaryControls,
    VirtualApicPage,
    guest_ept,
)
from vmxlab.cases.memory import IDT, L2_MEMORY_BYTES
from vmxlab.cases.steps import STANDARD, ReportMemory, Step
from vmxlab.image.layout import APIC_ACCESS_PAGE, VIRTUAL_APIC_PAGE
from vmxlab.sdm.apic import ApicRegister

APIC = L2_MEMORY_BYTES
"""Linear and guest-physical address of L2's APIC: the page right behind its memory."""

TPR_SHADOW = PrimaryControls.USE_TPR_SHADOW
ACCESSES = (TPR_SHADOW, SecondaryControls.VIRTUALIZE_APIC_ACCESSES)
REGISTERS = (*ACCESSES, SecondaryControls.APIC_REGISTER_VIRTUALIZATION)
# Virtual-interrupt delivery needs "external-interrupt exiting" (SDM Vol. 3C, 27.2.1.1).
DELIVERY = (
    TPR_SHADOW,
    SecondaryControls.VIRTUAL_INTERRUPT_DELIVERY,
    PinControls.EXTERNAL_INTERRUPT_EXITING,
)
INTERRUPTS_ENABLED = 0x202
"""RFLAGS with IF and the fixed bit."""

HANDLER = 0x1_1000
"""Where every vector of `handlers` leads: VMCALL, IRETQ."""
VMCALL_IRETQ = b"\x0f\x01\xc1\x48\xcf"

_PARTS = ((ApicRegister.TASK_PRIORITY, 0x10), (0xA0, 0x20), (0x100, 0x80), (0x200, 0x80), (0x300, 0x20))


def apic_ept() -> Ept:
    """The default EPT with the APIC-access page at APIC."""
    ept = guest_ept()
    ept.map(APIC, APIC_ACCESS_PAGE)
    return ept


def and_report(*, whole: bool = False, steps: Iterable[Step] = STANDARD) -> tuple[Step, ...]:
    """The steps, and a report of the virtual-APIC page's registers behind them."""
    parts = ((0, 4096),) if whole else _PARTS
    return (*steps, *(ReportMemory(VIRTUAL_APIC_PAGE + offset, length) for offset, length in parts))


def page_after(run: Run) -> VirtualApicPage:
    """The virtual-APIC page as `and_report` reported it; what it did not report is 0."""
    content = bytearray(4096)
    for address, data in run.memory.items():
        content[address - VIRTUAL_APIC_PAGE : address - VIRTUAL_APIC_PAGE + len(data)] = data
    return VirtualApicPage.from_bytes(bytes(content))


def gate(handler: int) -> bytes:
    """A 64-bit interrupt gate to `handler` in L2's code segment."""
    return struct.pack("<HHBBHII", handler & 0xFFFF, 0x08, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0)


def handlers(*vectors: int, code: bytes = VMCALL_IRETQ) -> dict[int, bytes]:
    """L2's memory with an IDT whose `vectors` lead to `code`, at HANDLER."""
    return {IDT + 16 * vector: gate(HANDLER) for vector in vectors} | {HANDLER: code}


IDT_LIMIT = {Field.GUEST_IDTR_LIMIT: 0xFFF}


def status(requesting: int, in_service: int = 0) -> int:
    """Guest interrupt status: RVI in the low byte, SVI in the high one (SDM Vol. 3C, 25.4.2)."""
    return in_service << 8 | requesting


def eoi_exits(*vectors: int) -> dict[Field, int]:
    """EOI-exit bitmaps with these vectors set (SDM Vol. 3C, 25.6.8)."""
    names = (
        Field.EOI_EXIT_BITMAP_0,
        Field.EOI_EXIT_BITMAP_1,
        Field.EOI_EXIT_BITMAP_2,
        Field.EOI_EXIT_BITMAP_3,
    )
    return {
        name: sum(1 << vector % 64 for vector in vectors if vector // 64 == number)
        for number, name in enumerate(names)
    }


def check_trap_like(exit_: Exit, reason: ExitReason, qualification: int, rip: int) -> None:
    """SDM Vol. 3C, 28.2 and 28.3.3: what an exit behind an instruction records; no event, RF clear."""
    assert exit_.full_reason == reason
    assert exit_.raw_qualification == qualification
    assert exit_.rip == rip
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert not exit_.rflags & 1 << 16
