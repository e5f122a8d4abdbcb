"""EPT paging structures of four levels: mapped in Python, final bytes for the processor (SDM Vol. 3C, 29.3).

    ept = Ept()
    ept.map(0x0000, 0x100_0000, length=0x2_0000)         # 32 pages of 4 KiB, all rights, write-back
    ept.protect(0x3000, 0x1000, write=False)
    image_pages = ept.tables(0x20_0000)                  # PML4 table at 2 MiB, the others after it
    eptp = EPTPointer.from_table_phys(0x20_0000)

Addresses are in bytes. The same mappings give the same bytes, in whatever order they were made.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vmxlab.errors import CaseError, OutOfRange, OverlappingPages
from vmxlab.sdm.registers import MemoryType
from vmxlab.structures.capability_msrs import EptVpidCap
from vmxlab.structures.checks import (
    MAX_PHYSICAL_ADDRESS_WIDTH,
    PAGE_SIZE,
    BrokenRule,
    require_aligned,
    require_bits,
    require_page_address,
    require_width,
)
from vmxlab.structures.ept_entry import (
    ADDRESS,
    ENTRIES,
    EXECUTE,
    LARGE,
    LEVEL_NAMES,
    READ,
    USER_EXECUTE,
    WRITE,
    EptFault,
    PageSize,
    address_bits,
    change_bits,
    is_page,
    is_present,
    misconfigurations,
    shift_of,
)
from vmxlab.structures.ept_table import EptTable, spans
from vmxlab.structures.ept_translation import Translation
from vmxlab.structures.ept_tree import EntryRun, draw, runs_below

_LEVELS = 4
_GPA_BITS = 48
_ALL_RIGHTS = READ | WRITE | EXECUTE | USER_EXECUTE
_pack = struct.Struct("<512Q").pack


class Ept:
    """EPT paging structures for 48-bit guest-physical addresses, mutable; `copy()` gives some of their own.

    `physical_address_width` is the processor's MAXPHYADDR, which limits what may be mapped and where the
    tables may lie; OutOfRange if it is not 32 to 52.
    """

    def __init__(self, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH) -> None:
        """No page mapped: one empty PML4 table."""
        self.physical_address_width = require_width(physical_address_width)
        self._root = EptTable(_LEVELS)

    def map(
        self,
        gpa: int,
        hpa: int,
        size: int = PageSize.SIZE_4K,
        length: int | None = None,
        *,
        read: bool = True,
        write: bool = True,
        execute: bool = True,
        user_execute: bool | None = None,
        memory_type: int = MemoryType.WB,
        ignore_pat: bool = False,
        accessed: bool = False,
        dirty: bool = False,
        suppress_ve: bool = False,
        supervisor_shadow_stack: bool = False,
        paging_write: bool = False,
        verify_guest_paging: bool = False,
        sub_page_write: bool = False,
        raw: int | None = None,
        replace: bool = False,
    ) -> None:
        """Map `length` bytes at guest-physical `gpa` to physical memory at `hpa`, by pages of `size`.

        `length` is one page if it is None. Rights and memory type may be any combination, also one that the
        processor takes for a misconfiguration. `user_execute` (bit 10) is as `execute` where it is None.
        `raw` gives all bits of the entries but the address and the page-size bit, in place of the
        attributes.

        Misaligned if `gpa`, `hpa` or `length` is no multiple of `size`; OutOfRange for another size, a
        length of 0, or addresses too wide. OverlappingPages if something is mapped there already, unless
        `replace`; a page inside a larger one needs `split` first in any case. Nothing is changed when it
        raises.
        """
        page = _page_size(size)
        count = self._check_range(gpa, hpa, page, page if length is None else length)
        bits = LARGE if page.level > 1 else 0
        if raw is None:
            bits |= change_bits(
                page.level,
                read=read,
                write=write,
                execute=execute,
                user_execute=user_execute,
                memory_type=memory_type,
                ignore_pat=ignore_pat,
                accessed=accessed,
                dirty=dirty,
                suppress_ve=suppress_ve,
                supervisor_shadow_stack=supervisor_shadow_stack,
                paging_write=paging_write,
                verify_guest_paging=verify_guest_paging,
                sub_page_write=sub_page_write,
            )[0]
        else:
            bits |= self._check_raw(raw, page)
        self._refuse_overlap(gpa, page.level, count, replace)
        for start, index, number in spans(gpa, page.level, count):
            table = self._root.make(start, page.level)
            if table.children:
                for covered in range(index, index + number):
                    table.children.pop(covered, None)
            entry = hpa + (start - gpa) | bits
            table.entries.update(
                zip(range(index, index + number), range(entry, entry + number * page, page), strict=True)
            )

    def unmap(self, gpa: int, length: int, *, missing_ok: bool = False) -> None:
        """Take away whatever maps these `length` bytes from `gpa` on; large pages at the edges are split.

        Misaligned for what is no multiple of 4 KiB; CaseError if part of it is not mapped, unless
        `missing_ok`.
        """
        leaves = self._whole_leaves(gpa, length, missing_ok)
        for _, table, index in leaves:
            del table.entries[index]
        self._root.prune({id(table) for _, table, _ in leaves})

    def protect(
        self,
        gpa: int,
        length: int,
        *,
        read: bool | None = None,
        write: bool | None = None,
        execute: bool | None = None,
        user_execute: bool | None = None,
        memory_type: int | None = None,
        ignore_pat: bool | None = None,
        accessed: bool | None = None,
        dirty: bool | None = None,
        suppress_ve: bool | None = None,
        supervisor_shadow_stack: bool | None = None,
        paging_write: bool | None = None,
        verify_guest_paging: bool | None = None,
        sub_page_write: bool | None = None,
    ) -> None:
        """Change attributes of the pages of these `length` bytes from `gpa` on; those that are None stay.

        `user_execute` follows `execute` where only that is given. Large pages at the edges are split, and
        every large page for `sub_page_write`. Misaligned for what is no multiple of 4 KiB; CaseError if
        part of it is not mapped, or mapped by a raw entry that leads elsewhere.
        """
        to_set, to_clear = change_bits(
            1,
            read=read,
            write=write,
            execute=execute,
            user_execute=user_execute,
            memory_type=memory_type,
            ignore_pat=ignore_pat,
            accessed=accessed,
            dirty=dirty,
            suppress_ve=suppress_ve,
            supervisor_shadow_stack=supervisor_shadow_stack,
            paging_write=paging_write,
            verify_guest_paging=verify_guest_paging,
            sub_page_write=sub_page_write,
        )
        leaves = self._whole_leaves(gpa, length, False)
        if sub_page_write:
            while any(table.level > 1 for _, table, _ in leaves):
                for _, table, index in leaves:
                    if table.level > 1:
                        table.split(index)
                leaves = self._whole_leaves(gpa, length, False)
        for start, table, index in leaves:
            if not is_page(table.entries[index], table.level):
                raise CaseError(
                    f"the {LEVEL_NAMES[table.level]} of {start:#x} is a raw one that maps no page"
                )
        for _, table, index in leaves:
            table.entries[index] = table.entries[index] & ~to_clear | to_set

    def split(self, gpa: int) -> None:
        """Replace the large page that maps `gpa` by 512 pages of the next smaller size, otherwise the same.

        CaseError if no large page maps it.
        """
        table, index = self._root.walk(gpa)
        if index not in table.entries or table.level == 1:
            raise CaseError(
                f"no large page maps guest-physical address {gpa:#x}, so there is nothing to split"
            )
        table.split(index)

    def set_raw_entry(self, gpa: int, level: int, value: int) -> None:
        """Write any 64-bit value to the entry of this level (4: PML4E, 1: PTE) that translates `gpa`.

        Whatever that entry led to is dropped; an address in it stays as it is. 0 takes the entry away and
        leaves the tables above it. CaseError if a larger page maps `gpa` at a higher level.
        """
        _check_level(level, 1)
        _check_gpa(gpa)
        require_bits(f"EPT {LEVEL_NAMES[level]}", value, 64)
        self._refuse_larger(gpa, level)
        table = self._root.make(gpa, level)
        index = table.index_of(gpa)
        table.children.pop(index, None)
        if value:
            table.entries[index] = value
        else:
            table.entries.pop(index, None)

    def set_table_entry(self, gpa: int, level: int, value: int) -> None:
        """Set the bits, but not the address, of the entry of this level (4 to 2) that leads to a table.

        For rights that are taken away above the page, or a reserved bit there. The table stays where it is.
        CaseError if no table is there, OutOfRange if `value` has any of bits 51:12 set, or bit 7 of a PDPTE
        or PDE, which would then map a page.
        """
        _check_level(level, 2)
        _check_gpa(gpa)
        what = f"EPT {LEVEL_NAMES[level]}"
        if require_bits(what, value, 64) & ADDRESS:
            raise OutOfRange(what, value, "bits 51:12 are the address of the table, which is set later")
        if is_page(value, level):
            raise OutOfRange(what, value, "with bit 7 it would map a page; set_raw_entry writes such a one")
        table, index = self._root.walk(gpa, level)
        if table.level != level or index not in table.children:
            raise CaseError(f"the {LEVEL_NAMES[level]} of {gpa:#x} leads to no table")
        table.entries[index] = value

    def translate(self, gpa: int, *, mode_based_execute: bool = False) -> Translation | None:
        """Walk the tables for one guest-physical address; None if an entry on the way is not present.

        CaseError if a raw entry leads out of these tables; OutOfRange for an address over 48 bits.
        """
        _check_gpa(gpa)
        table, entries = self._root, []
        while True:
            index = table.index_of(gpa)
            entry = table.entries.get(index, 0)
            entries.append(entry)
            if not is_present(entry, mode_based_execute):
                return None
            child = table.children.get(index)
            if child is None:
                break
            table = child
        if not is_page(entry, table.level):
            raise CaseError(f"the raw {LEVEL_NAMES[table.level]} {entry:#x} leads out of these tables")
        return Translation.of_walk(gpa, entries, table.level)

    def leaves(self) -> Iterator[tuple[int, int, int]]:
        """Every entry that leads to no table, as (first address it controls, level, value), in order."""
        for start, table, index in self._root.leaves(0, 0, (1 << _GPA_BITS) - 1):
            yield start, table.level, table.entries[index]

    def table_entries(self) -> Iterator[tuple[int, int, int]]:
        """Every entry that leads to a table, as (first address it controls, level, value without address)."""
        for start, table in self._root.place(0):
            for index in sorted(table.children):
                yield start + (index << shift_of(table.level)), table.level, table.entries[index]

    @property
    def table_count(self) -> int:
        """How many tables there are, the PML4 table included; each takes a page."""
        return sum(1 for _ in self._root.place(0))

    def tables(self, base: int) -> list[tuple[int, bytes]]:
        """All tables as (physical address, 4096 bytes): the PML4 table at `base`, the others after it.

        Upper levels come first, within a level in order of the addresses they translate. Misaligned or
        OutOfRange if they can't lie there.
        """
        addresses = self._addresses(base)
        pages = []
        for _, table in self._root.place(0):
            values = [0] * ENTRIES
            for index, entry in table.entries.items():
                values[index] = entry
            for index, child in table.children.items():
                values[index] |= addresses[id(child)]
            pages.append((addresses[id(table)], _pack(*values)))
        return pages

    def entry_address(self, base: int, gpa: int, level: int = 1) -> int:
        """Where the entry of `level` that translates `gpa` lies, with the tables at `base` as in `tables`.

        For whoever changes an entry on the machine. CaseError if no table of that level translates `gpa`.
        """
        _check_gpa(gpa)
        _check_level(level, 1)
        table = self._root
        while table.level > level:
            below = table.children.get(table.index_of(gpa))
            if below is None:
                raise CaseError(f"no EPT table of level {level} translates {gpa:#x}")
            table = below
        return self._addresses(base)[id(table)] + 8 * table.index_of(gpa)

    def _addresses(self, base: int) -> dict[int, int]:
        """The address of each table, by its id."""
        tables = [table for _, table in self._root.place(0)]
        require_page_address("address of the EPT tables", base, self.physical_address_width, len(tables))
        return {id(table): base + PAGE_SIZE * number for number, table in enumerate(tables)}

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """The same as `tables`, by the name that every structure has for it."""
        return self.tables(base)

    def check(
        self,
        capabilities: EptVpidCap | None = None,
        *,
        mode_based_execute: bool = False,
        physical_address_width: int | None = None,
    ) -> list[EptFault]:
        """Every misconfigured entry, level by level; without `capabilities` only what no processor allows.

        `mode_based_execute` is the VM-execution control of that name; `physical_address_width` is that of the
        processor if these structures were made for a wider one.
        """
        width = require_width(physical_address_width or self.physical_address_width)
        faults = []
        known: dict[tuple[int, int], list[BrokenRule]] = {}  # thousands of pages differ only in their address
        for gpa, table in self._root.place(0):
            level = table.level
            for index, entry in sorted(table.entries.items()):
                kind = level, entry & ~address_bits(entry, level, width)
                if kind not in known:
                    known[kind] = list(
                        misconfigurations(
                            kind[1],
                            level,
                            capabilities,
                            physical_address_width=width,
                            mode_based_execute=mode_based_execute,
                        )
                    )
                faults += [EptFault(gpa + (index << shift_of(level)), level, entry, r) for r in known[kind]]
        return faults

    def tree(self) -> str:
        """The tables drawn as text, alike neighbours on one line; a misconfigured entry is marked."""
        return draw(self._root)

    def runs(self) -> Iterator[EntryRun]:
        """Every entry, alike neighbours as one run; what an entry leads to comes behind it."""
        return runs_below(self._root)

    def copy(self) -> Ept:
        """Paging structures of their own with the same entries."""
        ept = Ept(self.physical_address_width)
        ept._root = self._root.copy()
        return ept

    def __eq__(self, other: object) -> bool:
        """Equal when the tables are."""
        return self._root == other._root if isinstance(other, Ept) else NotImplemented

    def __repr__(self) -> str:
        """How many tables and entries."""
        return f"<Ept: {self.table_count} tables, {sum(1 for _ in self.leaves())} pages>"

    # --- the walk ---

    def _whole_leaves(self, gpa: int, length: int, missing_ok: bool) -> list[tuple[int, EptTable, int]]:
        # The entries that map this range, after splitting those that reach over an edge of it.
        _check_gpa(gpa)
        require_aligned("guest-physical address", gpa, PAGE_SIZE)
        _check_length(length, PAGE_SIZE)
        last = gpa + length - 1
        _check_gpa(last)
        if not missing_ok:
            covered = gpa
            for start, table, _ in self._root.leaves(0, gpa, last):
                if start > covered:
                    break
                covered = start + (1 << shift_of(table.level))
            if covered <= last:
                raise CaseError(f"nothing maps guest-physical address {covered:#x}")
        for edge in (gpa, last + 1):
            while edge < 1 << _GPA_BITS:
                table, index = self._root.walk(edge)
                if index not in table.entries or edge & (1 << shift_of(table.level)) - 1 == 0:
                    break
                table.split(index)
        return list(self._root.leaves(0, gpa, last))

    # --- checks ---

    def _check_range(self, gpa: int, hpa: int, page: PageSize, length: int) -> int:
        _check_length(length, page)
        for what, address, width in (
            ("guest-physical address", gpa, _GPA_BITS),
            ("physical address", hpa, self.physical_address_width),
        ):
            if address < 0 or address + length > 1 << width:
                raise OutOfRange(
                    what,
                    address,
                    f"{length:#x} bytes from there must end at or below {1 << width:#x} ({width} bits)",
                )
            require_aligned(what, address, page)
        return length // page

    def _check_raw(self, raw: int, page: PageSize) -> int:
        if require_bits("raw bits of an EPT entry", raw, 64) & ADDRESS & -page:
            raise OutOfRange("raw bits of an EPT entry", raw, "they must leave the address to `hpa`")
        return raw

    def _refuse_overlap(self, gpa: int, level: int, count: int, replace: bool) -> None:
        shift = shift_of(level)
        for start, index, number in spans(gpa, level, count):
            self._refuse_larger(start, level)
            table, _ = self._root.walk(start, level)
            if replace or table.level != level:
                continue
            wanted = range(index, index + number)
            if not table.entries.keys().isdisjoint(wanted):
                taken = min(table.entries.keys() & set(wanted))
                raise OverlappingPages(
                    f"guest-physical address {start + (taken - index << shift):#x} is mapped already",
                    advice="unmap it first, or say replace=True",
                )

    def _refuse_larger(self, gpa: int, level: int) -> None:
        table, index = self._root.walk(gpa, level)
        if table.level > level and index in table.entries:
            raise OverlappingPages(
                f"guest-physical address {gpa:#x} is mapped by a {LEVEL_NAMES[table.level]} already",
                advice="split that page first, or unmap it",
            )


def _page_size(size: int) -> PageSize:
    try:
        return PageSize(size)
    except ValueError:
        raise OutOfRange("page size", size, "EPT maps pages of 4 KiB, 2 MiB and 1 GiB") from None


def _check_length(length: int, page: int) -> None:
    if length <= 0:
        raise OutOfRange("length", length, "at least one page")
    require_aligned("length", length, page)


def _check_gpa(gpa: int) -> None:
    if not 0 <= gpa < 1 << _GPA_BITS:
        raise OutOfRange("guest-physical address", gpa, f"4 levels of EPT translate {_GPA_BITS} bits")


def _check_level(level: int, lowest: int) -> None:
    if not lowest <= level <= _LEVELS:
        raise OutOfRange("level of an EPT entry", level, f"{lowest} ({LEVEL_NAMES[lowest]}) to 4 (PML4E)")
