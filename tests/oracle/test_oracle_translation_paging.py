"""Linear to physical addresses by L2's own paging, in each mode, without EPT and without a machine."""

from __future__ import annotations

import pytest

from vmxlab.errors import CaseError, OutOfRange
from vmxlab.oracle.accesses import FETCH, READ, WRITE, Access, AccessKind, PageFault, PagingState, Translated
from vmxlab.oracle.paging import PagingMode
from vmxlab.oracle.translation import is_canonical, load_pdptes, translate, translate_bytes
from vmxlab.oracle.values import Unknown
from vmxlab.sdm.paging import PageFaultErrorCode as Code
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS

P, W, U, A, D, PS, XD = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ALL = P | W | U | A | D
ROOT = 0x1000

LONG = {
    "cr0": int(CR0.PG | CR0.PE | CR0.WP),
    "cr4": int(CR4.PAE),
    "efer": int(EFER.LMA | EFER.LME | EFER.NXE),
}
BITS_32 = {"cr0": int(CR0.PG | CR0.PE | CR0.WP), "cr4": int(CR4.PSE)}
PAE = {"cr0": int(CR0.PG | CR0.PE | CR0.WP), "cr4": int(CR4.PAE), "efer": int(EFER.NXE)}


def state(base, **more) -> PagingState:
    return PagingState(**{"cr3": ROOT, "maxphyaddr": 40, "page_1g": True, "pse36": True, **base, **more})


class Memory(dict):
    """Entries by address; anything else is not known."""

    def read(self, address: int, size: int) -> int | None:
        return self.get(address)


def long_tables(linear: int, page: int, *, levels: int = 4, leaf: int = 1, **flags: int) -> Memory:
    """Tables at ROOT, ROOT + 1000H, ... that map `linear` to `page`; `e4` to `e1` are an entry's flags."""
    memory, table = Memory(), ROOT
    for level in range(levels, leaf - 1, -1):
        address = table + 8 * (linear >> 12 + 9 * (level - 1) & 511)
        table += 0x1000
        bits = flags.get(f"e{level}", ALL)
        memory[address] = bits | (page if level == leaf else table)
        if level == leaf and leaf > 1:
            memory[address] |= PS
    return memory


def ending(base, memory: Memory, linear: int, access: Access = READ, **more):
    return translate(state(base, **more), linear, access, memory.read)


# --- modes and page sizes ----------------------------------------------------------------------------------


def test_without_paging_a_linear_address_is_physical() -> None:
    """Vol. 3A, 4.1.1."""
    result = ending({"cr0": 1, "cr4": 0}, Memory(), 0x1234_5678)
    assert isinstance(result, Translated)
    assert (result.hpa, result.page_size, result.ept_page_size) == (0x1234_5678, None, None)


@pytest.mark.parametrize(("leaf", "size"), [(1, 1 << 12), (2, 1 << 21), (3, 1 << 30)])
@pytest.mark.parametrize(("levels", "la57"), [(4, 0), (5, CR4.LA57)])
def test_pages_of_each_size(leaf: int, size: int, levels: int, la57: int) -> None:
    """Vol. 3A, 4.5: 4-level and 5-level paging."""
    linear = 0x0012_3456_789A_BCDE & (1 << 47) - 1
    page = 0x12_4000_0000
    memory = long_tables(linear, page, levels=levels, leaf=leaf)
    result = ending({**LONG, "cr4": LONG["cr4"] | la57}, memory, linear)
    assert isinstance(result, Translated)
    assert (result.hpa, result.page_size) == (page | linear & size - 1, size)


def test_upper_half_of_the_address_space() -> None:
    """Vol. 3A, 4.5: only the lower 48 bits select entries."""
    linear = 0xFFFF_8000_0000_1000
    result = ending(LONG, long_tables(linear, 0x7000), linear)
    assert isinstance(result, Translated)
    assert result.hpa == 0x7000


@pytest.mark.parametrize(
    ("width", "page", "hpa"), [(40, 0x2000, 0x1_0000_0000), (32, 0, 0), (36, 0x1E000, 0xF_0000_0000)]
)
def test_pages_of_4_mib_with_wide_addresses(width: int, page: int, hpa: int) -> None:
    """Vol. 3A, table 4-4: bits 20:13 of the PDE are bits 39:32 of the address (PSE-36)."""
    memory = Memory({ROOT + 4 * 3: 0x80_0000 | page | PS | ALL})
    result = ending(BITS_32, memory, 3 << 22 | 0x12_3456, maxphyaddr=width)
    assert isinstance(result, Translated)
    assert (result.hpa, result.page_size) == (hpa | 0x80_0000 | 0x12_3456, 1 << 22)


@pytest.mark.parametrize(
    ("width", "pse36", "bit", "reserved"),
    [
        (40, True, 20, False),
        (40, True, 21, True),
        (36, True, 16, False),
        (36, True, 17, True),
        (40, False, 13, True),
    ],
)
def test_reserved_bits_of_a_page_of_4_mib(width: int, pse36: bool, bit: int, reserved: bool) -> None:
    """Vol. 3A, 4.3: bits 21:(M-19), M the width but at most 40; all of 21:13 without PSE-36."""
    memory = Memory({ROOT: PS | ALL | 1 << bit})
    result = ending(BITS_32, memory, 0, maxphyaddr=width, pse36=pse36)
    assert isinstance(result, PageFault) == reserved
    if reserved:
        assert result.error_code == Code.PRESENT | Code.RESERVED


def test_page_size_bit_means_nothing_without_cr4_pse() -> None:
    """Vol. 3A, 4.3: with CR4.PSE = 0 every PDE leads to a table."""
    memory = Memory({ROOT: 0x2000 | PS | ALL, 0x2000 + 4: 0x7000 | ALL})
    result = ending({**BITS_32, "cr4": 0}, memory, 0x1234)
    assert isinstance(result, Translated)
    assert (result.hpa, result.page_size) == (0x7234, 4096)


@pytest.mark.parametrize(("pde", "size"), [(0x3000 | ALL, 4096), (0x60_0000 | PS | ALL, 1 << 21)])
def test_pae_paging_begins_at_a_pdpte_register(pde: int, size: int) -> None:
    """Vol. 3A, 4.4.2: bits 31:30 of the address choose it, memory at CR3 is not read."""
    linear = 2 << 30 | 5 << 21 | 7 << 12 | 0x88
    memory = Memory({0x9000 + 8 * 5: pde, 0x3000 + 8 * 7: 0x60_7000 | ALL})
    result = ending(PAE, memory, linear, pdptes=(0, 0, 0x9001, 0))
    assert isinstance(result, Translated)
    assert (result.hpa, result.page_size) == (0x60_7088, size)
    absent = ending(PAE, memory, 1 << 30, pdptes=(0, 0, 0x9001, 0))
    assert isinstance(absent, PageFault)
    assert absent.error_code == 0


@pytest.mark.parametrize(
    ("bit", "base", "reserved"), [(55, PAE, True), (55, LONG, False), (45, PAE, True), (45, LONG, True)]
)
def test_address_bits_beyond_the_width(bit: int, base, reserved: bool) -> None:
    """Vol. 3A, 4.4.2, 4.5.4: up to bit 62 with PAE paging, up to bit 51 with 4 levels."""
    memory = long_tables(0, 0x7000, e1=ALL | 1 << bit)
    if base is PAE:
        memory = Memory({0x9000: 0x3000 | ALL, 0x3000: 0x7000 | ALL | 1 << bit})
    result = ending(base, memory, 0, pdptes=(0x9001, 0, 0, 0))
    assert isinstance(result, PageFault) == reserved


@pytest.mark.parametrize(("levels", "level"), [(4, 4), (5, 4), (5, 5)])
def test_top_entries_can_map_no_page(levels: int, level: int) -> None:
    """Vol. 3A, 4.5.4: bit 7 of a PML4E or PML5E is reserved."""
    memory = long_tables(0, 0x7000, levels=levels, **{f"e{level}": ALL | PS})
    result = ending({**LONG, "cr4": LONG["cr4"] | (CR4.LA57 if levels == 5 else 0)}, memory, 0)
    assert isinstance(result, PageFault)
    assert result.error_code == Code.PRESENT | Code.RESERVED


@pytest.mark.parametrize("page_1g", [False, True])
def test_pages_of_1_gib_where_the_processor_has_them(page_1g: bool) -> None:
    """Vol. 3A, 4.5.4: otherwise bit 7 of a PDPTE is reserved."""
    result = ending(LONG, long_tables(0, 1 << 30, leaf=3), 0, page_1g=page_1g)
    assert isinstance(result, Translated if page_1g else PageFault)


# --- rights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "access", "more", "code"),
    [
        (W, Access(user=True), {}, Code.PRESENT | Code.USER),
        (U, Access(AccessKind.WRITE, user=True), {}, Code.PRESENT | Code.USER | Code.WRITE),
        (U, WRITE, {}, Code.PRESENT | Code.WRITE),
        (U, WRITE, {"cr0": LONG["cr0"] & ~int(CR0.WP)}, None),
        (U, READ, {"cr4": int(CR4.PAE | CR4.SMAP)}, Code.PRESENT),
        (U, READ, {"cr4": int(CR4.PAE | CR4.SMAP), "rflags": int(RFLAGS.AC)}, None),
        (
            U,
            Access(implicit=True),
            {"cr4": int(CR4.PAE | CR4.SMAP), "rflags": int(RFLAGS.AC)},
            Code.PRESENT,
        ),
        (U, FETCH, {"cr4": int(CR4.PAE | CR4.SMAP)}, None),
        (U, FETCH, {"cr4": int(CR4.PAE | CR4.SMEP)}, Code.PRESENT | Code.FETCH),
        (U | W | XD, FETCH, {}, Code.PRESENT | Code.FETCH),
        (U | W | XD, FETCH, {"efer": int(EFER.LMA)}, Code.PRESENT | Code.RESERVED),
        (U | W | XD, FETCH, {"efer": int(EFER.LMA), "cr4": int(CR4.PAE | CR4.SMEP)}, Code(0b11001)),
        (W, Access(AccessKind.WRITE, shadow_stack=True), {}, Code.PRESENT | Code.WRITE | Code.SHADOW_STACK),
        (D, Access(AccessKind.WRITE, shadow_stack=True), {}, None),
        (
            D | U,
            Access(AccessKind.WRITE, shadow_stack=True),
            {},
            Code.PRESENT | Code.WRITE | Code.SHADOW_STACK,
        ),
        (D | U, Access(AccessKind.WRITE, user=True, shadow_stack=True), {}, None),
    ],
)
def test_rights_and_error_codes(flags: int, access: Access, more, code: Code | None) -> None:
    """Vol. 3A, 4.6.1 and 4.7."""
    result = ending({**LONG, **more}, long_tables(0, 0x7000, e1=P | A | flags), 0, access)
    if code is None:
        assert isinstance(result, Translated)
    else:
        assert isinstance(result, PageFault)
        assert result.error_code == code


@pytest.mark.parametrize(
    ("mode", "access", "more", "code"),
    [
        (U, READ, {"pkru": 1 << 6}, Code.PRESENT | Code.PROTECTION_KEY),
        (U, READ, {"pkru": 2 << 6}, None),
        (U, WRITE, {"pkru": 2 << 6}, Code.PRESENT | Code.PROTECTION_KEY | Code.WRITE),
        (U, WRITE, {"pkru": 2 << 6, "cr0": LONG["cr0"] & ~int(CR0.WP)}, None),
        (U, FETCH, {"pkru": 3 << 6}, None),
        (0, READ, {"pkru": 3 << 6}, None),
        (0, READ, {"pkrs": 1 << 6}, Code.PRESENT | Code.PROTECTION_KEY),
        (0, Access(user=True), {"pkru": 3 << 6}, Code.PRESENT | Code.USER),
        (U, READ, {"pkru": 3 << 4}, None),
    ],
)
def test_protection_keys(mode: int, access: Access, more, code: Code | None) -> None:
    """Vol. 3A, 4.6.2: key 3 here; PKRU for user-mode addresses, IA32_PKRS for the others."""
    memory = long_tables(0, 0x7000, e1=P | W | A | D | mode | 3 << 59)
    result = ending({**LONG, "cr4": int(CR4.PAE | CR4.PKE | CR4.PKS), **more}, memory, 0, access)
    assert (result.error_code if isinstance(result, PageFault) else None) == code


# --- flags -------------------------------------------------------------------------------------------------


def test_flags_are_set_from_the_top_and_the_dirty_flag_by_a_write() -> None:
    """Vol. 3A, 4.8."""
    memory = long_tables(0, 0x7000, e4=P | W, e3=P | W | A, e2=P | W, e1=P | W)
    for access, last in ((READ, P | W | A), (FETCH, P | W | A), (WRITE, P | W | A | D)):
        result = ending(LONG, memory, 0, access)
        assert result.writes == ((0x1000, 8, 0x2023), (0x3000, 8, 0x4023), (0x4000, 8, 0x7000 | last))


def test_a_fault_may_leave_accessed_flags_or_not() -> None:
    """Vol. 3A, 4.8: the manual does not say it of a walk that fails."""
    result = ending(LONG, long_tables(0, 0x7000, e4=P | W, e1=0), 0)
    assert isinstance(result, PageFault)
    assert (result.writes, result.possible_flags) == ((), ((0x1000, 8, A),))


# --- what is not known -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"page_1g": None},
        {"cr3": 1 << 45},
        {"cr4": int(CR4.PAE | CR4.LASS)},
        {"cr4": int(CR4.PAE | CR4.PKE), "pkru": None},
    ],
)
def test_what_the_oracle_is_not_told_it_does_not_guess(more) -> None:
    assert isinstance(ending({**LONG, **more}, long_tables(0, 0x4000_0000, leaf=3), 0), Unknown)


def test_memory_that_is_not_known() -> None:
    result = ending(LONG, Memory({0x1000: 0x2000 | ALL}), 0)
    assert isinstance(result, Unknown)
    assert "0x2000" in str(result)


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "four", "five"),
    [
        (0x7FFF_FFFF_FFFF, True, True),
        (0x8000_0000_0000, False, True),
        (0xFFFF_8000_0000_0000, True, True),
        (0xFFFF_7FFF_FFFF_FFFF, False, True),
        (0x0100_0000_0000_0000, False, False),
        (0xFF00_0000_0000_0000, False, True),
    ],
)
def test_canonical_addresses(linear: int, four: bool, five: bool) -> None:
    """Vol. 1, 3.3.7.1."""
    assert is_canonical(state(LONG), linear) is four
    assert is_canonical(state({**LONG, "cr4": int(CR4.PAE | CR4.LA57)}), linear) is five


def test_addresses_that_the_mode_does_not_have_are_refused() -> None:
    with pytest.raises(OutOfRange, match="canonical"):
        ending(LONG, Memory(), 1 << 47)
    with pytest.raises(OutOfRange, match="32 bits"):
        ending(BITS_32, Memory(), 1 << 32)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (AccessKind(0), {}),
        (AccessKind.FETCH | AccessKind.READ, {}),
        (AccessKind.READ, {"user": True, "implicit": True}),
        (AccessKind.FETCH, {"shadow_stack": True}),
    ],
)
def test_accesses_that_nothing_does_are_refused(kind: AccessKind, more) -> None:
    with pytest.raises(CaseError):
        Access(kind, **more)


def two_pages(first: int, second: int) -> Memory:
    memory = long_tables(0x1000, 0x7000, e1=first)
    memory[0x4000 + 8 * 2] = 0x9000 | second
    return memory


@pytest.mark.parametrize(("first", "second", "fault"), [(ALL, ALL, None), (0, ALL, 0x1FFC), (ALL, 0, 0x2000)])
def test_access_across_pages(first: int, second: int, fault: int | None) -> None:
    """The linear address of a fault is that of the first byte in the page that faults."""
    result = translate_bytes(state(LONG), 0x1FFC, 8, READ, two_pages(first, second).read)
    if fault is None:
        assert [page.hpa for page in result] == [0x7FFC, 0x9000]
    else:
        assert isinstance(result, PageFault)
        assert result.linear == fault


def test_access_across_pages_that_both_fail_is_not_said() -> None:
    assert isinstance(translate_bytes(state(LONG), 0x1FFC, 8, READ, two_pages(0, 0).read), Unknown)


def test_flags_of_the_other_page_may_be_set_before_the_fault() -> None:
    result = translate_bytes(state(LONG), 0x1FFC, 8, READ, two_pages(P | W, 0).read)
    assert result.possible_flags == ((0x4008, 8, 0x7000 | P | W | A),)


def test_access_within_a_page_is_one_translation() -> None:
    (result,) = translate_bytes(state(LONG), 0x1FF8, 8, READ, two_pages(ALL, 0).read)
    assert result.hpa == 0x7FF8


# --- PDPTEs ------------------------------------------------------------------------------------------------


def test_load_of_the_pdptes() -> None:
    """Vol. 3A, 4.4.1: 32 bytes at bits 31:5 of CR3; a present one with a reserved bit set is #GP(0)."""
    memory = Memory({0x2020 + 8 * n: value for n, value in enumerate((0x3001, 0, 1 << 50, 0x4001))})
    loaded = load_pdptes(state(PAE), 0x2038, memory.read)
    assert loaded.pdptes == (0x3001, 0, 1 << 50, 0x4001)
    for bit in (1, 2, 5, 8, 40, 63):
        memory[0x2038] = 0x4001 | 1 << bit
        assert load_pdptes(state(PAE), 0x2038, memory.read).number == 3


def test_modes_by_registers() -> None:
    """Vol. 3A, 4.1.1."""
    assert PagingMode.of(state({**LONG, "cr0": 1})) is PagingMode.NONE
    assert PagingMode.of(state(BITS_32)) is PagingMode.BITS_32
    assert PagingMode.of(state(PAE)) is PagingMode.PAE
    assert PagingMode.of(state(LONG)) is PagingMode.LEVEL_4
    assert PagingMode.of(state({**LONG, "cr4": int(CR4.PAE | CR4.LA57)})) is PagingMode.LEVEL_5
