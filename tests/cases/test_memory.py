"""L2's memory: what lies where, and what the default EPT makes of it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmxlab import guest_ept
from vmxlab.cases import memory
from vmxlab.image import layout

PAGES = range(0, memory.L2_MEMORY_BYTES, 0x1000)

# What each thing in L2's memory takes: first byte, and the one behind it.
PARTS = [
    ("vectors of real mode", 0, 0x400),
    ("GDT", memory.GDT, memory.GDT + 5 * 8),
    ("TSS", memory.TSS, memory.TSS + 0x68),
    ("IDT", memory.IDT, memory.IDT + 0x1000),
    ("page tables", memory.PAGE_TABLES, memory.PAGE_TABLES + 4 * 0x1000),
    ("stack", memory.STACK_TOP - 0xFF0, memory.STACK_TOP),
    ("program", memory.PROGRAM, memory.PROGRAM_LIMIT),
    ("data", memory.DATA, memory.L2_MEMORY_BYTES),
]


def test_nothing_in_l2s_memory_overlaps():
    for (what, _, end), (next_, start, _) in pairwise(PARTS):
        assert end <= start, f"{what} runs into {next_}"
    assert PARTS[-1][2] == 128 * 1024


def test_page_tables_and_descriptor_tables_start_where_the_processor_wants_them():
    assert memory.PAGE_TABLES % 0x1000 == 0
    assert memory.L2_MEMORY % (2 << 20) == 0, "one large EPT page can map it"
    assert memory.GDT % 8 == memory.IDT % 8 == memory.STACK_TOP % 16 == 0


def test_l2s_memory_belongs_to_the_case_and_to_nothing_else():
    end = memory.L2_MEMORY + memory.L2_MEMORY_BYTES
    assert (
        layout.EPT_TABLES + layout.EPT_TABLES_MAX * 4096
        <= memory.L2_MEMORY
        < end
        <= layout.FREE_PAGES
        < layout.CASE_LIMIT
    )


@pytest.fixture
def default_pages(page_walker):
    """What the tables of the default EPT map, by a walk of their bytes."""
    tables = dict(guest_ept().tables(layout.EPT_TABLES))
    return page_walker(tables.__getitem__).pages(layout.EPT_TABLES, present=page_walker.PRESENT_IN_EPT)


def test_the_default_ept_maps_l2s_memory_and_no_more(default_pages):
    mapped = [(page.linear, page.bytes, page.physical) for page in default_pages]
    assert mapped == [(page, 0x1000, memory.L2_MEMORY + page) for page in PAGES]


def test_the_default_ept_lets_l2_read_write_and_execute_write_back_memory(default_pages):
    """SDM Vol. 3C, table 29-7: bits 2:0 are read, write, execute, and 10 execute in user mode; 5:3 is WB."""
    assert {page.entry for page in default_pages} == {1 << 10 | 6 << 3 | 0b111}


@pytest.mark.parametrize("gpa", [memory.UNMAPPED, memory.L2_MEMORY_BYTES, memory.L2_MEMORY, 1 << 39])
def test_what_is_not_l2s_is_not_mapped(default_pages, gpa):
    assert all(not page.linear <= gpa < page.linear + page.bytes for page in default_pages)


def test_each_default_ept_is_a_fresh_one():
    one = guest_ept()
    one.unmap(0, 0x1000)
    assert one != guest_ept()


@pytest.mark.parametrize("gpa", [0, memory.PROGRAM, memory.L2_MEMORY_BYTES - 1])
def test_machine_address_is_where_the_default_ept_leads(default_pages, gpa):
    assert memory.machine_address(gpa) == default_pages[gpa // 0x1000].physical + gpa % 0x1000


def test_programs_know_the_addresses_by_name():
    assert memory.PROGRAM_SYMBOLS == {"DATA": 0x10000, "UNMAPPED": 0x100000, "STACK_TOP": 0x7FF0}
