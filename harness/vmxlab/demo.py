"""The first case: what `vmxlab run` does when it is told nothing.

One guest program that meets each structure a hypervisor gives the processor: both I/O bitmaps, the MSR bitmap
and EPT, which it answers by mapping the page. Exactly five exits: two I/O instructions, an RDMSR, an EPT
violation, a HLT.
"""

from __future__ import annotations

from vmxlab.cases.case import Case, Limits
from vmxlab.cases.memory import UNMAPPED, guest_ept
from vmxlab.cases.reactions import Reaction, on, port_is
from vmxlab.image import layout
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import EFER
from vmxlab.structures import IOBitmap, MsrBitmap

PORT_A = 0x60
"""In I/O bitmap A, which has ports 0 to 0x7fff."""
PORT_B = 0xB000
"""In I/O bitmap B."""

PROGRAM = f"""
    in   al, {PORT_A:#x}            # intercepted: exits
    in   al, {PORT_A + 1:#x}            # not intercepted: no exit
    mov  dx, {PORT_B:#x}
    out  dx, ax              # intercepted: exits
    mov  ecx, {Msr.IA32_EFER:#x}
    rdmsr                    # intercepted: exits, and the reaction gives the value
    mov  [UNMAPPED], rax     # EPT maps nothing there: exits, is mapped, and is done again
    mov  rbx, [UNMAPPED]     # mapped now: no exit
    hlt                      # exits, and ends the case
"""

PATIENCE_TSC = 1 << 26
"""How long L2 may run for a person who waits: some milliseconds, on an emulator about a second."""

SCANCODE = 0x1C
"""What the reaction to the first exit gives L2 to read: the Enter key."""


def first_case() -> Case:
    """The case. It needs EPT: a processor without is a SKIP that names the bit."""
    io_bitmap = IOBitmap.passthrough_all()
    io_bitmap.set_intercept(PORT_A, True)
    io_bitmap.set_intercept(PORT_B, True)
    msr_bitmap = MsrBitmap.passthrough_all()
    msr_bitmap.set_read_intercept(Msr.IA32_EFER, True)
    return Case(
        name="first-case",
        program=PROGRAM,
        io_bitmap=io_bitmap,
        msr_bitmap=msr_bitmap,
        ept=guest_ept(),
        reactions=(
            on(ExitReason.IO_INSTRUCTION, qualification=port_is(PORT_A)).set("rax", SCANCODE).skip(),
            on(ExitReason.RDMSR).set("rax", EFER.LME | EFER.LMA).set("rdx", 0).skip(),
            _map_page(UNMAPPED, layout.FREE_PAGES),
        ),
        needs=SecondaryControls.ENABLE_EPT,
        expect=(
            ExitReason.IO_INSTRUCTION,
            ExitReason.IO_INSTRUCTION,
            ExitReason.RDMSR,
            ExitReason.EPT_VIOLATION,
            ExitReason.HLT,
        ),
    )


def prompt_case() -> Case:
    """What `vmxlab console` has for `load`: a VMCS that enters, both bitmaps in use, nothing intercepted."""
    return Case(
        name="baseline",
        program=f"nop; in al, {PORT_A:#x}; mov ecx, {Msr.IA32_EFER:#x}; rdmsr; hlt",
        io_bitmap=IOBitmap.passthrough_all(),
        msr_bitmap=MsrBitmap.passthrough_all(),
        limits=Limits(l2_tsc=PATIENCE_TSC),
    )


def _map_page(gpa: int, hpa: int) -> Reaction:
    """On an EPT violation, write the entry that maps the page, and go on.

    No INVEPT: the processor caches nothing of a page that isn't present (SDM Vol. 3C, 29.4.2).
    """
    ept = guest_ept()
    ept.map(gpa, hpa)
    translation = ept.translate(gpa)
    assert translation is not None
    entry = translation.entries[-1].to_bytes(8, "little")
    return on(ExitReason.EPT_VIOLATION).write(ept.entry_address(layout.EPT_TABLES, gpa), entry).resume()
