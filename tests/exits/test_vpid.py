"""VPIDs: VM entry with one, and what INVVPID must achieve (SDM Vol. 3C, 29.4).

Caching itself is never required: what is tested is that translations of one VPID are not used under another,
and that an invalidation ends the use of what was there before it.
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    InstructionError,
    PrimaryControls,
    SecondaryControls,
    guest_ept,
    on,
)
from vmxlab.cases.memory import DATA, machine_address
from vmxlab.cases.steps import Enter, Invept, Invvpid, Store, Vmclear, Vmptrld, Vmwrite, Vmxon, WriteVmcs
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.sdm.registers import InveptType, InvvpidType

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.ENABLE_VPID, S.ENABLE_EPT)

TABLES = 0x18000
"""L2's own page tables: 2 MiB one to one, and LINEAR by a page of 4 KiB."""
PML4, PDPT, DIRECTORY, TABLE = (TABLES + 0x1000 * n for n in range(4))
LINEAR = 0x20_0000
FIRST, SECOND = DATA + 0x1000, DATA + 0x2000
SETUP = (Vmxon(), Vmclear(), Vmptrld(), WriteVmcs())
NO_CR3_EXITS = (PrimaryControls.CR3_LOAD_EXITING, PrimaryControls.CR3_STORE_EXITING)
READ = f"mov eax, [{LINEAR:#x}]; vmcall"
AGAIN = on(ExitReason.VMCALL).skip().stop()


def entry(page: int) -> bytes:
    return struct.pack("<Q", page | 0x63)


def vpid_case(program: str, steps, *, vpid: int = 1, **more) -> Case:
    """LINEAR is FIRST, which holds 1111H; SECOND holds 2222H."""
    data = {
        PML4: entry(PDPT),
        PDPT: entry(DIRECTORY),
        DIRECTORY: struct.pack("<QQ", 0xE3, TABLE | 0x63),
        TABLE: entry(FIRST),
        FIRST: b"\x11\x11",
        SECOND: b"\x22\x22",
    }
    fields = {Field.VPID: vpid, Field.GUEST_CR3: PML4, **more.pop("fields", {})}
    return Case(
        program=program,
        enable=(S.ENABLE_VPID, *more.pop("enable", ())),
        disable=NO_CR3_EXITS,
        data=data,
        fields=fields,
        steps=steps,
        reactions=[AGAIN],
        **more,
    )


def remap(page: int) -> Store:
    """L1 changes the PTE of LINEAR in L2's memory."""
    return Store(machine_address(TABLE), entry(page))


def values(run) -> list[int]:
    assert all(exit_.reason is ExitReason.VMCALL for exit_ in run.exits), run.reasons
    return [exit_.registers["rax"] & 0xFFFF for exit_ in run.exits]


# --- VM entry ----------------------------------------------------------------------------------------------


def test_vpid_0_is_refused(vmxlab):
    """Vol. 3C, 27.2.1.1: with "enable VPID" the VPID must not be 0000H, which L1 itself has."""
    run = vmxlab.run(Case(enable=S.ENABLE_VPID, fields={Field.VPID: 0}))
    assert not run.exits
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS


def test_vpid_0_is_no_matter_without_the_control(vmxlab):
    """Vol. 3C, 27.2.1.1: the field is looked at with "enable VPID" alone."""
    assert vmxlab.run(Case(disable=S.ENABLE_VPID, fields={Field.VPID: 0})).reasons == [ExitReason.HLT]


@pytest.mark.parametrize("vpid", [1, 2, 0x8000, 0xFFFF])
def test_any_other_vpid_is_taken(vmxlab, vpid):
    """Vol. 3C, 29.1: VPIDs have 16 bits; L2 runs as ever."""
    case = vpid_case(f"{READ}; hlt", (*SETUP, Enter()), vpid=vpid, watch=[Field.VPID])
    run = vmxlab.run(case)
    assert values(run) == [0x1111]
    assert run.exits[0].watched[Field.VPID] == vpid


# --- what is cached, and for whom --------------------------------------------------------------------------


def test_translations_of_one_vpid_are_not_used_under_another(vmxlab):
    """Vol. 3C, 29.4.2: linear and combined mappings are tagged: under VPID 2 the new page tables are read."""
    steps = (*SETUP, Enter(), remap(SECOND), Vmwrite(Field.VPID, 2), Enter(resume=True))
    assert values(vmxlab.run(vpid_case(f"{READ}; {READ}; hlt", steps))) == [0x1111, 0x2222]


def test_translations_survive_or_not_but_are_old_or_new(vmxlab):
    """Vol. 3C, 29.4.3.2: an exit and an entry with the same VPID need not invalidate; they may."""
    steps = (*SETUP, Enter(), remap(SECOND), Enter(resume=True))
    assert values(vmxlab.run(vpid_case(f"{READ}; {READ}; hlt", steps))) in (
        [0x1111, 0x1111],
        [0x1111, 0x2222],
    )


@pytest.mark.parametrize("kind", InvvpidType)
def test_invvpid_ends_the_use_of_old_translations(vmxlab, kind):
    """Vol. 3C, 29.4.3.1 and 31.3: each type of INVVPID invalidates the mapping of this VPID and address."""
    vmxlab.require_ept("invvpid", FEATURES[kind])
    invalidate = Invvpid(
        kind, vpid=0 if kind is InvvpidType.ALL_CONTEXTS else 1, linear_address=linear_of(kind)
    )
    steps = (*SETUP, Enter(), remap(SECOND), invalidate, Enter(resume=True))
    assert values(vmxlab.run(vpid_case(f"{READ}; {READ}; hlt", steps))) == [0x1111, 0x2222]


FEATURES = {
    InvvpidType.INDIVIDUAL_ADDRESS: "invvpid_individual_address",
    InvvpidType.SINGLE_CONTEXT: "invvpid_single_context",
    InvvpidType.ALL_CONTEXTS: "invvpid_all_context",
    InvvpidType.SINGLE_CONTEXT_RETAINING_GLOBALS: "invvpid_single_context_retaining_globals",
}


def linear_of(kind: InvvpidType) -> int:
    return LINEAR + 0x123 if kind is InvvpidType.INDIVIDUAL_ADDRESS else 0


def test_without_vpids_each_entry_sees_new_page_tables(vmxlab):
    """Vol. 3C, 29.4.3.1: with "enable VPID" 0 entries and exits invalidate all that is tagged VPID 0000H."""
    case = vpid_case(f"{READ}; {READ}; hlt", (*SETUP, Enter(), remap(SECOND), Enter(resume=True)))
    run = vmxlab.run(
        Case(
            program=case.program,
            disable=(S.ENABLE_VPID, *NO_CR3_EXITS),
            data=case.data,
            fields=case.fields,
            steps=case.steps,
            reactions=case.reactions,
        )
    )
    assert values(run) == [0x1111, 0x2222]


@pytest.mark.parametrize("instruction", ["invlpg [rdi]", "mov rax, cr3; mov cr3, rax"])
def test_l2_invalidates_its_own_translations(vmxlab, instruction):
    """Vol. 3C, 29.4.3.1: INVLPG and MOV to CR3 in L2 invalidate what has its VPID."""
    change = f"mov rbx, {SECOND | 0x63:#x}; mov [{TABLE:#x}], rbx"
    program = f"mov edi, {LINEAR:#x}; mov esi, [rdi]; {change}; {instruction}; {READ}"
    case = vpid_case(program, (*SETUP, Enter()))
    run = vmxlab.run(
        Case(
            program=case.program,
            enable=S.ENABLE_VPID,
            disable=(*NO_CR3_EXITS, PrimaryControls.INVLPG_EXITING),
            data=case.data,
            fields=case.fields,
            steps=case.steps,
            reactions=case.reactions,
        )
    )
    assert values(run) == [0x2222]
    assert run.exits[0].registers["rsi"] == 0x1111


@pytest.mark.parametrize("kind", InveptType)
def test_invept_is_for_every_vpid(vmxlab, kind):
    """Vol. 3C, 29.4.3.1 and 31.3: INVEPT invalidates combined mappings of its EPTP whatever their VPID."""
    vmxlab.require_ept(
        "invept", "invept_single_context" if kind is InveptType.SINGLE_CONTEXT else "invept_all_context"
    )
    ept = guest_ept()
    tables = dict(ept.tables(EPT_TABLES))
    other = guest_ept()
    other.map(FIRST, FREE_PAGES, replace=True)
    changed = [
        (address + 8 * n, new[8 * n : 8 * n + 8])
        for address, new in other.tables(EPT_TABLES)
        for n in range(512)
        if new[8 * n : 8 * n + 8] != tables[address][8 * n : 8 * n + 8]
    ]
    assert len(changed) == 1
    steps = (*SETUP, Enter(), Store(*changed[0]), Invept(kind), Enter(resume=True))
    case = vpid_case(f"{READ}; {READ}; hlt", steps, ept=ept, memory={FREE_PAGES: b"\x33\x33"})
    assert values(vmxlab.run(case)) == [0x1111, 0x3333]
