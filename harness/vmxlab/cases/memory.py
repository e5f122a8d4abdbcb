"""L2's memory: what lies where, in the guest program's own (linear) addresses and in the machine's.

By default L2 has 128 KiB. In 64-bit and 32-bit mode its page tables map linear addresses one to one onto
guest-physical ones; EPT maps guest-physical page g onto the machine's L2_MEMORY + g. A processor without EPT
has no guest-physical addresses: there L2's page tables map the 128 KiB themselves, and nothing else. Either
way a guest program sees nothing but its own memory, at the same linear addresses.
"""

from __future__ import annotations

from vmxlab.structures import Ept

L2_MEMORY = 18 * 1024 * 1024
"""Machine address of L2's first page; 2 MiB-aligned, so that one large EPT page can map it too."""

L2_MEMORY_BYTES = 0x20000

# Linear addresses in L2. Page 0 holds zeros (in real mode it is the interrupt vector table).
GDT = 0x1000
TSS = 0x1800
IDT = 0x2000
PAGE_TABLES = 0x3000
"""Up to four pages: PML4, PDPT, page directory, page table."""
STACK_TOP = 0x7FF0
PROGRAM = 0x8000
"""The guest program starts here."""
PROGRAM_LIMIT = 0x10000
DATA = 0x10000
"""From here to the end of its memory L2 is free to do as it likes."""

UNMAPPED = 0x100000
"""A linear and guest-physical address that L2's page tables map and the default EPT does not."""

PROGRAM_SYMBOLS = {"DATA": DATA, "UNMAPPED": UNMAPPED, "STACK_TOP": STACK_TOP}
"""Names that every guest program may use."""


def guest_ept() -> Ept:
    """The default EPT of a case: L2's 128 KiB in 4 KiB pages, read, write, execute, write-back.

    A fresh one each time: a case may map, protect and unmap in it as it likes.
    """
    ept = Ept()
    ept.map(0, L2_MEMORY, length=L2_MEMORY_BYTES)
    return ept


def machine_address(gpa: int) -> int:
    """Where the default EPT (or, without EPT, L2's page tables) puts L2's address `gpa`."""
    return L2_MEMORY + gpa
