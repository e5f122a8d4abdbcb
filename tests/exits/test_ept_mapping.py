"""EPT as a translation: pages of all sizes, rights on them, splits, and what L1 changes while L2 runs.

SDM Vol. 3C, 29.3.2 (the tables), 29.4.3 (what INVEPT is for). L2 has to find the bytes that the case put at
the machine address, and L1 has to find L2's there.
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, Ept, ExitReason, MemoryType, PageSize, SecondaryControls, guest_ept, on
from vmxlab.cases.memory import DATA, L2_MEMORY, PAGE_TABLES, PROGRAM, UNMAPPED, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)

SIZE_4K, SIZE_2M, SIZE_1G = PageSize
PAGE = DATA + 0x8000
GIB = 1 << 30
FAR = GIB + FREE_PAGES
"""An address of L2 in its second GiB; the 2 MiB page there is FREE_PAGES where 1 GiB is mapped to 0."""
OTHER_PAGES = FREE_PAGES + 8 * SIZE_2M

_FAR_DIRECTORY = DATA + 0x1000
FAR_PAGING = {
    # L2's own paging for the second GiB, one to one, by pages of 2 MiB.
    PAGE_TABLES + 0x1000 + 8: struct.pack("<Q", _FAR_DIRECTORY | 3),
    _FAR_DIRECTORY: struct.pack("<512Q", *(GIB + (n << 21) | 0x83 for n in range(512))),
}
VALUE = 0x1122334455667788
BYTES = VALUE.to_bytes(8, "little")
R, W, X = 1, 2, 4


def far_case(program: str, ept: Ept, **more) -> Case:
    return Case(program=f"{program}; hlt", ept=ept, data=FAR_PAGING, **more)


def ept_with(size: PageSize, **attributes) -> Ept:
    """L2's own memory as by default, and FAR mapped to FREE_PAGES by a page of this size."""
    ept = guest_ept()
    base = FAR & -size
    ept.map(base, FREE_PAGES - (FAR - base), size, **attributes)
    return ept


SIZES = pytest.mark.parametrize(
    ("size", "features"),
    [(SIZE_4K, ()), (SIZE_2M, ("page_2m",)), (SIZE_1G, ("page_1g",))],
    ids=["4K", "2M", "1G"],
)
OFFSETS = {
    SIZE_4K: (0, 0x123, 0xFF8),
    SIZE_2M: (0, 0x1234, 0xF_F123, 0x1F_FFF8),
    SIZE_1G: (0, 0x12_3450, 0x2AB_CDE8, -0x18_0000),
}


# --- translation -------------------------------------------------------------------------------------------


@SIZES
def test_l2_reads_what_lies_at_the_machine_address(vmxlab, size, features):
    """Vol. 3C, 29.3.2: the page's address from the entry, the offset of 12, 21 or 30 bits from L2's."""
    vmxlab.require_ept(*features)
    ept = ept_with(size)
    offsets = OFFSETS[size]
    memory, names = {}, ("rax", "rbx", "rcx", "rdx")
    for number, offset in enumerate(offsets):
        translation = ept.translate(FAR + offset)
        assert (translation.hpa, translation.size) == (FREE_PAGES + offset, size)
        memory[FREE_PAGES + offset] = (VALUE + number).to_bytes(8, "little")
    program = "; ".join(
        f"movabs rdi, {FAR + at}; mov {name}, [rdi]" for name, at in zip(names, offsets, strict=False)
    )
    run = vmxlab.run(far_case(program, ept, memory=memory))
    assert run.reasons == [ExitReason.HLT]
    assert [run.exits[0].registers[name] for name, _ in zip(names, offsets, strict=False)] == [
        VALUE + number for number in range(len(offsets))
    ]


@SIZES
def test_l1_finds_what_l2_wrote(vmxlab, size, features):
    """Vol. 3C, 29.3.2: the same for writes."""
    vmxlab.require_ept(*features)
    offset = OFFSETS[size][1]
    case = far_case(
        "mov [rdi], rbx",
        ept_with(size),
        registers={"rdi": FAR + offset, "rbx": VALUE},
        steps=(*STANDARD, ReportMemory(FREE_PAGES + offset, 8)),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.memory[FREE_PAGES + offset] == BYTES


@SIZES
def test_l2_executes_what_lies_at_the_machine_address(vmxlab, size, features):
    """Vol. 3C, 29.3.2: the same for fetches."""
    vmxlab.require_ept(*features)
    offset = OFFSETS[size][1]
    code = bytes.fromhex("b8 2a 00 00 00 f4")  # mov eax, 42; hlt
    case = far_case(
        "jmp rdi", ept_with(size), registers={"rdi": FAR + offset}, memory={FREE_PAGES + offset: code}
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert (run.exits[0].rip, run.exits[0].registers["rax"]) == (FAR + offset + 5, 42)


def test_two_guest_pages_may_be_one_page_of_the_machine(vmxlab):
    """Vol. 3C, 29.3.2: nothing says that a page is mapped once."""
    ept = guest_ept()
    ept.map(UNMAPPED, machine_address(PAGE))
    run = vmxlab.run(
        Case(
            program="mov [UNMAPPED+8], rbx; mov rax, [rdi+8]; hlt",
            registers={"rdi": PAGE, "rbx": VALUE},
            ept=ept,
        )
    )
    assert run.exits[0].registers["rax"] == VALUE


def test_neighbours_may_be_mapped_far_apart(vmxlab):
    """Vol. 3C, 29.3.2: an access across pages is two translations."""
    ept = guest_ept()
    ept.map(UNMAPPED, FREE_PAGES + 0x5000)
    ept.map(UNMAPPED + 0x1000, FREE_PAGES + 0x2000)
    memory = {FREE_PAGES + 0x5FFD: BYTES[:3], FREE_PAGES + 0x2000: BYTES[3:]}
    run = vmxlab.run(Case(program="mov rax, [UNMAPPED+0xffd]; hlt", ept=ept, memory=memory))
    assert run.exits[0].registers["rax"] == VALUE


def test_all_of_l2_in_one_large_page(vmxlab):
    """Vol. 3C, 29.3.2: L2's program, its tables and its data by a single entry."""
    vmxlab.require_ept("page_2m")
    ept = Ept()
    ept.map(0, L2_MEMORY, SIZE_2M)
    run = vmxlab.run(Case(program="mov rax, [DATA+8]; hlt", data={DATA + 8: BYTES}, ept=ept))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == VALUE


@pytest.mark.parametrize("memory_type", list(MemoryType))
@pytest.mark.parametrize("ignore_pat", [False, True])
def test_memory_type_changes_no_value(vmxlab, memory_type, ignore_pat):
    """Vol. 3C, 29.3.7.2: types and bit 6 are about caching; what is written is read."""
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, memory_type=memory_type, ignore_pat=ignore_pat)
    run = vmxlab.run(
        Case(program="mov [rdi], rbx; mov rax, [rdi]; hlt", registers={"rdi": PAGE, "rbx": VALUE}, ept=ept)
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == VALUE


# --- rights on large pages, and splitting them -------------------------------------------------------------

READ, WRITE, FETCH = "mov rbx, [rdi]", "mov [rdi], rbx", "jmp rdi"


@pytest.mark.parametrize(
    ("access", "rights", "shown"),
    [
        (READ, {"read": False, "write": False}, (False, False, True)),
        (WRITE, {"write": False}, (True, False, True)),
        (FETCH, {"execute": False}, (True, True, False)),
    ],
    ids=["read", "write", "fetch"],
)
@SIZES
def test_violation_of_a_page_of_any_size(vmxlab, size, features, access, rights, shown):
    """Vol. 3C, 29.3.3.2: the last entry's rights hold for the whole page, and the address is exact."""
    vmxlab.require_ept(*features, *["execute_only"] * (access == READ))
    address = FAR + OFFSETS[size][1]
    run = vmxlab.run(far_case(f"nop; {access}", ept_with(size, **rights), registers={"rdi": address}))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    q = run.exits[0].qualification
    assert (q.read, q.write, q.fetch) == (access == READ, access == WRITE, access == FETCH)
    assert (q.readable, q.writable, q.executable) == shown
    assert (run.exits[0].guest_physical_address, run.exits[0].guest_linear_address) == (address, address)
    assert run.exits[0].rip == (address if access == FETCH else PROGRAM + 1)


@pytest.mark.parametrize("level", [3, 2])
def test_large_page_ends_where_it_ends(vmxlab, level):
    """Vol. 3C, 29.3.2: the byte behind it is translated by the next entry, which is not there."""
    size, feature = {2: (SIZE_2M, "page_2m"), 3: (SIZE_1G, "page_1g")}[level]
    vmxlab.require_ept(feature)
    ept = guest_ept()
    # 1 GiB: from 0, in place of L2's own pages; 2 MiB: behind them.
    if level == 2:
        ept.map(SIZE_2M, FREE_PAGES, size)
        edge = 2 * SIZE_2M
        case = Case(program="mov rax, [rdi]; mov rbx, [rdi+1]; hlt", registers={"rdi": edge - 8}, ept=ept)
    else:
        ept.map(GIB, 0, size)
        edge = 2 * GIB
        paging = FAR_PAGING | {PAGE_TABLES + 0x1000 + 16: struct.pack("<Q", _FAR_DIRECTORY + 0x1000 | 3)}
        paging[_FAR_DIRECTORY + 0x1000] = struct.pack("<Q", edge | 0x83)
        case = Case(
            program="mov al, [rdi+7]; mov rbx, [rdi+1]; hlt",
            registers={"rdi": edge - 8},
            ept=ept,
            data=paging,
        )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    assert run.exits[0].guest_physical_address == edge
    assert run.exits[0].rip > PROGRAM


@pytest.mark.parametrize(("size", "feature"), [(SIZE_2M, "page_2m"), (SIZE_1G, "page_1g")], ids=["2M", "1G"])
def test_split_page_translates_as_before(vmxlab, size, feature):
    """Vol. 3C, 29.3.2: 512 smaller pages in place of one: L2 sees no difference."""
    vmxlab.require_ept("page_2m", feature)
    ept = ept_with(size)
    ept.split(FAR)
    assert ept.translate(FAR).size is {SIZE_2M: SIZE_4K, SIZE_1G: SIZE_2M}[size]
    offset = OFFSETS[size][2]
    run = vmxlab.run(
        far_case("mov rax, [rdi]", ept, registers={"rdi": FAR + offset}, memory={FREE_PAGES + offset: BYTES})
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == VALUE


@pytest.mark.parametrize("change", ["protect", "unmap"])
@pytest.mark.parametrize(("size", "feature"), [(SIZE_2M, "page_2m"), (SIZE_1G, "page_1g")], ids=["2M", "1G"])
def test_one_page_of_a_split_one_can_differ(vmxlab, size, feature, change):
    """Vol. 3C, 29.3.2: its neighbours on both sides are as they were."""
    vmxlab.require_ept("page_2m", feature)
    ept = ept_with(size)
    hole = FAR + 0x4_5000
    if change == "protect":
        ept.protect(hole, 0x1000, write=False)
    else:
        ept.unmap(hole, 0x1000)
    program = "mov [rdi-8], rbx; mov [rdi+0x1000], rbx; nop; mov [rdi], rbx"
    steps = (*STANDARD, ReportMemory(FREE_PAGES + 0x4_4FF8, 8), ReportMemory(FREE_PAGES + 0x4_6000, 8))
    run = vmxlab.run(far_case(program, ept, registers={"rdi": hole, "rbx": VALUE}, steps=steps))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    q = run.exits[0].qualification
    kept = change == "protect"
    assert (q.write, q.readable, q.writable, q.executable) == (True, kept, False, kept)
    assert run.exits[0].guest_physical_address == hole
    assert list(run.memory.values()) == [BYTES, BYTES]


# --- what L1 changes while L2 runs -------------------------------------------------------------------------


def page_entry(hpa: int, rights: int = R | W | X, large: bool = False) -> bytes:
    return struct.pack("<Q", hpa | rights | MemoryType.WB << 3 | large << 7)


INVEPT = pytest.mark.parametrize("invept", [True, False], ids=["invept", "no-invept"])


def repair(
    reason: ExitReason, ept: Ept, gpa: int, entry: bytes, *, level: int = 1, invept: bool, times: int = 0
):
    """React to an exit: write the entry of this level that translates `gpa`, and go on."""
    reaction = on(reason, times=times).write(ept.entry_address(EPT_TABLES, gpa, level), entry)
    return (reaction.invept() if invept else reaction).resume()


def require_invept(vmxlab, invept: bool, *features: str) -> None:
    vmxlab.require_ept(*features, *["invept", "invept_single_context"] * invept)


@INVEPT
def test_violation_can_be_repaired(vmxlab, invept):
    """Vol. 3C, 29.4.2: an entry that is not present is not cached: the read is made again."""
    require_invept(vmxlab, invept)
    ept = guest_ept()
    run = vmxlab.run(
        Case(
            program="nop; mov rax, [UNMAPPED + 0x10]; mov rbx, 1; hlt",
            ept=ept,
            memory={FREE_PAGES + 0x10: BYTES},
            reactions=[
                repair(ExitReason.EPT_VIOLATION, ept, UNMAPPED, page_entry(FREE_PAGES), invept=invept)
            ],
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION, ExitReason.HLT]
    assert (run.exits[0].rip, run.exits[0].registers["rax"]) == (PROGRAM + 1, 0)
    assert (run.exits[1].registers["rax"], run.exits[1].registers["rbx"]) == (VALUE, 1)


@INVEPT
def test_violation_can_be_repaired_by_a_large_page(vmxlab, invept):
    """Vol. 3C, 29.3.2: a PDE that was not present may map a page of 2 MiB."""
    require_invept(vmxlab, invept, "page_2m")
    ept = guest_ept()
    address = 3 * SIZE_2M + 0x1_2340
    run = vmxlab.run(
        Case(
            program="mov rax, [rdi]; hlt",
            registers={"rdi": address},
            ept=ept,
            memory={FREE_PAGES + 0x1_2340: BYTES},
            reactions=[
                repair(
                    ExitReason.EPT_VIOLATION,
                    ept,
                    address,
                    page_entry(FREE_PAGES, large=True),
                    level=2,
                    invept=invept,
                )
            ],
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION, ExitReason.HLT]
    assert run.exits[1].registers["rax"] == VALUE


@INVEPT
def test_rights_can_be_granted_one_after_the_other(vmxlab, invept):
    """Vol. 3C, 29.4.3.1: an EPT violation itself ends the use of the translation that it was made by."""
    require_invept(vmxlab, invept)
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, write=False, execute=False)
    entry = machine_address(PAGE)
    run = vmxlab.run(
        Case(
            program="inc byte ptr [rdi]; jmp rdi",
            registers={"rdi": PAGE},
            data={PAGE: b"\xf3"},  # becomes HLT
            ept=ept,
            reactions=[
                repair(ExitReason.EPT_VIOLATION, ept, PAGE, page_entry(entry, R | W), invept=invept, times=1),
                repair(ExitReason.EPT_VIOLATION, ept, PAGE, page_entry(entry, R | X), invept=invept),
            ],
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION, ExitReason.EPT_VIOLATION, ExitReason.HLT]
    first, second = (e.qualification for e in run.exits[:2])
    assert (first.write, first.readable, first.writable, first.executable) == (True, True, False, False)
    assert (second.fetch, second.readable, second.writable, second.executable) == (True, True, True, False)
    assert run.exits[2].rip == PAGE


@INVEPT
def test_misconfiguration_can_be_repaired(vmxlab, invept):
    """Vol. 3C, 29.4.2: a misconfigured entry is never cached."""
    require_invept(vmxlab, invept)
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, memory_type=7)
    entry = page_entry(machine_address(PAGE))
    run = vmxlab.run(
        Case(
            program="mov rax, [rdi]; hlt",
            registers={"rdi": PAGE},
            data={PAGE: BYTES},
            ept=ept,
            reactions=[repair(ExitReason.EPT_MISCONFIGURATION, ept, PAGE, entry, invept=invept)],
        )
    )
    assert run.reasons == [ExitReason.EPT_MISCONFIGURATION, ExitReason.HLT]
    assert run.exits[1].registers["rax"] == VALUE


@pytest.mark.parametrize("type_", [1, 2], ids=["single-context", "all-context"])
def test_page_that_was_moved_is_seen_after_invept(vmxlab, type_):
    """Vol. 3C, 29.4.3.1: INVEPT of either type ends the use of the translation that L2 had before."""
    vmxlab.require_ept("invept", {1: "invept_single_context", 2: "invept_all_context"}[type_])
    ept = guest_ept()
    ept.map(UNMAPPED, FREE_PAGES)
    move = on(ExitReason.CPUID).write(ept.entry_address(EPT_TABLES, UNMAPPED, 1), page_entry(OTHER_PAGES))
    run = vmxlab.run(
        Case(
            program="mov rsi, [UNMAPPED]; cpuid; mov rdi, [UNMAPPED]; hlt",
            ept=ept,
            memory={FREE_PAGES: BYTES, OTHER_PAGES: BYTES[::-1]},
            reactions=[move.invept(type_).skip()],
        )
    )
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert run.exits[1].registers["rsi"] == VALUE
    assert run.exits[1].registers["rdi"] == int.from_bytes(BYTES[::-1], "little")


def test_right_that_was_taken_away_is_missed_after_invept(vmxlab):
    """Vol. 3C, 29.4.3.1: a page that L2 has written to before is read-only from there on."""
    vmxlab.require_ept("invept", "invept_single_context")
    ept = guest_ept()
    take = on(ExitReason.CPUID).write(
        ept.entry_address(EPT_TABLES, PAGE, 1), page_entry(machine_address(PAGE), R | X)
    )
    run = vmxlab.run(
        Case(
            program="mov [rdi], rbx; cpuid; mov rcx, [rdi]; mov [rdi], rbx; hlt",
            registers={"rdi": PAGE, "rbx": VALUE},
            ept=ept,
            reactions=[take.invept().skip()],
        )
    )
    assert run.reasons == [ExitReason.CPUID, ExitReason.EPT_VIOLATION]
    q = run.exits[1].qualification
    assert (q.write, q.readable, q.writable, q.executable) == (True, True, False, True)
    assert run.exits[1].registers["rcx"] == VALUE
