"""EPT paging structures: the bytes are walked here entry by entry, as the manual says, and compared."""

from __future__ import annotations

import pytest

from vmxlab.errors import CaseError, Misaligned, OutOfRange, OverlappingPages
from vmxlab.structures import PAGE_SIZE, Ept, MemoryType, PageSize

from .conftest import walk

K4, M2, G1 = 0x1000, 0x20_0000, 0x4000_0000
BASE = 0x20_0000


# --- mapping -----------------------------------------------------------------------------------------------


def test_an_empty_ept_is_one_zero_table() -> None:
    ept = Ept()
    assert ept.tables(BASE) == [(BASE, bytes(PAGE_SIZE))]
    assert ept.table_count == 1
    assert ept.translate(0) is None
    assert ept.check() == []


def test_the_bytes_of_one_page_entry_by_entry() -> None:
    ept = Ept()
    ept.map(0x1000, 0x12_3000)
    (a4, pml4), (a3, pdpt), (a2, pd), (a1, pt) = ept.tables(BASE)
    assert [a4, a3, a2, a1] == [BASE, BASE + K4, BASE + 2 * K4, BASE + 3 * K4]
    for table, index, entry in (
        (pml4, 0, a3 | 0x407),
        (pdpt, 0, a2 | 0x407),
        (pd, 0, a1 | 0x407),
        (pt, 1, 0x12_3000 | 6 << 3 | 0x407),
    ):
        expected = bytearray(PAGE_SIZE)
        expected[8 * index : 8 * index + 8] = entry.to_bytes(8, "little")
        assert table == expected


@pytest.mark.parametrize(
    ("attributes", "bits"),
    [
        ({}, 0x437),
        ({"read": False}, 0x436),
        ({"write": False}, 0x435),
        ({"execute": False}, 0x033),
        ({"user_execute": False}, 0x037),
        ({"execute": False, "user_execute": True}, 0x433),
        ({"read": False, "write": False, "execute": False}, 0x030),
        ({"memory_type": MemoryType.UC}, 0x407),
        ({"memory_type": MemoryType.WC}, 0x40F),
        ({"memory_type": MemoryType.WT}, 0x427),
        ({"memory_type": MemoryType.WP}, 0x42F),
        ({"memory_type": 7}, 0x43F),
        ({"ignore_pat": True}, 0x477),
        ({"accessed": True}, 0x537),
        ({"dirty": True}, 0x637),
        ({"verify_guest_paging": True}, 1 << 57 | 0x437),
        ({"paging_write": True}, 1 << 58 | 0x437),
        ({"supervisor_shadow_stack": True}, 1 << 60 | 0x437),
        ({"sub_page_write": True}, 1 << 61 | 0x437),
        ({"suppress_ve": True}, 1 << 63 | 0x437),
        ({"raw": 0}, 0),
        ({"raw": 0xFFF0_0000_0000_0FFF}, 0xFFF0_0000_0000_0FFF),
        ({"raw": 2, "read": True}, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", list(PageSize), ids=lambda size: size.label)
def test_attributes_are_the_bits_of_the_manual(attributes: dict[str, int], bits: int, size: PageSize) -> None:
    if "sub_page_write" in attributes and size != K4:
        with pytest.raises(CaseError, match="4 KiB"):
            Ept().map(0, 0, size, **attributes)
        return
    ept = Ept()
    ept.map(3 * size, 5 * size, size, **attributes)
    ((gpa, level, entry),) = ept.leaves()
    assert gpa == 3 * size
    assert level == {K4: 1, M2: 2, G1: 3}[size]
    assert entry == 5 * size | bits | (0x80 if size != K4 else 0)
    assert ept.tables(BASE)[-1][1][24:32] == entry.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("gpa", "hpa", "size", "length", "tables"),
    [
        (0, 0x100_0000, K4, 0x2_0000, 4),
        (0x1F_F000, 0x5000, K4, 0x2000, 5),  # over a 2-MiB edge
        (0x3FFF_F000, 0, K4, 0x2000, 6),  # over a 1-GiB edge
        (0x7F_FFFF_F000, 0, K4, 0x2000, 7),  # over a 512-GiB edge
        (0, 1 << 40, K4, 0x60_0000, 6),
        (0, 0, M2, G1 + M2, 4),
        (G1, 7 * G1, G1, 513 * G1, 3),
        ((1 << 48) - K4, (1 << 52) - K4, K4, K4, 4),
    ],
)
def test_a_range_is_mapped_whole(gpa: int, hpa: int, size: int, length: int, tables: int) -> None:
    ept = Ept()
    ept.map(gpa, hpa, size, length)
    assert ept.table_count == tables
    image = ept.tables(BASE)
    assert [address for address, _ in image] == [BASE + n * K4 for n in range(tables)]
    step = max(size, length // 64 // size * size)
    for offset in {*range(0, length, step), length - 1, length - size, 1}:
        walked = walk(image, gpa + offset)
        assert walked is not None
        assert (walked.hpa, walked.size, walked.rights) == (hpa + offset, size, 0x407)
        translation = ept.translate(gpa + offset)
        assert translation is not None
        assert (translation.hpa, translation.size) == (walked.hpa, walked.size)
        assert translation.entries[-1] == walked.leaf
    for outside in (gpa - 1, gpa + length):
        if 0 <= outside < 1 << 48:
            assert walk(image, outside) is None
            assert ept.translate(outside) is None


def test_the_same_mappings_give_the_same_bytes_in_any_order() -> None:
    pieces = [(0x60_0000, 0x1000), (0, 0x2000), (0x8000_0000, 0x3000), (0x1000, 0x9000), (1 << 40, 0)]
    one, two = Ept(), Ept()
    for gpa, hpa in pieces:
        one.map(gpa, hpa)
    for gpa, hpa in reversed(pieces):
        two.map(gpa, hpa)
    assert one.tables(BASE) == two.tables(BASE)
    assert one == two
    two.unmap(0, K4)
    assert one != two
    two.map(0, 0x2000)
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, 0), Misaligned),
        ((0, 1), Misaligned),
        ((0x1000, 0, M2), Misaligned),
        ((0, 0x1000, M2), Misaligned),
        ((0, M2, G1), Misaligned),
        ((0, 0, K4, 0x1001), Misaligned),
        ((0, 0, M2, K4), Misaligned),
        ((0, 0, K4, 0), OutOfRange),
        ((0, 0, K4, -K4), OutOfRange),
        ((-K4, 0), OutOfRange),
        ((0, -K4), OutOfRange),
        ((1 << 48, 0), OutOfRange),
        (((1 << 48) - K4, 0, K4, 2 * K4), OutOfRange),
        ((0, 1 << 52), OutOfRange),
        ((0, (1 << 52) - K4, K4, 2 * K4), OutOfRange),
        ((0, 0, 0x2000), OutOfRange),
        ((0, 0, 0), OutOfRange),
    ],
    ids=str,
)
def test_what_cannot_be_mapped_is_refused(arguments: tuple[int, ...], error: type[OutOfRange]) -> None:
    ept = Ept()
    with pytest.raises(error):
        ept.map(*arguments)
    assert ept == Ept()


def test_physical_addresses_end_where_the_processor_says() -> None:
    ept = Ept(physical_address_width=36)
    ept.map(0, (1 << 36) - K4)
    for refused in (lambda: ept.map(K4, 1 << 36), lambda: ept.tables((1 << 36) - K4)):
        with pytest.raises(OutOfRange, match="36"):
            refused()
    for width in (31, 53):
        with pytest.raises(OutOfRange):
            Ept(physical_address_width=width)


@pytest.mark.parametrize(
    "attributes", [{"memory_type": 8}, {"memory_type": -1}, {"raw": 1 << 64}, {"raw": -1}, {"raw": 0x1000}]
)
def test_attributes_that_no_entry_holds_are_refused(attributes: dict[str, int]) -> None:
    ept = Ept()
    with pytest.raises(OutOfRange):
        ept.map(0, 0, **attributes)
    assert ept == Ept()


@pytest.mark.parametrize(
    ("base", "error"), [(1, Misaligned), (-K4, OutOfRange), ((1 << 52) - 3 * K4, OutOfRange)]
)
def test_tables_lie_on_whole_pages(base: int, error: type[OutOfRange]) -> None:
    ept = Ept()
    ept.map(0, 0)
    with pytest.raises(error):
        ept.tables(base)


# --- overlaps, splitting, unmapping ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0x1000, 0), (0x1000, 0x1000)),
        ((0, 0, K4, 0x8000), (0x7000, 0, K4, 0x2000)),
        ((0x20_1000, 0), (0x20_0000, 0, M2)),
        ((0, 0, M2), (0x1000, 0)),
        ((0, 0, M2), (0x1F_F000, 0, K4, 0x2000)),
        ((0, 0, G1), (M2, 0, M2)),
        ((0, 0, G1), (0x1000, 0)),
        ((M2, 0, M2), (0, 0, G1)),
    ],
    ids=str,
)
def test_mapping_over_a_mapping_is_refused_and_changes_nothing(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    ept = Ept()
    ept.map(*first)
    before = ept.copy()
    with pytest.raises(OverlappingPages, match="mapped"):
        ept.map(*second)
    assert ept == before


def test_replace_maps_over_pages_of_the_same_size_or_smaller() -> None:
    ept = Ept()
    ept.map(0, 0, K4, 0x40_0000)
    ept.map(0x3000, 0x9_9000, replace=True)
    ept.map(0x20_0000, 0x1000_0000, M2, replace=True)
    assert ept.table_count == 4
    image = ept.tables(BASE)
    for gpa, hpa, size in ((0x3000, 0x9_9000, K4), (0x4000, 0x4000, K4), (0x20_1234, 0x1000_1234, M2)):
        walked = walk(image, gpa)
        assert walked is not None
        assert (walked.hpa, walked.size) == (hpa, size)


def test_replace_does_not_split_a_larger_page() -> None:
    ept = Ept()
    ept.map(0, 0, M2)
    with pytest.raises(OverlappingPages, match="PDE") as caught:
        ept.map(0x3000, 0, replace=True)
    assert "split" in str(caught.value.advice)
    ept.split(0)
    ept.map(0x3000, 0x9_9000, replace=True)
    translation = ept.translate(0x3000)
    assert translation is not None
    assert translation.hpa == 0x9_9000


@pytest.mark.parametrize(("size", "smaller"), [(M2, K4), (G1, M2)])
def test_a_split_page_translates_as_before(size: int, smaller: int) -> None:
    ept = Ept()
    ept.map(size, 9 * size, size, execute=False, memory_type=MemoryType.UC, ignore_pat=True, suppress_ve=True)
    before = {gpa: ept.translate(gpa) for gpa in range(size, 2 * size, smaller // 2)}
    ept.split(size + smaller + 5)
    for gpa, old in before.items():
        new = ept.translate(gpa)
        assert old is not None
        assert new is not None
        assert new.size == smaller
        assert (new.hpa, new.read, new.write, new.execute, new.memory_type, new.ignore_pat) == (
            old.hpa,
            True,
            True,
            False,
            MemoryType.UC,
            True,
        )
        assert new.entries[-1] >> 63
    assert sum(1 for _ in ept.leaves()) == 512
    assert ept.check() == []


def test_only_a_large_page_can_be_split() -> None:
    ept = Ept()
    ept.map(0, 0)
    for gpa in (0, 0x1000, 1 << 40):
        with pytest.raises(CaseError, match="nothing to split"):
            ept.split(gpa)
    ept.set_raw_entry(M2, 2, 0x1000 | 0x87)  # bit 12 of a 2-MiB page is reserved
    ept.set_raw_entry(2 * M2, 2, 0x7007)
    for gpa in (M2, 2 * M2):
        with pytest.raises(CaseError, match="can't be split"):
            ept.split(gpa)
        with pytest.raises(CaseError, match="can't be split"):
            ept.unmap(gpa, K4)


def test_unmapping_splits_at_its_edges_only() -> None:
    ept = Ept()
    ept.map(0, 0, M2, 4 * M2)
    ept.unmap(M2 - K4, 2 * M2)
    sizes = [None if (t := ept.translate(gpa)) is None else t.size for gpa in (0, M2, 3 * M2 - K4, 3 * M2)]
    assert sizes == [K4, None, K4, M2]
    assert ept.translate(M2 - K4 - 1) is not None
    assert ept.translate(M2 - K4) is None
    assert ept.translate(3 * M2 - K4 - 1) is None
    assert ept.translate(3 * M2 - K4) is not None


def test_unmapping_everything_leaves_no_table() -> None:
    ept = Ept()
    ept.map(0, 0, K4, 0x40_0000)
    ept.map(1 << 40, 0, G1)
    ept.unmap(0, 0x40_0000)
    ept.unmap(1 << 40, G1)
    assert ept == Ept()
    assert ept.tables(BASE) == [(BASE, bytes(PAGE_SIZE))]


@pytest.mark.parametrize("change", ["unmap", "protect"])
def test_changing_what_is_not_mapped_is_an_error(change: str) -> None:
    ept = Ept()
    ept.map(0x1000, 0)
    ept.map(0x4000, 0)
    ept.map(M2, 0, M2)
    before = ept.copy()
    for gpa, length, hole in (
        (0, 0x2000, 0),
        (0x1000, 0x4000, 0x2000),
        (0x4000, 0x2000, 0x5000),
        (M2 + K4, M2, 2 * M2),
        (1 << 40, K4, 1 << 40),
    ):
        with pytest.raises(CaseError, match=f"{hole:#x}"):
            getattr(ept, change)(gpa, length)
    assert ept == before
    ept.unmap(0, 0x4000, missing_ok=True)
    assert [gpa for gpa, _, _ in ept.leaves()] == [0x4000, M2]


@pytest.mark.parametrize("change", ["unmap", "protect"])
@pytest.mark.parametrize(
    ("gpa", "length", "error"),
    [
        (1, K4, Misaligned),
        (0, 1, Misaligned),
        (0, 0, OutOfRange),
        (0, -K4, OutOfRange),
        (-K4, K4, OutOfRange),
        (1 << 48, K4, OutOfRange),
        ((1 << 48) - K4, 2 * K4, OutOfRange),
    ],
)
def test_a_range_of_no_pages_is_refused(change: str, gpa: int, length: int, error: type[OutOfRange]) -> None:
    ept = Ept()
    ept.map(0, 0, K4, 0x4000)
    before = ept.copy()
    with pytest.raises(error):
        getattr(ept, change)(gpa, length)
    assert ept == before


def test_protect_changes_what_it_names_and_nothing_else() -> None:
    ept = Ept()
    ept.map(0, 0x5000, K4, 0x4000, dirty=True)
    ept.protect(0x1000, 0x2000, write=False, memory_type=MemoryType.UC)
    assert [entry for _, _, entry in ept.leaves()] == [0x5637, 0x6605, 0x7605, 0x8637]
    ept.protect(0x1000, K4, dirty=False, accessed=True, suppress_ve=True)
    ept.protect(0x2000, K4, execute=False)
    ept.protect(0x3000, K4, execute=False, user_execute=True)
    assert [entry for _, _, entry in ept.leaves()][1:] == [1 << 63 | 0x6505, 0x7201, 0x8633]
    ept.protect(0, 0x4000)
    assert next(ept.leaves()) == (0, 1, 0x5637)


def test_protecting_a_part_of_a_large_page_splits_it() -> None:
    ept = Ept()
    ept.map(0, 0, G1)
    ept.protect(5 * M2 + 0x3000, K4, write=False)
    for gpa, size, write in (
        (0, M2, True),
        (5 * M2, K4, True),
        (5 * M2 + 0x3000, K4, False),
        (5 * M2 + 0x4000, K4, True),
        (6 * M2, M2, True),
    ):
        translation = ept.translate(gpa)
        assert translation is not None
        assert (translation.hpa, translation.size, translation.write) == (gpa, size, write)
    assert ept.table_count == 4


def test_sub_page_write_permissions_split_a_large_page_to_the_end() -> None:
    ept = Ept()
    ept.map(0, 0, M2, 2 * M2)
    ept.protect(0, M2, sub_page_write=True)
    entries = list(ept.leaves())
    assert len(entries) == 513
    assert all(level == 1 and entry >> 61 & 1 for _, level, entry in entries[:512])


# --- where an entry lies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_entry_address_is_where_the_tables_hold_that_entry(level: int) -> None:
    ept = Ept()
    ept.map(0x8000_0000, 0x100_0000, length=4 * K4)
    ept.map(0x7F_8020_3000, 0x200_0000)
    for gpa in (0x8000_2000, 0x7F_8020_3000):
        address = ept.entry_address(BASE, gpa, level)
        memory = dict(ept.tables(BASE))
        entry = int.from_bytes(memory[address & -PAGE_SIZE][address % PAGE_SIZE :][:8], "little")
        if level == 1:
            assert entry & 0x000F_FFFF_FFFF_F000 == ept.translate(gpa).hpa & -PAGE_SIZE
        else:
            assert entry & 0x000F_FFFF_FFFF_F000 == ept.entry_address(BASE, gpa, level - 1) & -PAGE_SIZE
        assert (address % PAGE_SIZE) // 8 == gpa >> (3 + 9 * level) & 511


def test_an_entry_that_no_table_holds_has_no_address() -> None:
    ept = Ept()
    ept.map(0, 0, size=PageSize.SIZE_2M)
    assert ept.entry_address(BASE, 0, 2) % 8 == 0
    with pytest.raises(CaseError, match="level 1"):
        ept.entry_address(BASE, 0, 1)


def test_runs_are_the_entries_in_the_order_of_a_walk():
    ept = Ept()
    ept.map(0x0, 0x10_0000, length=0x3000)
    ept.map(0x4000, 0x20_0000, write=False)
    ept.map(0x20_0000, 0x40_0000, PageSize.SIZE_2M)
    assert [(run.name, run.gpa, run.last, run.target, run.leads_to_table) for run in ept.runs()] == [
        ("PML4E[0]", 0, 0x7F_FFFF_FFFF, "", True),
        ("PDPTE[0]", 0, 0x3FFF_FFFF, "", True),
        ("PDE[0]", 0, 0x1F_FFFF, "", True),
        ("PTE[0-2]", 0, 0x2FFF, "0x100000", False),
        ("PTE[4]", 0x4000, 0x4FFF, "0x200000", False),
        ("PDE[1]", 0x20_0000, 0x3F_FFFF, "0x400000", False),
    ]
