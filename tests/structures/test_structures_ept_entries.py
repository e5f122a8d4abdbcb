"""EPT entries that are wrong on purpose, what is said of them, and how the tables are drawn."""

from __future__ import annotations

import pytest

from vmxlab.errors import CaseError, OutOfRange, OverlappingPages
from vmxlab.structures import PAGE_SIZE, Ept, EptFault, EptVpidCap, MemoryType

K4, M2, G1 = 0x1000, 0x20_0000, 0x4000_0000
ALL = EptVpidCap((1 << 64) - 1)
NONE = EptVpidCap(0)


def entry_at(ept: Ept, base: int, gpa: int, level: int) -> int:
    """The entry of a level as it stands in the final bytes."""
    memory, table = dict(ept.tables(base)), base
    for current in (4, 3, 2, 1):
        offset = (gpa >> 12 + 9 * (current - 1)) % 512 * 8
        entry = int.from_bytes(memory[table][offset : offset + 8], "little")
        if current == level:
            return entry
        table = entry & 0xF_FFFF_FFFF_F000
    raise AssertionError


# --- raw entries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [0x2, 0xDEAD_BEEF_CAFE_F00D, (1 << 64) - 1, 1])
def test_a_raw_entry_is_written_as_it_is(level: int, value: int) -> None:
    ept = Ept()
    ept.map(0, 0, length=4 * K4)
    gpa = 0x2345  # any address that the entry translates
    ept.set_raw_entry(gpa, level, value)
    assert entry_at(ept, 0x10_0000, gpa, level) == value
    assert ept.table_count == 5 - level
    if level == 1:
        assert entry_at(ept, 0x10_0000, 0x1000, 1) == 0x1437


def test_a_raw_entry_makes_the_tables_above_it() -> None:
    ept = Ept()
    ept.set_raw_entry(1 << 40, 2, 0x6)
    assert ept.table_count == 3
    assert list(ept.leaves()) == [(1 << 40, 2, 0x6)]


def test_a_raw_zero_takes_an_entry_away_and_leaves_its_table() -> None:
    ept = Ept()
    ept.map(0, 0)
    ept.map(G1, 0)
    ept.set_raw_entry(0, 1, 0)
    assert ept.translate(0) is None
    assert ept.table_count == 6
    ept.unmap(G1, K4)
    assert ept.table_count == 4
    ept.map(0, 0x9000)
    assert ept.translate(0x10) is not None


@pytest.mark.parametrize(
    ("gpa", "level", "value"),
    [(0, 0, 0), (0, 5, 0), (1 << 48, 1, 0), (-1, 1, 0), (0, 1, 1 << 64), (0, 1, -1)],
)
def test_a_raw_entry_that_cannot_be_written_is_refused(gpa: int, level: int, value: int) -> None:
    ept = Ept()
    with pytest.raises(OutOfRange):
        ept.set_raw_entry(gpa, level, value)
    assert ept == Ept()


def test_no_raw_entry_below_a_larger_page() -> None:
    ept = Ept()
    ept.map(0, 0, M2)
    with pytest.raises(OverlappingPages, match="split"):
        ept.set_raw_entry(0x1000, 1, 7)
    ept.set_raw_entry(0x1000, 2, 7)  # the page itself may be replaced


def test_rights_can_be_taken_away_above_the_page() -> None:
    ept = Ept()
    ept.map(0, 0x5000)
    ept.set_table_entry(0, 3, 0x405)
    translation = ept.translate(0x10)
    assert translation is not None
    assert (translation.read, translation.write, translation.execute) == (True, False, True)
    assert entry_at(ept, 0x10_0000, 0, 3) == 0x10_0000 + 2 * K4 | 0x405
    assert entry_at(ept, 0x10_0000, 0, 1) == 0x5437


def test_the_bits_of_a_table_entry_must_leave_it_one() -> None:
    ept = Ept()
    ept.map(0, 0)
    before = ept.copy()
    for level, value in ((2, 0x1007), (2, 0x87), (3, 0x87), (4, 1 << 64), (1, 7), (5, 7)):
        with pytest.raises(OutOfRange):
            ept.set_table_entry(0, level, value)
    for gpa, level in ((G1, 3), (M2, 2), (1 << 40, 4), (1 << 40, 2)):
        with pytest.raises(CaseError, match="leads to no table"):
            ept.set_table_entry(gpa, level, 7)
    assert ept == before
    ept.set_table_entry(0, 4, 0x87)  # bit 7 of a PML4E is just reserved
    assert [fault.level for fault in ept.check()] == [4]


# --- translation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [4, 3, 2])
@pytest.mark.parametrize("bit", [0, 1, 2, 10])
def test_rights_are_those_of_all_entries_together(level: int, bit: int) -> None:
    ept = Ept()
    ept.map(0, 0)
    ept.set_table_entry(0, level, 0x407 & ~(1 << bit))
    translation = ept.translate(0)
    assert translation is not None
    rights = [translation.read, translation.write, translation.execute, translation.user_execute]
    assert rights == [bit != 0, bit != 1, bit != 2, bit != 10]
    assert len(translation.entries) == 4


def test_an_entry_with_only_bit_10_is_present_with_mode_based_execute_control() -> None:
    ept = Ept()
    ept.map(0, 0, read=False, write=False, execute=False, user_execute=True)
    assert ept.translate(0) is None
    translation = ept.translate(0, mode_based_execute=True)
    assert translation is not None
    assert translation.user_execute
    assert not translation.execute


def test_a_walk_out_of_the_tables_is_said() -> None:
    ept = Ept()
    ept.set_raw_entry(0, 3, 0x7000_0007)
    with pytest.raises(CaseError, match="PDPTE 0x70000007 leads out"):
        ept.translate(0)
    for gpa in (-1, 1 << 48):
        with pytest.raises(OutOfRange):
            ept.translate(gpa)


def test_a_reserved_memory_type_is_a_number() -> None:
    ept = Ept()
    ept.map(0, 0, memory_type=MemoryType.WT)
    ept.map(K4, 0, memory_type=3)
    types = [translation.memory_type for gpa in (0, K4) if (translation := ept.translate(gpa)) is not None]
    assert types == [MemoryType.WT, 3]


# --- misconfigurations -------------------------------------------------------------------------------------


def faults_of(
    entry: int, level: int, capabilities: EptVpidCap | None = ALL, **options: int
) -> list[EptFault]:
    ept = Ept()
    ept.set_raw_entry(0, level, entry)
    return ept.check(capabilities, **options)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("rights", range(8))
def test_the_eight_combinations_of_rights(level: int, rights: int) -> None:
    entry = rights | (6 << 3 | 0x80 if level in (2, 3) else 6 << 3 if level == 1 else 0)
    write_only = bool(rights & 2 and not rights & 1)
    assert bool(faults_of(entry, level, ALL)) is write_only
    assert bool(faults_of(entry, level, None)) is write_only
    execute_only = rights == 4
    small_pages = EptVpidCap(ALL.bits & ~1)
    assert bool(faults_of(entry, level, small_pages)) is (write_only or execute_only)
    if execute_only:
        (fault,) = faults_of(entry, level, small_pages)
        assert fault.rule.bit == "IA32_VMX_EPT_VPID_CAP[0]"


def test_write_and_execute_without_read_break_two_rules_where_execute_only_is_unknown() -> None:
    assert len(faults_of(0x36, 1, NONE)) == 2
    assert len(faults_of(0x36, 1, ALL)) == 1


@pytest.mark.parametrize(
    ("entry", "mode_based", "faults"),
    [
        (0x430, False, 0),  # not present, so nothing else counts
        (0x430, True, 1),
        (0x431, True, 0),
        (0x434, False, 1),
    ],
)
def test_user_execute_counts_with_mode_based_execute_control(
    entry: int, mode_based: bool, faults: int
) -> None:
    assert len(faults_of(entry, 1, NONE, mode_based_execute=mode_based)) == faults
    assert faults_of(entry, 1, ALL, mode_based_execute=mode_based) == []


@pytest.mark.parametrize("memory_type", range(8))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_memory_types_2_3_and_7_are_reserved(memory_type: int, level: int) -> None:
    entry = 1 | memory_type << 3 | (0x80 if level > 1 else 0)
    faults = faults_of(entry, level)
    assert bool(faults) is (memory_type in (2, 3, 7))
    assert all("29.3.3.1" in str(fault) and f"type {memory_type}" in str(fault) for fault in faults)
    assert faults_of(entry & ~1, level) == []


@pytest.mark.parametrize(
    ("level", "large", "reserved"),
    [
        (4, False, {3, 4, 5, 6, 7}),
        (3, False, {3, 4, 5, 6}),
        (3, True, set(range(12, 30))),
        (2, False, {3, 4, 5, 6}),
        (2, True, set(range(12, 21))),
        (1, False, set()),
    ],
)
def test_reserved_bits_are_those_of_the_manual(level: int, large: bool, reserved: set[int]) -> None:
    base = 1 | (0x80 if large else 0)
    width = 40
    skip = {0, 1, 2, 7} if level in (2, 3) else {0, 1, 2}  # bit 7 makes it another kind of entry
    page = large or level == 1
    for bit in set(range(64)) - skip - ({3, 4, 5} if page else set()):
        wrong = bool(faults_of(base | 1 << bit, level, physical_address_width=width))
        assert wrong is (bit in reserved or 40 <= bit <= 51), bit


def test_large_pages_need_their_capability() -> None:
    for level, bit in ((2, 16), (3, 17)):
        (fault,) = faults_of(0xB7, level, EptVpidCap(ALL.bits & ~(1 << bit)))
        assert fault.rule.bit == f"IA32_VMX_EPT_VPID_CAP[{bit}]"
        assert faults_of(0xB7, level, None) == []


def test_check_says_which_entries() -> None:
    ept = Ept()
    ept.map(0, 0, length=0x4000)
    ept.map(M2, 0, M2)
    ept.protect(0x2000, K4, read=False)
    ept.set_table_entry(0, 3, 0x40F)
    faults = ept.check(NONE)
    assert [(fault.gpa, fault.level, fault.entry) for fault in faults] == [
        (0, 3, 0x40F),
        (M2, 2, 0x4B7),
        (0x2000, 1, 0x2436),
        (0x2000, 1, 0x2436),
    ]
    assert str(faults[0]).startswith("EPT PDPTE 0x40f of 0x0: reserved bits 0x8 are set")
    assert len(ept.check(ALL)) == 2


def test_a_default_mapping_is_never_misconfigured() -> None:
    ept = Ept()
    ept.map(0, 0, length=0x40_0000)
    ept.map(G1, 0, G1)
    assert ept.check() == ept.check(ALL) == ept.check(ALL, mode_based_execute=True) == []


@pytest.mark.parametrize("width", [31, 53])
def test_check_refuses_an_impossible_width(width: int) -> None:
    with pytest.raises(OutOfRange):
        Ept().check(physical_address_width=width)


# --- drawn -------------------------------------------------------------------------------------------------


def test_the_tree_has_one_line_for_alike_neighbours() -> None:
    ept = Ept()
    ept.map(0, 0x100_0000, length=0x2_0000)
    assert ept.tree().splitlines() == [
        "EPT, 4 levels, 4 tables",
        "└── PML4E[0] rwx",
        "    └── PDPTE[0] rwx",
        "        └── PDE[0] rwx",
        "            └── 0x0000-0x1ffff -> 0x1000000 rwx WB 4K x32",
    ]


def test_the_tree_tells_different_neighbours_apart() -> None:
    ept = Ept()
    ept.map(0, 0, length=0x8000)
    ept.protect(0x2000, 0x2000, write=False)
    ept.protect(0x4000, K4, execute=False, user_execute=True, memory_type=MemoryType.UC, suppress_ve=True)
    ept.map(0x5000, 0x5000, replace=True, read=False, write=False, execute=False)
    ept.map(0x6000, 0x6000, replace=True, read=False, memory_type=7)
    ept.unmap(0x7000, K4)
    for page in range(3):
        ept.map(0x10_0000 + page * K4, 0x9000)
    ept.map(M2, 0x8000_0000, M2, 2 * M2, user_execute=False)
    ept.map(G1, 5 * G1, G1)
    ept.set_raw_entry(1 << 39, 4, 0xABC0_0000_0001)
    assert ept.tree().splitlines() == [
        "EPT, 4 levels, 4 tables",
        "├── PML4E[0] rwx",
        "│   ├── PDPTE[0] rwx",
        "│   │   ├── PDE[0] rwx",
        "│   │   │   ├── 0x0000-0x1fff -> 0x0 rwx WB 4K x2",
        "│   │   │   ├── 0x2000-0x3fff -> 0x2000 r-x WB 4K x2",
        "│   │   │   ├── 0x4000-0x4fff -> 0x4000 rw- +ux UC suppress-ve 4K",
        "│   │   │   ├── 0x5000-0x5fff -> 0x5000 --- WB 4K (not present)",
        "│   │   │   ├── 0x6000-0x6fff -> 0x6000 -wx type7 4K  <- misconfigured: writes are allowed (bit 1) "
        "but reads are not (bit 0); memory type 7 (bits 5:3) is reserved",
        "│   │   │   └── 0x100000-0x102fff -> 0x9000 each rwx WB 4K x3",
        "│   │   └── 0x200000-0x5fffff -> 0x80000000 rwx -ux WB 2M x2",
        "│   └── 0x40000000-0x7fffffff -> 0x140000000 rwx WB 1G",
        "└── 0x8000000000-0xffffffffff -> raw PML4E 0xabc000000001",
    ]


def test_a_line_of_the_tree_holds_only_one_kind_of_run() -> None:
    ept = Ept()
    for gpa, hpa in enumerate((0x9, 0x9, 0xA, 0xB, 0xB)):
        ept.map(gpa * K4, hpa * K4)
    assert [line.split("── ")[1] for line in ept.tree().splitlines()[4:]] == [
        "0x0000-0x1fff -> 0x9000 each rwx WB 4K x2",
        "0x2000-0x3fff -> 0xa000 rwx WB 4K x2",
        "0x4000-0x4fff -> 0xb000 rwx WB 4K",
    ]


def test_the_tree_of_nothing() -> None:
    assert Ept().tree() == "EPT, 4 levels, 1 table\n└── nothing is mapped"


def test_a_copy_goes_its_own_way() -> None:
    ept = Ept(physical_address_width=40)
    ept.map(0, 0)
    other = ept.copy()
    other.protect(0, K4, write=False)
    other.map(M2, 0, M2)
    assert ept.table_count == other.table_count
    assert [entry for _, _, entry in ept.leaves()] == [0x437]
    assert other.physical_address_width == 40
    assert ept != other
    assert ept != 5
    assert ept.pages(0x1000) == ept.tables(0x1000)
    assert repr(ept) == "<Ept: 4 tables, 1 pages>"
    assert len(ept.tables(0x1000)[0][1]) == PAGE_SIZE
