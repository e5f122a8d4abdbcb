"""The EPTP list: what VM function 0, EPTP switching, chooses from (SDM Vol. 3C, 25.6.14 and 26.5.6.3)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import PAGE_SIZE, require_bits, require_page_address
from vmxlab.structures.ept_pointer import EPTPointer

ENTRIES = 512
"""Entries of the list, 8 bytes each: VMFUNC with ECX of this or more exits."""

_FORMAT = f"<{ENTRIES}Q"


class EptpList:
    """512 EPTPs in a page, which L2 selects by ECX. Mutable; `copy()` gives one of its own.

    An entry may be any 64-bit value: one that VM entry would refuse makes VMFUNC exit (`EPTPointer.check`
    says which are). `EptpList([a, b])` has `a` and `b` in entries 0 and 1; all others are 0, which no
    processor takes.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[EPTPointer | int] = ()) -> None:
        """The first entries of the list; OutOfRange for more than 512 of them, or for one over 64 bits."""
        given = [_bits(entry) for entry in entries]
        if len(given) > ENTRIES:
            raise OutOfRange("number of EPTPs", len(given), f"the list has {ENTRIES} entries")
        self._entries = given + [0] * (ENTRIES - len(given))

    def set(self, index: int, eptp: EPTPointer | int) -> None:
        """Put an EPTP into an entry; OutOfRange for an index over 511 or a value over 64 bits."""
        self._entries[_index(index)] = _bits(eptp)

    def __getitem__(self, index: int) -> EPTPointer:
        """The EPTP in an entry; OutOfRange for an index over 511."""
        return EPTPointer.from_bits(self._entries[_index(index)])

    def __len__(self) -> int:
        """512."""
        return ENTRIES

    def __eq__(self, other: object) -> bool:
        """Whether all entries are the same."""
        return isinstance(other, EptpList) and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> EptpList:
        """A list with the same entries."""
        return EptpList(self._entries)

    def to_bytes(self) -> bytes:
        """The 4096 bytes of the list."""
        return struct.pack(_FORMAT, *self._entries)

    @classmethod
    def from_bytes(cls, data: bytes) -> EptpList:
        """The list in a page of memory; OutOfRange for another size than 4096 bytes."""
        if len(data) != PAGE_SIZE:
            raise OutOfRange("size of an EPTP list", len(data), f"exactly {PAGE_SIZE} bytes")
        return cls(struct.unpack(_FORMAT, data))

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """The one page, with the value of the field EPTP-list address."""
        return [(require_page_address("EPTP-list address", base), self.to_bytes())]

    def __repr__(self) -> str:
        """How many entries are not 0."""
        return f"<EptpList, {sum(map(bool, self._entries))} of {ENTRIES} entries set>"


def _bits(eptp: EPTPointer | int) -> int:
    return eptp.bits if isinstance(eptp, EPTPointer) else require_bits("EPTP", eptp, 64)


def _index(index: int) -> int:
    if not 0 <= index < ENTRIES:
        raise OutOfRange("index of an EPTP", index, f"the list has {ENTRIES} entries")
    return index
