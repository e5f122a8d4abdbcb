"""Which RDMSR and WRMSR exit (SDM Vol. 3C, 25.6.9 and 26.1.3).

Plain values in, plain values out.
"""

from __future__ import annotations

from vmxlab.errors import CaseError, OutOfRange
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.structures import MsrBitmap

MSR_EXIT_SECTION = "Vol. 3C, 26.1.3, RDMSR and WRMSR"
MSR_QUALIFICATION_SECTION = "Vol. 3C, 28.2.1"

_USE_MSR_BITMAPS = int(PrimaryControls.USE_MSR_BITMAPS)

MSR_QUALIFICATION = 0
"""Of RDMSR and WRMSR: they are not among the exits that save a qualification (28.2.1), so it is cleared."""

LOW = range(0x2000)
HIGH = range(0xC000_0000, 0xC000_2000)
"""The MSRs that have bits (25.6.9)."""

# 25.6.9: where in the page the four bitmaps of 1 KiB lie; the two for writes are behind those for reads.
_LOW_AT, _HIGH_AT, _WRITES_AT = 0x000, 0x400, 0x800


def msr_exits(primary: int, msr_bitmap: MsrBitmap | None, msr: int, write: bool) -> bool:
    """Whether RDMSR (or, with `write`, WRMSR) with ECX = `msr` causes a VM exit (SDM Vol. 3C, 26.1.3).

    `primary`: the primary processor-based controls as they are in the VMCS. `msr_bitmap`: the bitmap as it is
    in memory; only looked at where "use MSR bitmaps" is 1. Without that control every access exits, and with
    it every access outside both ranges, and those whose bit is 1.

    An access that exits does so before the processor looks whether there is such an MSR (26.1.1), except
    that #GP(0) for CPL > 0 and #UD go first: neither depends on the MSR.

    Raises OutOfRange for what ECX can't hold, CaseError where a bitmap is used and none is given.
    """
    if not 0 <= msr < 1 << 32:
        raise OutOfRange("MSR", msr, "ECX has 32 bits")
    if not primary & _USE_MSR_BITMAPS:
        return True
    if msr in LOW:
        at, bit = _LOW_AT, msr - LOW.start
    elif msr in HIGH:
        at, bit = _HIGH_AT, msr - HIGH.start
    else:
        return True
    if msr_bitmap is None:
        raise CaseError('"use MSR bitmaps" is 1, and there is no MSR bitmap to look at')
    byte = msr_bitmap.to_bytes()[at + (_WRITES_AT if write else 0) + bit // 8]
    return bool(byte >> bit % 8 & 1)
