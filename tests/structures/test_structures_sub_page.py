"""SubPagePermissionTable: four levels of tables, and a bit for each 128 bytes."""

from __future__ import annotations

import struct

import pytest

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.structures import SubPagePermissionTable
from vmxlab.structures.sub_page import permission_vector

BASE = 0x100_0000
PAGE = 5 << 39 | 6 << 30 | 7 << 21 | 8 << 12


def entry(tables: dict[int, bytes], table: int, index: int) -> int:
    return struct.unpack_from("<Q", tables[table], 8 * index)[0]


def walk(table: SubPagePermissionTable, gpa: int) -> list[int]:
    """The entries of levels 4 to 1 that are used for `gpa`; it ends where one is not valid."""
    tables, at, entries = dict(table.tables(BASE)), BASE, []
    for level in (4, 3, 2, 1):
        entries.append(entry(tables, at, gpa >> 12 + 9 * (level - 1) & 511))
        if level == 1 or not entries[-1] & 1:
            return entries
        at = entries[-1] & ~0xFFF
    return entries


def test_a_vector_has_the_even_bits_of_its_sub_pages():
    assert permission_vector([]) == 0
    assert permission_vector([0, 1, 31]) == 1 | 4 | 1 << 62
    assert permission_vector(range(32)) == 0x5555_5555_5555_5555


def test_an_empty_table_is_one_page_of_zeros():
    assert SubPagePermissionTable().tables(BASE) == [(BASE, bytes(4096))]


def test_a_walk_ends_at_the_vector_of_its_page():
    table = SubPagePermissionTable()
    table.allow(PAGE, [3])
    entries = walk(table, PAGE)
    assert entries[3] == 1 << 6
    assert [value & 0xFFF for value in entries[:3]] == [1, 1, 1]
    assert sorted(value & ~0xFFF for value in entries[:3]) == [BASE + 0x1000 * n for n in (1, 2, 3)]
    assert walk(table, PAGE + 0x1000)[3] == 0
    assert len(walk(table, 0)) == 1


def test_pages_share_the_tables_above_them():
    table = SubPagePermissionTable()
    for page in (0, 0x1000, 0x20_0000, 1 << 30, 1 << 39):
        table.allow(page, [page >> 12 & 31])
    assert table.table_count == 1 + 2 + 3 + 4
    for page in (0, 0x1000, 0x20_0000, 1 << 30, 1 << 39):
        assert walk(table, page)[3] == permission_vector([page >> 12 & 31])


def test_the_order_of_calls_does_not_matter():
    one, other = SubPagePermissionTable(), SubPagePermissionTable()
    pages = [PAGE, 0x3000, 1 << 30]
    for page in pages:
        one.allow(page, [1])
    for page in reversed(pages):
        other.allow(page, [1])
    assert one.tables(BASE) == other.tables(BASE)


def test_a_later_call_replaces_the_vector():
    table = SubPagePermissionTable()
    table.allow(PAGE, range(32))
    table.allow(PAGE, [0])
    assert walk(table, PAGE)[3] == 1


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_a_raw_entry_stands_in_for_its_level(level):
    table = SubPagePermissionTable()
    table.allow(PAGE, [3])
    table.set_raw_entry(PAGE, level, 0xABC0)
    entries = walk(table, PAGE)
    assert len(entries) == 5 - level
    assert entries[-1] == 0xABC0


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_a_raw_entry_needs_no_page_below_it(level):
    table = SubPagePermissionTable()
    table.set_raw_entry(PAGE, level, 2)
    assert walk(table, PAGE)[-1] == 2
    assert table.table_count == 5 - level


def test_it_says_which_bytes_may_be_written():
    table = SubPagePermissionTable()
    table.allow(PAGE, [0, 31])
    answers = [table.writable(PAGE + offset) for offset in (0, 127, 128, 0xF7F, 0xF80, 0xFFF)]
    assert answers == [True, True, False, False, True, True]
    assert not table.writable(PAGE + 0x1000)


def test_what_can_not_be_is_refused():
    table = SubPagePermissionTable()
    with pytest.raises(OutOfRange):
        table.allow(PAGE, [32])
    with pytest.raises(Misaligned):
        table.allow(PAGE + 128, [0])
    with pytest.raises(OutOfRange):
        table.allow(1 << 48, [0])
    with pytest.raises(OutOfRange):
        table.set_raw_entry(PAGE, 5, 0)
    with pytest.raises(OutOfRange):
        table.set_raw_entry(PAGE, 1, 1 << 64)
    with pytest.raises(Misaligned):
        table.tables(BASE + 8)
