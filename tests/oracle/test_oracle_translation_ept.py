"""Linear to machine addresses through EPT, without a machine: exits, their qualification, flags, the log."""

from __future__ import annotations

import struct

import pytest

from vmxlab.oracle.accesses import (
    FETCH,
    READ,
    WRITE,
    Access,
    AccessKind,
    EptMisconfiguration,
    EptViolation,
    PageFault,
    PagingState,
    PdptesLoaded,
    PmlFull,
    Translated,
)
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.translation import load_pdptes, translate, translate_bytes
from vmxlab.oracle.values import Unknown
from vmxlab.sdm.controls import SecondaryControls, TertiaryControls
from vmxlab.sdm.registers import CR0, CR4, EFER
from vmxlab.structures import Ept, EPTPointer, EptVpidCap
from vmxlab.structures.ept_entry import PageSize

EPT = 0x10_0000
"""Machine address of the EPT's PML4 table; its others follow."""
TABLES, PAGE = 0x1000, 0x9000
"""Guest-physical: L2's four tables one after the other, and the page that linear address 0 translates to."""
SHIFT = 0x40_0000
"""L2's guest-physical addresses lie so much higher in the machine's memory."""
EVERYTHING = EptVpidCap((1 << 64) - 1)
P, W, U, A, D = 1, 2, 4, 0x20, 0x40
ALL = P | W | U | A | D
MODE_BASED = SecondaryControls.MODE_BASED_EXECUTE_CONTROL_FOR_EPT
VE, PML = SecondaryControls.EPT_VIOLATION_VE, SecondaryControls.ENABLE_PML
KNOWN_ALWAYS = (1 << 64) - 1 & ~(1 << 6 | 1 << 14)


def l2_ept(**changes) -> Ept:
    """64 KiB of L2; `changes` are for the page at PAGE."""
    ept = Ept()
    ept.map(0, SHIFT, length=0x1_0000, accessed=True, dirty=True)
    if changes:
        ept.protect(PAGE, 0x1000, **changes)
    return ept


def memory_of(ept: Ept, leaf: int = ALL, **entries: int) -> MachineMemory:
    """EPT's tables, and L2's four levels of tables that map linear address 0 to PAGE."""
    memory = MachineMemory(ept.tables(EPT))
    for level in (4, 3, 2):
        below = TABLES + 0x1000 * (5 - level)
        value = below | entries.get(f"e{level}", ALL)
        memory.write(SHIFT + below - 0x1000, struct.pack("<Q", value))
    memory.write(SHIFT + TABLES + 0x3000, struct.pack("<Q", PAGE | leaf))
    return memory


def state(*, flags: bool = False, features: EptVpidCap = EVERYTHING, **more) -> PagingState:
    values = {
        "cr0": int(CR0.PG | CR0.PE | CR0.WP),
        "cr3": TABLES,
        "cr4": int(CR4.PAE),
        "efer": int(EFER.LMA | EFER.LME | EFER.NXE),
        "maxphyaddr": 40,
        "eptp": EPTPointer.from_table_phys(EPT, accessed_dirty=flags).bits,
        "ept_features": features,
    }
    return PagingState(**{**values, **more})


def ending(ept: Ept, access: Access = READ, memory: MachineMemory | None = None, **more):
    return translate(state(**more), 0x123, access, (memory or memory_of(ept)).read)


# --- exits -------------------------------------------------------------------------------------------------


def test_translation_through_both_levels() -> None:
    result = ending(l2_ept())
    assert isinstance(result, Translated)
    assert (result.gpa, result.hpa) == (PAGE + 0x123, SHIFT + PAGE + 0x123)
    assert (result.page_size, result.ept_page_size, result.writes) == (4096, 4096, ())
    assert {rule.section for rule in result.rules} == {"Vol. 3C, 29.3.2"}


@pytest.mark.parametrize(
    ("access", "denied", "kind", "known"),
    [
        (READ, {"read": False, "write": False}, 0b001, KNOWN_ALWAYS),
        (WRITE, {"write": False}, 0b010, KNOWN_ALWAYS),
        (FETCH, {"execute": False}, 0b100, KNOWN_ALWAYS),
        (Access(AccessKind.READ_MODIFY_WRITE), {"write": False}, 0b010, KNOWN_ALWAYS & ~1),
    ],
)
def test_qualification_of_a_violation(access: Access, denied, kind: int, known: int) -> None:
    """Vol. 3C, Table 28-7; whether a read-modify-write sets bit 0 is up to the processor."""
    result = ending(l2_ept(**denied), access)
    assert isinstance(result, EptViolation)
    rights = sum(bit for bit, name in ((8, "read"), (16, "write"), (32, "execute")) if name not in denied)
    assert result.qualification.value == kind | rights | 0b1111 << 7
    assert result.qualification.known == known
    assert (result.linear, result.gpa) == (0x123, PAGE + 0x123)


def test_without_advanced_information_its_bits_are_undefined() -> None:
    """Vol. 3C, Table 28-7: bits 11:9 need IA32_VMX_EPT_VPID_CAP[22]."""
    features = EptVpidCap(EVERYTHING.raw & ~(1 << 22))
    result = ending(l2_ept(read=False, write=False), features=features)
    assert not result.qualification.known & 0xE00


@pytest.mark.parametrize(
    ("leaf", "shown"), [(ALL, 0b011), (ALL & ~U, 0b010), (ALL & ~W, 0b001), (ALL | 1 << 63, 0b111)]
)
def test_advanced_information_is_that_of_l2s_paging(leaf: int, shown: int) -> None:
    """Vol. 3C, Table 28-7: bits 9 (user), 10 (read/write) and 11 (execute-disable)."""
    ept = l2_ept(read=False, write=False)
    result = ending(ept, memory=memory_of(ept, leaf))
    assert result.qualification.value >> 9 & 7 == shown


def test_without_paging_every_address_is_a_user_mode_one_that_may_be_written() -> None:
    """Vol. 3C, Table 28-7: bits 9 and 10 are 1, bit 11 is 0 where CR0.PG = 0."""
    ept = l2_ept(read=False, write=False)
    result = translate(state(cr0=1), PAGE, READ, memory_of(ept).read)
    assert result.qualification.value >> 9 & 7 == 0b011


def test_rights_are_those_of_all_entries_together() -> None:
    """Vol. 3C, Table 28-7: bits 5:3 are the AND over the entries; all 0 where one is not present."""
    ept = l2_ept(execute=False)
    ept.set_table_entry(0, 2, 0b101)
    result = translate(state(cr0=1), PAGE, WRITE, memory_of(ept).read)
    assert result.qualification.value >> 3 & 7 == 0b001
    ept.unmap(PAGE, 0x1000)
    result = translate(state(cr0=1), PAGE, WRITE, memory_of(ept).read)
    assert result.qualification.value >> 3 & 7 == 0


@pytest.mark.parametrize("flags", [False, True])
def test_violation_of_the_walk(flags: bool) -> None:
    """Vol. 3C, 29.3.3.2, Table 28-7 note 1: with EPTP bit 6 the walk writes, and sets bits 0 and 1."""
    ept = l2_ept()
    memory = memory_of(ept)
    ept.protect(TABLES + 0x1000, 0x1000, write=False, read=flags)
    memory = memory_of(ept)
    result = ending(ept, FETCH, memory, flags=flags)
    assert isinstance(result, EptViolation)
    assert (result.gpa, result.linear) == (TABLES + 0x1000, 0x123)
    assert result.qualification.value & 0x1BF == 0x80 | (0b101011 if flags else 0b100001)
    assert not result.qualification.known & 0xE00


def test_flag_update_that_ept_forbids_is_a_violation_by_a_write() -> None:
    """Vol. 3C, 29.3.3.2: writes that update flags are data writes."""
    ept = l2_ept()
    ept.protect(TABLES + 0x3000, 0x1000, write=False)
    result = ending(ept, READ, memory_of(ept, P | W | U))
    assert isinstance(result, EptViolation)
    assert result.gpa == TABLES + 0x3000
    assert (result.qualification.value & 0x13B, result.qualification.known & 1) == (0b101010, 0)
    assert isinstance(ending(ept, READ, memory_of(ept, P | W | U | A)), Translated)
    assert isinstance(ending(ept, WRITE, memory_of(ept, P | W | U | A)), EptViolation)


def test_flag_update_that_ept_forbids_and_another_failure_is_not_said() -> None:
    """The manual does not say when accessed flags are set."""
    ept = l2_ept()
    ept.protect(TABLES + 0x2000, 0x1000, write=False)
    assert isinstance(ending(ept, READ, memory_of(ept, 0, e2=P | W)), Unknown)
    assert isinstance(ending(ept, READ, memory_of(ept, 0)), PageFault)


def test_page_fault_comes_before_the_page_is_asked_for() -> None:
    """Vol. 3C, 29.3.3.3."""
    ept = l2_ept()
    ept.unmap(PAGE, 0x1000)
    assert isinstance(ending(ept, WRITE, memory_of(ept, ALL & ~W)), PageFault)
    assert isinstance(ending(ept, READ, memory_of(ept, ALL & ~W)), EptViolation)


@pytest.mark.parametrize(
    ("level", "entry", "features"),
    [
        (1, 0b010 | 6 << 3, 0),
        (1, 0b111 | 2 << 3, 0),
        (1, 0b111 | 6 << 3 | 1 << 45, 0),
        (2, 0b111 | 1 << 3, 0),
        (2, 0b111 | 6 << 3 | 0x80, 1 << 16),
        (3, 0b111 | 6 << 3 | 0x80, 1 << 17),
        (1, 0b100 | 6 << 3, 1),
        (4, 0b111 | 0x80, 0),
    ],
)
def test_misconfigurations(level: int, entry: int, features: int) -> None:
    """Vol. 3C, 29.3.3.1; `features`: the capability that would allow it."""
    ept = Ept()
    ept.set_raw_entry(0, level, entry)
    result = translate(
        state(features=EptVpidCap(EVERYTHING.raw & ~features), cr0=1), PAGE & 0, READ, memory_of(ept).read
    )
    assert isinstance(result, EptMisconfiguration)
    assert (result.level, result.entry, result.gpa) == (level, entry, 0)


@pytest.mark.parametrize("size", PageSize)
def test_pages_of_each_size(size: PageSize) -> None:
    """Vol. 3C, 29.3.2."""
    ept = Ept()
    ept.map(0, 3 * size, size)
    result = translate(state(cr0=1), 0xABC, READ, memory_of(ept).read)
    assert (result.hpa, result.ept_page_size) == (3 * size + 0xABC, size)


# --- mode-based execute control ----------------------------------------------------------------------------


@pytest.mark.parametrize(("execute", "user_execute"), [(True, False), (False, True)])
@pytest.mark.parametrize("leaf", [ALL, ALL & ~U], ids=["user-mode-address", "supervisor-mode-address"])
def test_mode_based_execute_control(execute: bool, user_execute: bool, leaf: int) -> None:
    """Vol. 3C, 29.3.3.2: bit 2 is for supervisor-mode addresses, bit 10 for user-mode ones."""
    ept = l2_ept(execute=execute, user_execute=user_execute)
    result = ending(
        ept, Access(AccessKind.FETCH, user=bool(leaf & U)), memory_of(ept, leaf), secondary=MODE_BASED
    )
    allowed = user_execute if leaf & U else execute
    assert isinstance(result, Translated) == allowed
    if not allowed:
        assert result.qualification.known & 1 << 6
        assert (result.qualification.value >> 5 & 1, result.qualification.value >> 6 & 1) == (
            execute,
            user_execute,
        )


def test_entry_with_bit_10_alone_is_present_with_mode_based_execute_control() -> None:
    """Vol. 3C, 29.3.2: else it is not, and a violation."""
    ept = l2_ept(read=False, write=False, execute=False, user_execute=True)
    assert isinstance(ending(ept), EptViolation)
    assert isinstance(ending(ept, Access(AccessKind.FETCH, user=True), secondary=MODE_BASED), Translated)
    without = EptVpidCap(EVERYTHING.raw & ~1)
    assert isinstance(ending(ept, secondary=MODE_BASED, features=without), EptMisconfiguration)


# --- flags and the log -------------------------------------------------------------------------------------


def fresh_ept() -> Ept:
    """Whose entries for PAGE have no flags set."""
    return l2_ept(accessed=False, dirty=False)


@pytest.mark.parametrize(("access", "bits"), [(READ, 0x100), (FETCH, 0x100), (WRITE, 0x300)])
def test_flags_of_ept(access: Access, bits: int) -> None:
    """Vol. 3C, 29.3.5: upper entries are not accessed yet here: they come first."""
    ept = fresh_ept()
    result = ending(ept, access, flags=True)
    addresses = [ept.entry_address(EPT, 0, level) for level in (4, 3, 2)]
    assert [write[0] for write in result.writes] == [*addresses, ept.entry_address(EPT, PAGE)]
    assert result.writes[-1][2] == memory_of(ept).read(ept.entry_address(EPT, PAGE), 8) | bits
    assert ending(ept, access, flags=False).writes == ()


def test_flags_of_ept_for_the_walk_are_set_even_if_it_fails() -> None:
    """Vol. 3C, 29.3.5: each guest-physical access of its own sets them."""
    ept = l2_ept()
    ept.protect(TABLES + 0x3000, 0x1000, accessed=False, dirty=False)
    result = ending(ept, READ, memory_of(ept, 0), flags=True)
    assert isinstance(result, PageFault)
    assert result.writes[-1][0] == ept.entry_address(EPT, TABLES + 0x3000)
    assert result.writes[-1][2] >> 8 & 3 == 3


def log_case(access: Access, index: int | None, ept: Ept, leaf: int = ALL):
    return ending(ept, access, memory_of(ept, leaf), flags=True, secondary=PML, pml_index=index)


def test_what_is_logged() -> None:
    """Vol. 3C, 29.3.6: the page of an access that sets a dirty flag for EPT, the walk's pages too."""
    assert log_case(WRITE, 511, fresh_ept()).logged == (PAGE,)
    assert log_case(READ, 511, fresh_ept()).logged == ()
    assert log_case(WRITE, 511, l2_ept()).logged == ()
    ept = fresh_ept()
    ept.protect(TABLES + 0x2000, 0x1000, dirty=False)
    assert log_case(WRITE, 511, ept).logged == (TABLES + 0x2000, PAGE)


@pytest.mark.parametrize(("access", "dirty"), [(WRITE, False), (READ, True)])
def test_log_full(access: Access, dirty: bool) -> None:
    """Vol. 3C, 29.3.6: before any flag for EPT is set, an accessed flag too."""
    ept = l2_ept(accessed=False, dirty=dirty)
    for table in range(TABLES, TABLES + 0x4000, 0x1000):
        ept.protect(table, 0x1000, accessed=True, dirty=True)
    for level in (4, 3, 2):
        ept.set_table_entry(0, level, 0b111 | 1 << 8)
    result = log_case(access, 0xFFFF, ept, ALL & ~D)
    assert isinstance(result, PmlFull)
    assert (result.gpa, result.writes) == (PAGE + 0x123, ())
    assert bool(result.possible_flags) == access.writes  # L2's dirty flag, before or not
    assert isinstance(log_case(access, 0, ept), Translated)
    assert isinstance(log_case(access, None, ept), Unknown)


def test_log_that_fills_up_on_the_way() -> None:
    """Vol. 3C, 29.3.6: the index is decremented by each entry, from 0 to FFFFH."""
    ept = fresh_ept()
    ept.protect(TABLES, 0x1000, dirty=False)
    result = log_case(WRITE, 0, ept)
    assert isinstance(result, PmlFull)
    assert (result.gpa, result.logged) == (PAGE + 0x123, (TABLES,))


# --- virtualization exceptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("suppressed", [True, False])
@pytest.mark.parametrize("control", [VE, SecondaryControls(0)])
def test_convertible_violations(mapped: bool, suppressed: bool, control: SecondaryControls) -> None:
    """Vol. 3C, 26.5.7.1: bit 63 of the entry that is not present, or that maps the page."""
    ept = l2_ept()
    ept.set_raw_entry(PAGE, 1, (0b101 | 6 << 3 if mapped else 0) | suppressed << 63 | SHIFT + PAGE)
    result = ending(ept, WRITE, secondary=control)
    assert isinstance(result, EptViolation)
    assert result.convertible is (bool(control) and not suppressed)


def test_bit_63_of_an_entry_that_leads_to_a_table_does_not_count() -> None:
    """Vol. 3C, 26.5.7.1."""
    ept = l2_ept(write=False)
    ept.set_table_entry(0, 2, 0b111 | 1 << 63)
    assert ending(ept, WRITE, secondary=VE).convertible
    assert not translate(state(secondary=VE, cr0=0), PAGE, WRITE, memory_of(ept).read).convertible


# --- PDPTEs, several pages, and what is not modelled -------------------------------------------------------


@pytest.mark.parametrize("flags", [False, True])
def test_load_of_pdptes_is_a_read_without_a_linear_address(flags: bool) -> None:
    """Vol. 3C, 29.3.3.2, Table 28-7: bit 7 is 0, and a page that can't be written does."""
    ept = l2_ept()
    ept.protect(PAGE, 0x1000, write=False, dirty=False)
    memory = memory_of(ept)
    memory.write(SHIFT + PAGE, struct.pack("<4Q", 0x1001, 0, 0, 0))
    loaded = load_pdptes(state(flags=flags), PAGE, memory.read)
    assert isinstance(loaded, PdptesLoaded)
    ept.unmap(PAGE, 0x1000)
    result = load_pdptes(state(flags=flags), PAGE, memory_of(ept).read)
    assert isinstance(result, EptViolation)
    assert (result.linear, result.gpa, result.qualification.value) == (None, PAGE, 1)
    assert not result.qualification.known & 1 << 8


def test_log_entries_of_two_pages_have_no_order() -> None:
    """Vol. 3C, 29.3.6 does not say which of two pages is logged first."""
    ept = l2_ept()
    ept.protect(PAGE, 0x2000, dirty=False)
    read = memory_of(ept).read
    both = state(cr0=1, flags=True, secondary=PML, pml_index=511)
    assert isinstance(translate_bytes(both, PAGE + 0xFFE, 4, WRITE, read), Unknown)
    pages = translate_bytes(both, PAGE + 0xFFE, 4, READ, read)
    assert [page.hpa for page in pages] == [SHIFT + PAGE + 0xFFE, SHIFT + PAGE + 0x1000]


@pytest.mark.parametrize(
    "more",
    [
        {"tertiary": TertiaryControls.ENABLE_HLAT},
        {"tertiary": TertiaryControls.GUEST_PAGING_VERIFICATION},
        {"eptp": EPTPointer.from_table_phys(EPT, page_walk_length=5).bits},
        {"maxphyaddr": 52, "cr3": 1 << 49},
        {"eptp": EPTPointer.from_table_phys(0x70_0000).bits},
    ],
)
def test_what_is_not_modelled_is_unknown(more) -> None:
    assert isinstance(ending(l2_ept(), **more), Unknown)


@pytest.mark.parametrize(
    ("bit", "more"),
    [
        ({"sub_page_write": True}, {"secondary": SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT}),
        ({"supervisor_shadow_stack": True}, {"eptp": EPTPointer.from_table_phys(EPT).bits | 0x80}),
    ],
)
def test_special_writes_are_unknown(bit, more) -> None:
    access = Access(AccessKind.WRITE, shadow_stack="supervisor_shadow_stack" in bit)
    ept = l2_ept(write=False, **bit)
    assert isinstance(ending(ept, access, memory_of(ept, P | A | D), **more), PageFault | Unknown)
    assert isinstance(ending(ept, WRITE), EptViolation)
