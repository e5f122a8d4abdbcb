"""What the I/O bitmaps and the MSR bitmap have in common: bits by the thousand, set and found in bulk.

Bit n of a VMX bitmap is bit n % 8 of byte n / 8, which is `bitarray`'s little-endian layout, so a range is
one slice and the bytes of a page are the memory of the array.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

from bitarray import bitarray

from vmxlab.errors import OutOfRange


class Bitmap:
    """A fixed number of bits, 1 for "causes a VM exit"; the subclasses say which bit means what."""

    BITS: ClassVar[int]
    __slots__ = ("_bits",)

    def __init__(self) -> None:
        """No bit set: nothing exits."""
        self._bits = bitarray(self.BITS, endian="little")
        self._bits.setall(0)

    @classmethod
    def passthrough_all(cls) -> Self:
        """A bitmap that lets everything through: all bits 0."""
        return cls()

    @classmethod
    def intercept_all(cls) -> Self:
        """A bitmap by which everything exits: all bits 1."""
        bitmap = cls()
        bitmap._bits.setall(1)
        return bitmap

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The bitmap that these bytes hold; OutOfRange if their number is wrong."""
        if len(data) != cls.BITS // 8:
            raise OutOfRange(f"length of {cls.__name__}", len(data), f"it is {cls.BITS // 8:#x} bytes")
        bitmap = cls()
        bitmap._bits = bitarray(endian="little")
        bitmap._bits.frombytes(data)
        return bitmap

    def to_bytes(self) -> bytes:
        """The bytes of the bitmap, as the processor reads them."""
        return self._bits.tobytes()

    def copy(self) -> Self:
        """A bitmap of its own with the same bits."""
        bitmap = type(self)()
        bitmap._bits = self._bits.copy()
        return bitmap

    def __eq__(self, other: object) -> bool:
        """Equal when every bit is."""
        return self._bits == other._bits if isinstance(other, type(self)) else NotImplemented

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        # Half-open runs of 1 bits, found by the library's own search rather than bit by bit.
        while (first := self._bits.find(1, start, stop)) >= 0:
            end = self._bits.find(0, first, stop)
            start = end if end >= 0 else stop
            yield first, start


def words_for_runs(runs: Iterator[range], limit: int = 6) -> str:
    """Ranges as short text for a repr: "0x60, 0x3f8-0x3ff", at most `limit` of them."""
    words: list[str] = []
    for run in runs:
        if len(words) == limit:
            words.append("...")
            break
        words.append(f"{run[0]:#x}" if len(run) == 1 else f"{run[0]:#x}-{run[-1]:#x}")
    return ", ".join(words) or "nothing"
