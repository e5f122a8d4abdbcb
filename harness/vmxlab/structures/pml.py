"""The page-modification log: what the processor leaves in it (SDM Vol. 3C, 29.3.6).

Entries are written from the PML index down: the field says where the next one goes. With 0 it becomes FFFFH
after the write; a value over 511 means that the log is full, and what would be logged exits instead.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import PAGE_SIZE, require_bits

ENTRIES = 512
"""Entries of the log, 8 bytes each."""

LAST_INDEX = ENTRIES - 1
"""The PML index of an empty log: entries are written from the end."""

FULL = 0xFFFF
"""The PML index after entry 0 was written."""


@dataclass(frozen=True, slots=True)
class PageModificationLog:
    """A log as it lies in memory: 512 entries in the order of their addresses."""

    entries: tuple[int, ...] = (0,) * ENTRIES

    def __post_init__(self) -> None:
        """OutOfRange for another number of entries, or for one over 64 bits."""
        if len(self.entries) != ENTRIES:
            raise OutOfRange("number of log entries", len(self.entries), f"exactly {ENTRIES}")
        for entry in self.entries:
            require_bits("log entry", entry, 64)

    def logged(self, index: int, first: int = LAST_INDEX) -> tuple[int, ...]:
        """The guest-physical addresses that were written while the PML index went from `first` to `index`.

        In the order of the writes. OutOfRange for an index that no such log can have: `first` is 0 to 511,
        `index` 0 to `first`, or FFFFH.
        """
        if not 0 <= first <= LAST_INDEX:
            raise OutOfRange("PML index at the start", first, f"0 to {LAST_INDEX}")
        if index != FULL and not 0 <= index <= first:
            raise OutOfRange("PML index", index, f"it went down from {first:#x}, at last to {FULL:#x}")
        count = first - index if index != FULL else first + 1
        return tuple(self.entries[first - n] for n in range(count))

    def to_bytes(self) -> bytes:
        """The 4096 bytes of the log."""
        return struct.pack(f"<{ENTRIES}Q", *self.entries)

    @classmethod
    def from_bytes(cls, data: bytes) -> PageModificationLog:
        """The log in a page of memory; OutOfRange for another size than 4096 bytes."""
        if len(data) != PAGE_SIZE:
            raise OutOfRange("size of a page-modification log", len(data), f"exactly {PAGE_SIZE} bytes")
        return cls(struct.unpack(f"<{ENTRIES}Q", data))
