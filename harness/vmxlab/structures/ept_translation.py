"""What EPT paging structures make of an address: the end of a walk (SDM Vol. 3C, 29.3.2 and 29.3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_

from vmxlab.sdm.registers import MemoryType
from vmxlab.structures.capability_msrs import memory_type
from vmxlab.structures.ept_entry import (
    ADDRESS,
    EXECUTE,
    IGNORE_PAT,
    MEMORY_TYPE,
    MEMORY_TYPE_SHIFT,
    READ,
    USER_EXECUTE,
    WRITE,
    PageSize,
    shift_of,
)


@dataclass(frozen=True, slots=True)
class Translation:
    """What the tables say of one guest-physical address.

    `hpa` is the physical address of that byte, `size` the size of its page in bytes. The rights are those
    of all entries of the walk together; `user_execute` (bit 10) counts only with mode-based execute
    control. `entries` are the values from the PML4E down, those that lead to a table without its address.
    Whether an entry is misconfigured is not said here but by `Ept.check`.
    """

    gpa: int
    hpa: int
    size: PageSize
    read: bool
    write: bool
    execute: bool
    user_execute: bool
    memory_type: MemoryType | int
    ignore_pat: bool
    entries: tuple[int, ...]

    @classmethod
    def of_walk(cls, gpa: int, entries: Sequence[int], level: int) -> Translation:
        """The translation by a walk's entries, the last of which, of this level, maps a page."""
        rights = reduce(and_, entries)
        page = entries[-1]
        size = PageSize(1 << shift_of(level))
        return cls(
            gpa=gpa,
            hpa=page & ADDRESS & -size | gpa & size - 1,
            size=size,
            read=bool(rights & READ),
            write=bool(rights & WRITE),
            execute=bool(rights & EXECUTE),
            user_execute=bool(rights & USER_EXECUTE),
            memory_type=memory_type((page & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT),
            ignore_pat=bool(page & IGNORE_PAT),
            entries=tuple(entries),
        )
