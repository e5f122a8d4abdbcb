"""What these tests share: a processor of the Skylake kind, written out by hand, and a walk of EPT tables."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vmxlab.structures import Capabilities

RAW = {
    0x480: 0x00DA_0400_0000_002B,  # revision 2BH, 1 KiB, dual monitor, WB, INS/OUTS information, TRUE MSRs
    0x481: 0x0000_007F_0000_0016,
    0x482: 0xFFF9_FFFE_0401_E172,
    0x483: 0x007F_FFFF_0003_6DFF,
    0x484: 0x0000_FFFF_0000_11FF,
    0x485: 0x0000_0000_7004_C1E7,
    0x486: 0x0000_0000_8000_0021,
    0x487: 0x0000_0000_FFFF_FFFF,
    0x488: 0x0000_0000_0000_2000,
    0x489: 0x0000_0000_0037_67FF,
    0x48A: 0x0000_0000_0000_002E,
    0x48B: 0x0217_7FFF_0000_0000,
    0x48C: 0x0000_0F01_0633_4141,
    0x48D: 0x0000_007F_0000_0016,
    0x48E: 0xFFF9_FFFE_0400_6172,
    0x48F: 0x007F_FFFF_0003_6DFB,
    0x490: 0x0000_FFFF_0000_11FB,
    0x491: 0x0000_0000_0000_0001,
}


@pytest.fixture
def skylake_raw() -> dict[int, int]:
    """MSR addresses to values, to be changed at will."""
    return dict(RAW)


@pytest.fixture
def skylake() -> Capabilities:
    """The same as `Capabilities`."""
    return Capabilities(RAW)


@dataclass
class Walked:
    """What the processor finds in the tables of an image."""

    hpa: int
    rights: int  # bits 2:0 and 10 of all entries together
    leaf: int
    size: int


def walk(tables: list[tuple[int, bytes]], gpa: int) -> Walked | None:
    """SDM Vol. 3C, 29.3.2, on the bytes themselves."""
    memory = dict(tables)
    table, rights = tables[0][0], 0x407
    for shift in (39, 30, 21, 12):
        offset = (gpa >> shift) % 512 * 8
        entry = int.from_bytes(memory[table][offset : offset + 8], "little")
        if entry % 8 == 0:
            return None
        rights &= entry
        if shift == 12 or (shift < 39 and entry & 0x80):
            size = 1 << shift
            frame = entry % 2**52 // size * size
            return Walked(frame + gpa % size, rights, entry, size)
        table = entry % 2**52 // 4096 * 4096
    return None
