"""Capability MSRs to try things on: a processor of the Skylake kind, written out by hand."""

from __future__ import annotations

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
