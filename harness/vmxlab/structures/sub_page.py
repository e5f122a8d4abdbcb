"""Sub-page-permission tables: which 128 bytes of a page may be written (SDM Vol. 3C, 29.3.4).

Four levels of tables, as EPT has, for pages whose EPT PTE does not allow writes but has bit 61 set. An entry
of levels 4 to 2 leads to a table, by bit 0 (valid) and bits 51:12; one of level 1 holds a bit for each of the
page's 32 sub-pages: bit 2n allows writes to sub-page n, odd bits are reserved.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import PAGE_SIZE, require_aligned, require_bits, require_page_address

SUB_PAGE_SIZE = 128
SUB_PAGES = PAGE_SIZE // SUB_PAGE_SIZE
VALID = 1 << 0
"""Bit 0 of an entry that leads to a table."""

_ENTRIES = 512
_GPA_BITS = 48
_ROOT_LEVEL = 4


def permission_vector(writable: Iterable[int]) -> int:
    """The level-1 entry that allows writes to these sub-pages (0 to 31; else OutOfRange) and no others."""
    vector = 0
    for number in writable:
        if not 0 <= number < SUB_PAGES:
            raise OutOfRange(
                "number of a sub-page", number, f"a page has {SUB_PAGES} of {SUB_PAGE_SIZE} bytes"
            )
        vector |= 1 << 2 * number
    return vector


class SubPagePermissionTable:
    """Sub-page-permission tables for 48-bit guest-physical addresses. Mutable.

    Entries that nothing was said of are 0: not valid at levels 4 to 2 (an SPP miss), no sub-page writable at
    level 1.
    """

    __slots__ = ("_raw", "_vectors")

    def __init__(self) -> None:
        """No page has permissions: one empty table."""
        self._vectors: dict[int, int] = {}
        self._raw: dict[tuple[int, int], int] = {}

    def allow(self, gpa: int, writable: Iterable[int]) -> None:
        """Let these sub-pages (0 to 31) of the page at `gpa` be written, and no others of it.

        OutOfRange for another sub-page or an address over 48 bits, Misaligned for one that is no page's.
        """
        self._vectors[_page(gpa)] = permission_vector(writable)

    def set_raw_entry(self, gpa: int, level: int, value: int) -> None:
        """Put any 64-bit value into the entry of this level (4 to 1) that is used for `gpa`.

        For tests of what is invalid: bits that are reserved, a table that is not valid. At levels 4 to 2 it
        replaces the whole entry, address included. OutOfRange for what is no level or no 64-bit value.
        """
        if not 1 <= level <= _ROOT_LEVEL:
            raise OutOfRange("level of a sub-page-permission table", level, "1 to 4")
        self._raw[_prefix(_page(gpa), level - 1), level] = require_bits("entry", value, 64)

    def writable(self, gpa: int) -> bool:
        """Whether the sub-page of the byte at `gpa` may be written, by what `allow` said."""
        require_bits("guest-physical address", gpa, _GPA_BITS)
        vector = self._vectors.get(gpa & -PAGE_SIZE, 0)
        return bool(vector >> 2 * (gpa % PAGE_SIZE // SUB_PAGE_SIZE) & 1)

    @property
    def table_count(self) -> int:
        """How many pages the tables take."""
        return len(self._tables())

    def tables(self, base: int) -> list[tuple[int, bytes]]:
        """The tables as (physical address, 4096 bytes): the root at `base`, the others behind it.

        Misaligned or OutOfRange for a base where they can't lie.
        """
        order = self._tables()
        require_page_address("address of the sub-page-permission tables", base, pages=len(order))
        place = {table: base + PAGE_SIZE * n for n, table in enumerate(order)}
        return [(address, self._table(table, place)) for table, address in place.items()]

    def _tables(self) -> list[tuple[int, int]]:
        """(prefix of the addresses it is for, level) of each table, root first."""
        used = [(page, 1) for page in self._vectors]
        used += [(entry << _shift(level), level) for entry, level in self._raw]
        tables = {(0, _ROOT_LEVEL)}
        for gpa, lowest in used:
            tables |= {(_prefix(gpa, level), level) for level in range(lowest, _ROOT_LEVEL)}
        return sorted(tables, key=lambda table: (-table[1], table[0]))

    def _table(self, table: tuple[int, int], place: dict[tuple[int, int], int]) -> bytes:
        prefix, level = table
        entries = [0] * _ENTRIES
        for index in range(_ENTRIES):
            own = prefix << 9 | index  # the prefix of what this entry is for
            if (own, level) in self._raw:
                entries[index] = self._raw[own, level]
            elif level == 1:
                entries[index] = self._vectors.get(own << 12, 0)
            elif (own, level - 1) in place:
                entries[index] = place[own, level - 1] | VALID
        return struct.pack(f"<{_ENTRIES}Q", *entries)


def _shift(level: int) -> int:
    """The lowest bit of an address that selects an entry of this level."""
    return 12 + 9 * (level - 1)


def _prefix(gpa: int, level: int) -> int:
    """What addresses have in common for which there is one table of this level."""
    return gpa >> _shift(level + 1)


def _page(gpa: int) -> int:
    require_bits("guest-physical address", gpa, _GPA_BITS)
    return require_aligned("guest-physical address of a page", gpa, PAGE_SIZE)
