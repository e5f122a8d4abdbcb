"""Bitmaps and EPT of a live machine: Python's objects, whose changes follow to the machine's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vmxlab.console.live.memory import store
from vmxlab.image import layout
from vmxlab.image.compiler import ept_tables
from vmxlab.structures import Ept, IOBitmap, MsrBitmap

_WORD = 8
_GAP_WORDS = 2
"""Two changes with so few words between them travel as one."""


@dataclass(slots=True)
class LiveStructures:
    """What Python has of the machine's structures, and what the machine's memory was given of them.

    A change is what differs between the two: whatever else was written to these pages, by L2 or by hand,
    stays as it is.
    """

    io_bitmap: IOBitmap | None = None
    msr_bitmap: MsrBitmap | None = None
    ept: Ept | None = None
    _sent: dict[int, bytes] = field(default_factory=dict)

    def _pages(self) -> Iterator[tuple[int, bytes]]:
        if self.io_bitmap is not None:
            yield layout.IO_BITMAP_A, self.io_bitmap.a
            yield layout.IO_BITMAP_B, self.io_bitmap.b
        if self.msr_bitmap is not None:
            yield layout.MSR_BITMAP, self.msr_bitmap.to_bytes()
        if self.ept is not None:
            yield from ept_tables(self.ept)

    def changed(self) -> dict[int, bytes]:
        """The pages that are not as they were given to the machine. OutOfRange for too many EPT tables."""
        return {address: page for address, page in self._pages() if self._sent.get(address) != page}

    def units(self, changed: Mapping[int, bytes]) -> list[bytes]:
        """The operations that bring these pages to the machine."""
        units: list[bytes] = []
        for address, page in changed.items():
            before = self._sent.get(address)
            if before is None:
                units += store(address, page)
                continue
            for start, end in _differences(before, page):
                units += store(address + start, page[start:end])
        return units

    def arrived(self, changed: Mapping[int, bytes]) -> None:
        """The machine has these pages."""
        self._sent.update(changed)


def is_ept_table(address: int) -> bool:
    """Whether an EPT paging structure lies there."""
    return layout.EPT_TABLES <= address < layout.ENTRY_MSR_LOAD_AREA


def _differences(before: bytes, after: bytes) -> list[tuple[int, int]]:
    """Ranges that differ, in whole words: no entry is ever seen half written."""
    ranges: list[tuple[int, int]] = []
    for start in range(0, len(after), _WORD):
        end = start + _WORD
        if before[start:end] == after[start:end]:
            continue
        if ranges and start - ranges[-1][1] <= _GAP_WORDS * _WORD:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges
