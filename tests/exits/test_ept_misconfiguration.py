"""EPT misconfigurations: which entries are, and what the exit records (SDM Vol. 3C, 28.2.1 and 29.3.3.1).

Each entry is put in the way of one read. `Ept.check` has to say the same as the processor of every one.
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, Ept, ExitReason, Field, MemoryType, PageSize, SecondaryControls, guest_ept
from vmxlab.cases.memory import DATA, PAGE_TABLES, PROGRAM, UNMAPPED, machine_address
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.registers import RFLAGS

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)

PAGE = DATA + 0x8000
READ, WRITE, FETCH = "mov rbx, [rdi]", "mov [rdi], rbx", "jmp rdi"
R, W, X, LARGE = 1, 2, 4, 1 << 7
RWX = R | W | X
WB = MemoryType.WB << 3

FAR = 0x4000_0000 + 5 * 0x20_0000 + 3 * 0x1000
"""Its EPT PDPTE, PDE and PTE translate nothing else that L2 uses."""
_FAR_DIRECTORY = DATA + 0x1000
FAR_PAGING = {
    # L2's own way there: entry 1 of its PDPT, and entry 5 of a page directory that maps pages of 2 MiB.
    PAGE_TABLES + 0x1000 + 8: struct.pack("<Q", _FAR_DIRECTORY | 3),
    _FAR_DIRECTORY + 5 * 8: struct.pack("<Q", FAR & -0x20_0000 | 0x83),
}

SIZES = {1: PageSize.SIZE_4K, 2: PageSize.SIZE_2M, 3: PageSize.SIZE_1G}
PAGE_FEATURES = {1: (), 2: ("page_2m",), 3: ("page_1g",)}
HPA = {1: FREE_PAGES, 2: FREE_PAGES, 3: 0}
"""By level: where a page of that size is mapped to."""


def ept_with_page(level: int, bits: int) -> Ept:
    """FAR mapped by an entry of this level with these bits, the address, and bit 7 for a large page."""
    ept = guest_ept()
    ept.set_raw_entry(FAR, level, HPA[level] | (LARGE if level > 1 else 0) | bits)
    return ept


def ept_with_table(level: int, bits: int) -> Ept:
    """FAR mapped by pages of 4 KiB, with these bits in the entry of this level, which leads to a table."""
    ept = guest_ept()
    ept.map(FAR, FREE_PAGES)
    ept.set_table_entry(FAR, level, bits)
    return ept


def far_case(ept: Ept, access: str = READ, **more) -> Case:
    return Case(
        program=f"nop; {access}; hlt",
        registers={"rdi": FAR + 0x128},
        memory={FREE_PAGES + (FAR + 0x128) % 0x20_0000: b"\xf4"} | more.pop("memory", {}),
        data=FAR_PAGING,
        ept=ept,
        **more,
    )


def assert_misconfigured(run, *, address: int = FAR + 0x128, rip: int = PROGRAM + 1) -> None:
    """The one exit: basic reason 49, the guest-physical address, no event, and nothing executed.

    (The guest-linear address is undefined: 28.2.1. For the exit qualification see below.)
    """
    assert run.reasons == [ExitReason.EPT_MISCONFIGURATION]
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EPT_MISCONFIGURATION
    assert hex(exit_.guest_physical_address) == hex(address)
    assert exit_.rip == rip
    assert exit_.registers["rbx"] == 0
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def assert_check_agrees(vmxlab, ept: Ept, level: int | None) -> None:
    """`Ept.check` names an entry of this level and no other; None: it finds nothing."""
    faults = ept.check(vmxlab.capabilities.ept_vpid, physical_address_width=vmxlab.physical_address_width)
    assert {fault.level for fault in faults} == ({level} if level else set())


def run_each(vmxlab, epts: dict[str, Ept], level: int) -> dict[str, list]:
    """Run a read of FAR through each EPT, all of which `Ept.check` must find wrong at this level."""
    assert epts
    seen = {}
    for name, ept in epts.items():
        assert_check_agrees(vmxlab, ept, level)
        run = vmxlab.run(far_case(ept))
        seen[name] = run.reasons
        if run.reasons == [ExitReason.EPT_MISCONFIGURATION]:
            assert_misconfigured(run)
    return seen


def all_misconfigured(names) -> dict[str, list]:
    return {name: [ExitReason.EPT_MISCONFIGURATION] for name in names}


# --- rights ------------------------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize("access", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("rights", [W, W | X], ids=["write-only", "write-execute"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_page_to_write_but_not_to_read_is_misconfigured(vmxlab, level, rights, access):
    """Vol. 3C, 29.3.3.1: bits 2:0 of 010b or 110b, whatever the access is."""
    vmxlab.require_ept(*PAGE_FEATURES[level])
    ept = ept_with_page(level, rights | WB)
    assert_check_agrees(vmxlab, ept, level)
    run = vmxlab.run(far_case(ept, access))
    assert_misconfigured(run, rip=FAR + 0x128 if access == FETCH else PROGRAM + 1)


@pytest.mark.parametrize("rights", [W, W | X], ids=["write-only", "write-execute"])
@pytest.mark.parametrize("level", [2, 3])
def test_table_to_write_but_not_to_read_is_misconfigured(vmxlab, level, rights):
    """Vol. 3C, 29.3.3.1: the same in an entry that leads to a table."""
    ept = ept_with_table(level, rights)
    assert_check_agrees(vmxlab, ept, level)
    assert_misconfigured(vmxlab.run(far_case(ept)))


@pytest.mark.parametrize("bits", [W, W | X, *(RWX | 1 << n for n in range(3, 8))], ids=hex)
def test_pml4_entry_is_misconfigured(vmxlab, bits):
    """Vol. 3C, 29.3.3.1, Table 29-1: rights without read, or any of bits 7:3. L2's first access meets it."""
    ept = guest_ept()
    ept.set_raw_entry(0, 4, FREE_PAGES | bits)
    assert_check_agrees(vmxlab, ept, 4)
    # L2 reads its own PML4 entry in order to fetch.
    assert_misconfigured(vmxlab.run(Case(ept=ept)), address=PAGE_TABLES, rip=PROGRAM)


@pytest.mark.parametrize(
    ("where", "level"), [("page", 1), ("page", 2), ("page", 3), ("table", 2), ("table", 3)]
)
def test_execute_only_is_misconfigured_where_it_is_not_supported(vmxlab, where, level):
    """Vol. 3C, 29.3.3.1: bits 2:0 of 100b; with the capability a read is an EPT violation instead."""
    vmxlab.require_ept(*(PAGE_FEATURES[level] if where == "page" else ()))
    ept = ept_with_page(level, X | WB) if where == "page" else ept_with_table(level, X)
    run = vmxlab.run(far_case(ept))
    if vmxlab.capabilities.ept_vpid.execute_only:
        assert_check_agrees(vmxlab, ept, None)
        assert run.reasons == [ExitReason.EPT_VIOLATION]
    else:
        assert_check_agrees(vmxlab, ept, level)
        assert_misconfigured(run)


# --- memory types ------------------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize("memory_type", range(8))
@pytest.mark.parametrize("level", [1, 2, 3])
def test_memory_type_of_a_page(vmxlab, level, memory_type):
    """Vol. 3C, 29.3.3.1: in bits 5:3 of an entry that maps a page 2, 3 and 7 are reserved."""
    vmxlab.require_ept(*PAGE_FEATURES[level])
    ept = ept_with_page(level, RWX | memory_type << 3)
    run = vmxlab.run(far_case(ept))
    if memory_type in (2, 3, 7):
        assert_check_agrees(vmxlab, ept, level)
        assert_misconfigured(run)
    else:
        assert_check_agrees(vmxlab, ept, None)
        assert run.reasons == [ExitReason.HLT]


# --- reserved bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [2, 3])
def test_bits_6_to_3_of_an_entry_that_leads_to_a_table_are_reserved(vmxlab, level):
    """Vol. 3C, Tables 29-3 and 29-5."""
    epts = {f"bit {n}": ept_with_table(level, RWX | 1 << n) for n in range(3, 7)}
    assert run_each(vmxlab, epts, level) == all_misconfigured(epts)


def bits_beyond(width: int) -> range:
    if width == 52:
        pytest.skip("the processor uses all 52 bits of physical addresses")
    return range(width, 52)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_address_bits_of_a_page_beyond_the_processors_width_are_reserved(vmxlab, level):
    """Vol. 3C, 29.3.3.1: a bit in 51:12 beyond the physical-address width."""
    vmxlab.require_ept(*PAGE_FEATURES[level])
    bits = bits_beyond(vmxlab.physical_address_width)
    epts = {f"bit {n}": ept_with_page(level, RWX | WB | 1 << n) for n in bits}
    assert run_each(vmxlab, epts, level) == all_misconfigured(epts)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_address_bits_of_a_table_beyond_the_processors_width_are_reserved(vmxlab, level):
    """Vol. 3C, 29.3.3.1: the same in an entry that leads to a table."""
    for n in bits_beyond(vmxlab.physical_address_width):
        ept = guest_ept()
        ept.set_raw_entry(FAR, level, RWX | 1 << n)
        run = vmxlab.run(far_case(ept))
        if level == 4:
            assert_misconfigured(run, address=PAGE_TABLES, rip=PROGRAM)
        else:
            assert_misconfigured(run)


@pytest.mark.parametrize("level", [2, 3])
def test_address_bits_of_a_large_page_below_its_size_are_reserved(vmxlab, level):
    """Vol. 3C, Tables 29-2 and 29-4: bits 20:12 of a page of 2 MiB, 29:12 of one of 1 GiB (12: see below)."""
    vmxlab.require_ept(*PAGE_FEATURES[level])
    epts = {f"bit {n}": ept_with_page(level, RWX | WB | 1 << n) for n in range(13, {2: 21, 3: 30}[level])}
    assert run_each(vmxlab, epts, level) == all_misconfigured(epts)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.vmx_known_difference("kvm-ept-misconfiguration-qualification")
def test_exit_qualification_of_a_misconfiguration_is_cleared(vmxlab):
    """Vol. 3C, 28.2.1: it is none of the exits for which the field is saved."""
    run = vmxlab.run(far_case(ept_with_page(1, W | WB)))
    assert run.reasons == [ExitReason.EPT_MISCONFIGURATION]
    assert run.exits[0].raw_qualification == 0


@pytest.mark.vmx_known_difference("ept-large-page-bit-12-not-reserved")
@pytest.mark.parametrize("level", [2, 3])
def test_bit_12_of_a_large_page_is_reserved(vmxlab, level):
    """Vol. 3C, Tables 29-2 and 29-4: the same; it is no PAT bit, as it would be in L2's own paging."""
    vmxlab.require_ept(*PAGE_FEATURES[level])
    ept = ept_with_page(level, RWX | WB | 1 << 12)
    assert_check_agrees(vmxlab, ept, level)
    assert_misconfigured(vmxlab.run(far_case(ept)))


@pytest.mark.parametrize("level", [2, 3])
def test_large_page_is_misconfigured_where_its_size_is_not_supported(vmxlab, level):
    """Vol. 3C, 29.3.2: without the capability bit 7 of the entry is reserved, and has to be 0."""
    (feature,) = PAGE_FEATURES[level]
    ept = ept_with_page(level, RWX | WB)
    run = vmxlab.run(far_case(ept))
    if getattr(vmxlab.capabilities.ept_vpid, feature):
        assert_check_agrees(vmxlab, ept, None)
        assert run.reasons == [ExitReason.HLT]
    else:
        assert_check_agrees(vmxlab, ept, level)
        assert_misconfigured(run)


IGNORED = {
    # Bits 8 and 9 without accessed and dirty flags, 10 without mode-based execute control, 57, 58, 60, 61 and
    # 63 without the features that use them (Tables 29-1 to 29-7).
    "page": (6, 8, 9, 10, 11, *range(52, 64)),
    "table": (8, 9, 10, 11, *range(52, 64)),
}


@pytest.mark.parametrize(
    ("where", "level"), [("page", 1), ("page", 2), ("page", 3), ("table", 2), ("table", 3), ("table", 4)]
)
def test_ignored_bits_are_no_misconfiguration(vmxlab, where, level):
    """Vol. 3C, Tables 29-1 to 29-7: these bits have no meaning unless a feature is on that gives them one."""
    vmxlab.require_ept(*(PAGE_FEATURES[level] if where == "page" else ()))
    numbers = (*IGNORED[where], *([7] * (level == 1)))
    bits = RWX | sum(1 << n for n in numbers)
    ept = ept_with_page(level, bits | WB) if where == "page" else ept_with_table(level, bits)
    assert_check_agrees(vmxlab, ept, None)
    assert vmxlab.run(far_case(ept)).reasons == [ExitReason.HLT]


# --- what comes first --------------------------------------------------------------------------------------

RESERVED_TYPE = 7 << 3


@pytest.mark.parametrize(
    ("name", "rights", "access"),
    [("read", X, READ), ("write", R, WRITE), ("fetch", R | W, FETCH)],
    ids=["read", "write", "fetch"],
)
def test_misconfiguration_comes_before_the_violation_of_its_own_rights(vmxlab, name, rights, access):
    """Vol. 3C, 29.3.3.3: rights count only if the translation ends without a misconfiguration."""
    vmxlab.require_ept(*["execute_only"] * (rights == X))
    rip = FAR + 0x128 if access == FETCH else PROGRAM + 1
    assert_misconfigured(vmxlab.run(far_case(ept_with_page(1, rights | RESERVED_TYPE), access)), rip=rip)


@pytest.mark.parametrize("level", [2, 3])
def test_misconfigured_page_comes_before_the_violation_of_the_rights_above(vmxlab, level):
    """Vol. 3C, 29.3.3.3: the walk goes on where an upper entry denies the access."""
    ept = ept_with_page(1, RWX | RESERVED_TYPE)
    ept.set_table_entry(FAR, level, R | X)
    assert_misconfigured(vmxlab.run(far_case(ept, WRITE)))


def test_misconfigured_table_comes_before_the_page_that_is_not_there(vmxlab):
    """Vol. 3C, 29.3.3.3: the walk ends at the first entry that is misconfigured or not present."""
    ept = guest_ept()
    ept.map(FAR + 0x1000, FREE_PAGES)
    ept.set_table_entry(FAR, 2, RWX | 1 << 3)
    assert_misconfigured(vmxlab.run(far_case(ept)))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_entry_that_is_not_present_is_never_misconfigured(vmxlab, level):
    """Vol. 3C, 29.3.2, 29.3.3.2: with bits 2:0 clear all others are ignored: a violation."""
    everything = (1 << 64) - 1 & ~RWX
    for bits in (RESERVED_TYPE, 1 << 51, 0xFF8, everything):
        ept = guest_ept()
        ept.set_raw_entry(FAR, level, bits)
        assert_check_agrees(vmxlab, ept, None)
        run = vmxlab.run(far_case(ept))
        assert run.reasons == [ExitReason.EPT_VIOLATION]
        q = run.exits[0].qualification
        assert (q.read, q.readable, q.writable, q.executable) == (True, False, False, False)
        assert run.exits[0].guest_physical_address == FAR + 0x128


def test_not_present_table_hides_what_is_below_it(vmxlab):
    """Vol. 3C, 29.3.2: nothing is read through an entry that is not present."""
    ept = ept_with_page(1, RWX | RESERVED_TYPE)
    ept.set_table_entry(FAR, 2, 0)
    assert vmxlab.run(far_case(ept)).reasons == [ExitReason.EPT_VIOLATION]


# --- other accesses ----------------------------------------------------------------------------------------


def test_misconfiguration_in_the_walk_of_the_guests_paging(vmxlab):
    """Vol. 3C, 28.2.1, 29.3.1: the address is that of L2's paging-structure entry."""
    ept = guest_ept()
    ept.set_raw_entry(_FAR_DIRECTORY, 1, machine_address(_FAR_DIRECTORY) | RWX | RESERVED_TYPE)
    ept.map(FAR, FREE_PAGES)
    assert_misconfigured(vmxlab.run(far_case(ept)), address=_FAR_DIRECTORY + 5 * 8)


def test_misconfiguration_while_an_event_is_delivered(vmxlab):
    """Vol. 3C, 28.2.4: the IDT-vectoring fields hold the event."""
    ept = guest_ept()
    ept.map(UNMAPPED, FREE_PAGES, memory_type=7)
    fields = {Field.EXCEPTION_BITMAP: 0, Field.GUEST_IDTR_BASE: UNMAPPED, Field.GUEST_IDTR_LIMIT: 0xFFF}
    run = vmxlab.run(Case(program="nop; ud2", ept=ept, fields=fields))
    assert run.reasons == [ExitReason.EPT_MISCONFIGURATION]
    assert run.exits[0].guest_physical_address & ~0xF == UNMAPPED + 16 * 6
    assert (run.exits[0].idt_vectoring.valid, run.exits[0].idt_vectoring.vector) == (True, 6)
    assert run.exits[0].rip == PROGRAM + 1


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.vmx_known_difference("ept-exit-rf-clear")
def test_misconfiguration_saves_the_resume_flag_as_1(vmxlab):
    """Vol. 3C, 28.3.3: RF is saved as 1 if no event was being delivered."""
    run = vmxlab.run(far_case(ept_with_page(1, W)))
    assert run.exits[0].rflags == RFLAGS.RF | 2
