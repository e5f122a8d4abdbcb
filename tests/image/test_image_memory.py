"""What a case lays out in memory, and what it may not."""

from __future__ import annotations

import pytest

from vmxlab import (
    Ept,
    ExitReason,
    Field,
    IOBitmap,
    Mode,
    MsrBitmap,
    PrimaryControls,
    SecondaryControls,
    on,
)
from vmxlab.cases import memory
from vmxlab.cases.steps import Store
from vmxlab.errors import MissingCapability, OutOfRange, OverlappingPages, ProgramError
from vmxlab.image import layout

HLT = b"\xf4"
L2 = memory.L2_MEMORY


# --- memory -------------------------------------------------------------------------------------------------


def test_l2s_memory_holds_its_program_its_data_and_else_zeros(script_of):
    read = script_of(program=b"\x90\x90\xf4", data={0x10000: b"data", 0x1FFFF: b"!"}).read()
    assert read(L2 + memory.PROGRAM, 4) == b"\x90\x90\xf4\0"
    assert read(L2 + 0x10000, 5) == b"data\0"
    assert read(L2 + 0x1FFFE, 2) == b"\0!"
    rest = read(L2, memory.L2_MEMORY_BYTES)
    assert rest[:0x1000] == bytes(0x1000)
    assert b"\xcc" not in rest, "nothing of what another case left"


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.PROTECTED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["skylake", "penryn"])
def test_l2s_page_tables_are_in_its_memory(script_of, page_walker, mode, name):
    script = script_of(name, mode=mode)
    read = script.read()
    fields = script.fields
    with_ept = name == "skylake"
    levels, entry_bytes = (4, 8) if mode is Mode.LONG else (2, 4)
    base = L2 if with_ept else 0
    pages = page_walker(lambda a: read(base + a)).pages(
        fields[Field.GUEST_CR3], levels=levels, entry_bytes=entry_bytes
    )
    assert sum(page.bytes for page in pages) == (1 << 30 if with_ept else memory.L2_MEMORY_BYTES)
    program = next(p for p in pages if p.linear <= memory.PROGRAM < p.linear + p.bytes)
    physical = program.physical + memory.PROGRAM - program.linear
    assert read(base + physical, 1) == HLT


def test_ept_is_laid_out_from_its_root_and_leads_to_l2s_memory(script_of, page_walker):
    script = script_of()
    eptp = script.fields[Field.EPT_POINTER]
    assert eptp & 0xFFF == 3 << 3 | 6, "walk length 4, write-back; accessed and dirty flags off"
    walker = page_walker(script.read())
    pages = walker.pages(eptp & ~0xFFF, present=page_walker.PRESENT_IN_EPT)
    mapped = [(page.linear, page.physical) for page in pages]
    assert mapped == [(a, L2 + a) for a in range(0, memory.L2_MEMORY_BYTES, 4096)]


def test_an_ept_of_its_own_replaces_the_default_one(script_of, page_walker):
    ept = Ept()
    ept.map(0, 0x20_0000, size=2 << 20)
    script = script_of(ept=ept)
    root = script.fields[Field.EPT_POINTER] & ~0xFFF
    pages = page_walker(script.read()).pages(root, present=page_walker.PRESENT_IN_EPT)
    assert [(p.linear, p.bytes, p.physical) for p in pages] == [(0, 2 << 20, 2 << 20)]


@pytest.mark.parametrize("eptp", [0, 0xFFFF_FFFF_FFFF_FFFF, 0x100_0006])
def test_an_eptp_of_its_own_is_written_as_it_is(compiled, eptp):
    assert compiled(eptp=eptp).fields[Field.EPT_POINTER] == eptp


def test_without_ept_there_is_no_eptp_and_no_table(script_of):
    script = script_of("penryn")
    assert Field.EPT_POINTER not in script.fields
    assert script.read()(layout.EPT_TABLES) == b"\xcc" * 4096


def test_with_the_secondary_controls_inactive_l2_runs_on_its_own_page_tables(script_of):
    """SDM Vol. 3C, 25.6.2: where they are not activated, the processor works as if they were all 0."""
    fields = script_of(disable=PrimaryControls.ACTIVATE_SECONDARY_CONTROLS).fields
    assert fields[Field.GUEST_CR3] == script_of("penryn").fields[Field.GUEST_CR3]
    assert Field.EPT_POINTER not in fields


def test_both_io_bitmaps_are_laid_out_and_pointed_to(script_of):
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0, True)
    bitmap.set_intercept(0xFFFF, True)
    script = script_of(io_bitmap=bitmap)
    fields, read = script.fields, script.read()
    assert read(fields[Field.IO_BITMAP_A]) == b"\x01" + bytes(4095)
    assert read(fields[Field.IO_BITMAP_B]) == bytes(4095) + b"\x80"


def test_the_msr_bitmap_is_laid_out_and_pointed_to(script_of):
    bitmap = MsrBitmap.intercept_all()
    script = script_of(msr_bitmap=bitmap)
    assert script.read()(script.fields[Field.MSR_BITMAP]) == bitmap.to_bytes() == b"\xff" * 4096


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        (PrimaryControls.USE_IO_BITMAPS, [Field.IO_BITMAP_A, Field.IO_BITMAP_B]),
        (PrimaryControls.USE_MSR_BITMAPS, [Field.MSR_BITMAP]),
        (SecondaryControls.VMCS_SHADOWING, [Field.VMREAD_BITMAP, Field.VMWRITE_BITMAP]),
    ],
)
def test_a_bitmap_that_is_used_but_not_given_is_all_zeros(script_of, flag, fields):
    """Not what another case left in its place, nor whatever lies at address 0."""
    script = script_of(enable=flag)
    for field in fields:
        assert script.read()(script.fields[field]) == bytes(4096)


def test_vmread_and_vmwrite_bitmaps_are_laid_out(script_of):
    script = script_of(
        vmread_bitmap=b"\x11" * 4096, vmwrite_bitmap=b"\x22" * 4096, enable=SecondaryControls.VMCS_SHADOWING
    )
    fields, read = script.fields, script.read()
    assert read(fields[Field.VMREAD_BITMAP]) == b"\x11" * 4096
    assert read(fields[Field.VMWRITE_BITMAP]) == b"\x22" * 4096


def test_pages_of_the_case_are_written_where_it_says(script_of):
    read = script_of(memory={layout.FREE_PAGES: b"abc", layout.CASE_LIMIT - 1: b"z"}).read()
    assert read(layout.FREE_PAGES, 4) == b"abc\xcc"
    assert read(layout.CASE_LIMIT - 1, 1) == b"z"


# --- what can't be laid out ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "one", "other"),
    [
        ({"data": {memory.PROGRAM - 1: b"xy"}}, "data at L2 address 0x7fff", "the guest program"),
        ({"data": {memory.PROGRAM: b"x"}}, "data at L2 address 0x8000", "the guest program"),
        ({"data": {memory.GDT + 8: b"x"}}, "data at L2 address 0x1008", "L2's descriptor and page tables"),
        (
            {"data": {0x10000: b"ab", 0x10001: b"c"}},
            "data at L2 address 0x10001",
            "data at L2 address 0x10000",
        ),
        ({"memory": {layout.VMCS_REGION: b"x"}}, "the case's memory at 0x1001000", "VMCS region"),
        ({"memory": {layout.VMXON_REGION + 4095: b"x"}}, "the case's memory at 0x1000fff", "VMXON region"),
        ({"memory": {L2: b"x"}}, "the case's memory at 0x1200000", "L2's memory"),
        ({"memory": {layout.EPT_TABLES: b"x"}}, "the case's memory at 0x1010000", "EPT paging structure"),
        (
            {"memory": {layout.IO_BITMAP_B: b"x"}, "io_bitmap": IOBitmap()},
            "the case's memory at 0x1004000",
            "I/O bitmap B",
        ),
        (
            {"memory": {layout.FREE_PAGES: bytes(2), layout.FREE_PAGES + 1: b"x"}},
            "the case's memory at 0x1400001",
            "the case's memory at 0x1400000",
        ),
    ],
)
def test_two_things_in_one_place_are_both_named(refused, case, one, other):
    error = refused(OverlappingPages, **case)
    assert one in error.message
    assert other in error.message
    assert f"{layout.FREE_PAGES:#x}" in error.advice


@pytest.mark.parametrize(
    "case",
    [
        {"memory": {layout.IO_BITMAP_A: b"x"}},
        {"memory": {layout.SHADOW_VMCS_REGION: b"x"}},
        {"data": {memory.PROGRAM + 1: b"x", memory.PROGRAM_LIMIT - 1: b"y", 0x7FFF: b"z"}},
        {"data": {memory.PROGRAM: b""}},
        {"memory": {layout.FREE_PAGES: b"a", layout.FREE_PAGES + 1: b"b"}},
    ],
)
def test_neighbours_and_unused_places_do_not_overlap(compiled, case):
    assert compiled(**case).units


OUTSIDE = pytest.mark.parametrize(
    ("address", "content"),
    [
        (0, b"x"),
        (layout.MONITOR_BASE, b"x"),
        (layout.PAYLOAD_BASE, b"x"),
        (layout.CASE_BASE - 1, b"x"),
        (layout.CASE_LIMIT, b"x"),
        (layout.CASE_LIMIT - 1, b"xy"),
        ((1 << 64) - 1, b"x"),
    ],
)


@OUTSIDE
@pytest.mark.parametrize("how", ["memory", "Store", "reaction"])
def test_a_case_writes_to_nothing_but_its_own_part_of_memory(refused, how, address, content):
    case = {
        "memory": {"memory": {address: content}},
        "Store": {"steps": [Store(address, content)]},
        "reaction": {"reactions": [on(ExitReason.CPUID).write(address, content)]},
    }[how]
    error = refused(OutOfRange, **case)
    assert error.value == address
    assert "0x1000000 to 0x3ffffff" in error.limit


def test_a_processor_that_lacks_something_is_no_error_of_the_case(refused):
    error = refused(MissingCapability, "penryn", mode=Mode.REAL)
    assert error.feature == "ENABLE_EPT"


def test_a_program_that_does_not_assemble_says_so(refused):
    error = refused(ProgramError, program="hlt\nfrobnicate rax")
    assert "frobnicate" in error.listing
