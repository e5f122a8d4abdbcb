"""What several tests put into L2: an IDT whose handlers show the event's frame, and privilege level 3.

All of it is for 64-bit mode, at addresses that the baseline leaves free, at the end of L2's memory.
"""

from __future__ import annotations

import struct

from vmxlab import Field
from vmxlab.cases.memory import IDT

HANDLERS = 0x1A000
"""Where the handlers lie, 16 bytes each, by vector."""
USER_TABLES = 0x1C000
"""Three pages: L2's 1 GiB one to one, for CPL 3 too."""

CODE_SELECTOR = 0x08
POPS = ("rax", "rbx", "rdx", "rsi", "rdi", "rbp")
"""Where a handler leaves the frame, lowest address first; with an error code that is the first."""
_SHOW_FRAME = bytes.fromhex("58 5b 5a 5e 5f 5d f4")
_INTERRUPT_GATE = 0x8E00

EVERY_EXCEPTION = 0xFFFF_FFFF


def gate(offset: int, *, dpl: int = 3) -> bytes:
    """A 64-bit interrupt gate to L2's code segment (Vol. 3A, 6.14.1)."""
    rights = _INTERRUPT_GATE | dpl << 13
    return struct.pack("<HHHHII", offset & 0xFFFF, CODE_SELECTOR, rights, offset >> 16 & 0xFFFF, 0, 0)


def handler_of(vector: int) -> int:
    """L2's address of the handler of `vector`."""
    return HANDLERS + 16 * vector


def handled(*vectors: int) -> dict[str, dict]:
    """Case arguments `data` and `fields`: these vectors are delivered by L2's IDT, others exit.

    A handler pops the frame into POPS and executes HLT.
    """
    bitmap = EVERY_EXCEPTION
    data: dict[int, bytes] = {}
    for vector in vectors:
        bitmap &= ~(1 << vector)
        data[IDT + 16 * vector] = gate(handler_of(vector))
        data[handler_of(vector)] = _SHOW_FRAME
    return {"data": data, "fields": {Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: bitmap}}


def frame(registers, *, error_code: bool = False) -> dict[str, int]:
    """The frame that the handler popped: rip, cs, rflags, rsp, ss, and error_code where there is one."""
    names = (*(("error_code",) if error_code else ()), "rip", "cs", "rflags", "rsp", "ss")
    return {name: registers[register] for name, register in zip(names, POPS, strict=False)}


def user_mode() -> dict[str, dict]:
    """Case arguments `data` and `fields`: L2 runs at CPL 3, its memory accessible there."""
    fields = {
        Field.GUEST_CR3: USER_TABLES,
        Field.GUEST_CS_SELECTOR: 0x0B,
        Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB,
    }
    for name in ("SS", "DS", "ES", "FS", "GS"):
        fields[Field[f"GUEST_{name}_SELECTOR"]] = 0x13
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
    tables = {0: USER_TABLES + 0x1007, 0x1000: USER_TABLES + 0x2007, 0x2000: 0x87}
    return {
        "data": {USER_TABLES + at: entry.to_bytes(8, "little") for at, entry in tables.items()},
        "fields": fields,
    }


def merged(*parts: dict[str, dict], **more: dict) -> dict[str, dict]:
    """Case arguments put together: `data` and `fields` of all; the last one that says something wins."""
    result: dict[str, dict] = {"data": {}, "fields": {}}
    for part in (*parts, more):
        for name, values in part.items():
            result[name] = {**result.get(name, {}), **values}
    return result
