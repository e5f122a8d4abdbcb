"""What a second processor does while the first runs a case.

    Case(program="mov byte ptr [DATA], 1; again: jmp again",
         second_program="wait: cmp byte ptr [DATA], 0; je wait; mov dword ptr [APIC + 0x300], 0x4500")

It starts before the case's first step, in flat 32-bit protected mode without paging, outside VMX operation,
and sees the machine's memory and its own local APIC as they are. It has a small stack, no IDT (what it faults
at ends the machine: a CRASH of this case) and RFLAGS.IF = 1. Behind its last instruction it halts, and when
the case ends it is taken away from whatever it does.
"""

from __future__ import annotations

from vmxlab.cases.memory import DATA, L2_MEMORY, machine_address
from vmxlab.sdm.apic import APIC_DEFAULT_BASE

SECOND_PROGRAM_SYMBOLS = {"APIC": APIC_DEFAULT_BASE, "L2_MEMORY": L2_MEMORY, "DATA": machine_address(DATA)}
"""Names that its program may use. [DATA] is the byte that L2, with the default EPT, calls [DATA]."""

HALT = b"\xf4\xeb\xfd"
"""HLT, and back to it: what stands behind its program."""
