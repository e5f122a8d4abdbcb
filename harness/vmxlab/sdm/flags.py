"""The base of every set of bits in this package: unknown bits survive, and a set can be put in words."""

from __future__ import annotations

from enum import KEEP, IntFlag
from typing import Any

_ALL_64_BITS = (1 << 64) - 1


class BitFlags(IntFlag, boundary=KEEP):
    """An IntFlag that keeps bits the manual doesn't name, as a processor or a case may set them."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        # A complement arrives here as a negative number. IntFlag would end it at the highest named bit, and
        # `value & ~FLAG` would silently drop unnamed bits above that; so it is taken over all 64 bits.
        # (Overriding __invert__ doesn't help: the enum machinery of 3.11 puts its own into each subclass.)
        if isinstance(value, int) and value < 0:
            value &= _ALL_64_BITS
        return super()._missing_(value)

    def __eq__(self, other: object) -> bool:
        # Bit 11 of one set of controls is not bit 11 of another: as equal keys, one would be taken for the
        # other in a dict or a cache.
        if isinstance(other, BitFlags) and type(other) is not type(self):
            return False
        return int.__eq__(self, other) if isinstance(other, int) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def describe(self) -> str:
        """The names of the bits that are set, unnamed ones as "bit 17"; "none" for an empty set."""
        words = []
        value = int(self)
        for member in type(self):
            if value & member:
                words.append(member.name or str(int(member)))
                value &= ~int(member)
        words += [f"bit {bit}" for bit in range(value.bit_length()) if value >> bit & 1]
        return " | ".join(words) or "none"
