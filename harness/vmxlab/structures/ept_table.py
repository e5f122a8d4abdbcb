"""Tables of EPT entries as `Ept` keeps them: sparse, each with the tables below it."""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.errors import CaseError
from vmxlab.structures.checks import PAGE_SIZE
from vmxlab.structures.ept_entry import (
    ENTRIES,
    LARGE,
    LEVEL_NAMES,
    REFERENCE,
    SUB_PAGE_WRITE,
    is_page,
    shift_of,
)


class EptTable:
    """One table. `entries` maps indexes to 64-bit values; what is not in it is 0.

    An index that is also in `children` leads to that table, and its value has no address yet.
    """

    __slots__ = ("children", "entries", "level")

    def __init__(self, level: int) -> None:
        """An empty table whose entries are of this level."""
        self.level = level
        self.entries: dict[int, int] = {}
        self.children: dict[int, EptTable] = {}

    def index_of(self, gpa: int) -> int:
        """Which entry of this table translates a guest-physical address."""
        return gpa >> shift_of(self.level) & ENTRIES - 1

    def copy(self) -> EptTable:
        """The table and everything below it, apart from this one."""
        table = EptTable(self.level)
        table.entries = self.entries.copy()
        table.children = {index: child.copy() for index, child in self.children.items()}
        return table

    def __eq__(self, other: object) -> bool:
        """Equal when they give the same bytes."""
        if not isinstance(other, EptTable):
            return NotImplemented
        return self.entries == other.entries and self.children == other.children

    def place(self, gpa: int) -> Iterator[tuple[int, EptTable]]:
        """This table and all below it with the first address each translates, upper levels first."""
        tables = [(gpa, self)]
        while tables:
            yield from tables
            tables = [
                (first + (index << shift_of(table.level)), child)
                for first, table in tables
                for index, child in sorted(table.children.items())
            ]

    def leaves(self, gpa: int, first: int, last: int) -> Iterator[tuple[int, EptTable, int]]:
        """Entries without a table below that control any of the addresses `first` to `last`, in order.

        Yields (first address the entry controls, its table, its index); `gpa` is this table's first address.
        """
        shift = shift_of(self.level)
        low = max(first - gpa, 0) >> shift
        high = min(last - gpa >> shift, ENTRIES - 1)
        span: Iterator[int] | range = range(low, high + 1)
        if len(self.entries) < high - low + 1:
            span = iter(sorted(index for index in self.entries if low <= index <= high))
        for index in span:
            start = gpa + (index << shift)
            child = self.children.get(index)
            if child is not None:
                yield from child.leaves(start, first, last)
            elif index in self.entries:
                yield start, self, index

    def prune(self, changed: set[int]) -> bool:
        """Take away the tables below that hold nothing, if they are among `changed` (ids) or lead to those.

        Returns whether this one is to go too. Tables that were made empty on purpose stay.
        """
        empty = [index for index, child in self.children.items() if child.prune(changed)]
        for index in empty:
            del self.children[index], self.entries[index]
        return not self.entries and (bool(empty) or id(self) in changed)

    def walk(self, gpa: int, level: int = 1) -> tuple[EptTable, int]:
        """The lowest table on the way to `gpa`, none below `level`, and the index of its entry there."""
        table = self
        while table.level > level and (child := table.children.get(table.index_of(gpa))) is not None:
            table = child
        return table, table.index_of(gpa)

    def make(self, gpa: int, level: int) -> EptTable:
        """The table of `level` on the way to `gpa`, made with those above it where they aren't there yet.

        No entry that maps a larger page may be in the way.
        """
        table = self
        while table.level > level:
            index = table.index_of(gpa)
            child = table.children.get(index)
            if child is None:
                child = table.children[index] = EptTable(table.level - 1)
                table.entries[index] = REFERENCE
            table = child
        return table

    def split(self, index: int) -> None:
        """Replace the large page of an entry by a table of 512 smaller ones, otherwise the same.

        CaseError for a raw entry whose parts would not mean what the whole did.
        """
        entry, size = self.entries[index], 1 << shift_of(self.level)
        if not is_page(entry, self.level) or entry & (size - PAGE_SIZE | SUB_PAGE_WRITE):
            name = LEVEL_NAMES[self.level]
            raise CaseError(f"the raw {name} {entry:#x} can't be split into smaller pages")
        child = EptTable(self.level - 1)
        first, step = entry & ~LARGE if self.level == 2 else entry, size // ENTRIES
        child.entries = dict(zip(range(ENTRIES), range(first, first + size, step), strict=True))
        self.children[index] = child
        self.entries[index] = REFERENCE


def spans(gpa: int, level: int, count: int) -> Iterator[tuple[int, int, int]]:
    """`count` entries of a level from `gpa` on, a piece for each table: (first address, index, how many)."""
    shift = shift_of(level)
    while count:
        index = gpa >> shift & ENTRIES - 1
        number = min(count, ENTRIES - index)
        yield gpa, index, number
        gpa += number << shift
        count -= number
