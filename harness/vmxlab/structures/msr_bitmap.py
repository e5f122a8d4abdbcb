"""The MSR bitmap: which RDMSR and WRMSR of the guest cause VM exits (SDM Vol. 3C, 25.6.9 and 26.1.3).

One page of four bitmaps of 1 KiB: reads of low MSRs (00000000H to 00001FFFH) at 000H, reads of high ones
(C0000000H to C0001FFFH) at 400H, writes of low ones at 800H, writes of high ones at C00H. An access to any
other MSR always exits; there is no bit for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.errors import OutOfRange
from vmxlab.structures.bitmap import Bitmap, words_for_runs
from vmxlab.structures.checks import require_bits, require_page_address

LOW_MSRS = range(0x2000)
"""MSRs with a bit in the low bitmaps."""

HIGH_MSRS = range(0xC000_0000, 0xC000_2000)
"""MSRs with a bit in the high bitmaps."""

_QUADRANT = 0x2000  # bits, so 1 KiB
_READ, _WRITE = 0, 2 * _QUADRANT


class MsrBitmap(Bitmap):
    """The MSR bitmap: 4 quadrants of 8,192 bits in 4 KiB.

    `MsrBitmap()` is `MsrBitmap.passthrough_all()`. Mutable; `copy()` gives one of its own.
    """

    BITS = 4 * _QUADRANT
    __slots__ = ()

    def set_read_intercept(self, msr: int, intercept: bool) -> None:
        """Let RDMSR of `msr` exit, or no longer; OutOfRange for an MSR that has no bit."""
        self._bits[_READ + _offset(msr)] = bool(intercept)

    def set_write_intercept(self, msr: int, intercept: bool) -> None:
        """Let WRMSR of `msr` exit, or no longer; OutOfRange for an MSR that has no bit."""
        self._bits[_WRITE + _offset(msr)] = bool(intercept)

    def set_read_intercept_of_range(self, msr_base: int, count: int, intercept: bool) -> None:
        """The same for RDMSR of `count` MSRs from `msr_base` on; OutOfRange if one of them has no bit."""
        self._set_range(_READ, msr_base, count, intercept)

    def set_write_intercept_of_range(self, msr_base: int, count: int, intercept: bool) -> None:
        """The same for WRMSR of `count` MSRs from `msr_base` on; OutOfRange if one of them has no bit."""
        self._set_range(_WRITE, msr_base, count, intercept)

    def intercepts(self, msr: int, write: bool = False) -> bool:
        """Whether RDMSR (or WRMSR) with ECX = `msr` exits while "use MSR bitmaps" is 1.

        Always for an MSR outside both ranges. OutOfRange only for what ECX can't hold.
        """
        number = require_bits("MSR address", msr, 32)
        if number not in LOW_MSRS and number not in HIGH_MSRS:
            return True
        return bool(self._bits[(_WRITE if write else _READ) + _offset(number)])

    def intercepted_msrs(self, write: bool = False) -> Iterator[range]:
        """The MSRs whose read (or write) bit is 1, as ranges in order, low MSRs first."""
        start = _WRITE if write else _READ
        for quadrant, msrs in ((start, LOW_MSRS), (start + _QUADRANT, HIGH_MSRS)):
            for first, end in self._runs(quadrant, quadrant + _QUADRANT):
                yield msrs[first - quadrant : end - quadrant]

    @property
    def read_low(self) -> bytes:
        """The 1024 bytes for RDMSR of low MSRs (offset 000H)."""
        return self._quadrant(0)

    @property
    def read_high(self) -> bytes:
        """The 1024 bytes for RDMSR of high MSRs (offset 400H)."""
        return self._quadrant(1)

    @property
    def write_low(self) -> bytes:
        """The 1024 bytes for WRMSR of low MSRs (offset 800H)."""
        return self._quadrant(2)

    @property
    def write_high(self) -> bytes:
        """The 1024 bytes for WRMSR of high MSRs (offset C00H)."""
        return self._quadrant(3)

    def phys_addr(self, base: int) -> int:
        """The field MSR-bitmap address for a bitmap laid out at `base`; Misaligned, OutOfRange."""
        return require_page_address("address of the MSR bitmap", base)

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """The one page as (physical address, 4096 bytes), laid out at `base`."""
        return [(self.phys_addr(base), self.to_bytes())]

    def _quadrant(self, number: int) -> bytes:
        return self._bits[number * _QUADRANT : (number + 1) * _QUADRANT].tobytes()

    def _set_range(self, start: int, msr_base: int, count: int, intercept: bool) -> None:
        first = start + _offset(msr_base)
        # A range that leaves its own half would run into the next quadrant, which is another direction's.
        room = _QUADRANT - msr_base % _QUADRANT
        if not 0 <= count <= room:
            raise OutOfRange(
                "number of MSRs", count, f"from MSR {msr_base:#x} on the bitmap has bits for {room:#x}"
            )
        self._bits[first : first + count] = bool(intercept)

    def __repr__(self) -> str:
        """Which MSRs exit on a read and on a write, the first ranges of each."""
        reads, writes = (words_for_runs(self.intercepted_msrs(write), 4) for write in (False, True))
        return f"<MsrBitmap: reads exit: {reads}; writes exit: {writes}>"


def _offset(msr: int) -> int:
    # The bit of an MSR within the two bitmaps of one direction.
    if msr in LOW_MSRS:
        return int(msr)
    if msr in HIGH_MSRS:
        return _QUADRANT + int(msr) - HIGH_MSRS.start
    raise OutOfRange(
        "MSR",
        msr,
        "the bitmap has bits for 0 to 0x1fff and 0xc0000000 to 0xc0001fff; any other MSR always exits",
    )
