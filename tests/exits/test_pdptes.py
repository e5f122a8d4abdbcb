"""PAE paging in L2: the PDPTEs, their registers and fields (SDM Vol. 3C, 25.4.2; Vol. 3A, 4.4.1)."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, ExitReason, Field, Mode, PrimaryControls, SecondaryControls
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.sdm.registers import CR0, CR4, Vector

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.ENABLE_EPT)

PDPTES = [Field.GUEST_PDPTE0, Field.GUEST_PDPTE1, Field.GUEST_PDPTE2, Field.GUEST_PDPTE3]
PRESENT = 1
POINTERS = DATA + 0x4000
"""Page-directory-pointer tables of 32 bytes, one behind the other."""
DIRECTORY, OTHER_DIRECTORY = DATA + 0x5000, DATA + 0x6000
MARK = DATA + 0x1000
"""Read through linear address 40000000H + MARK, by PDPTE1."""
FAR = 0x4000_0000
NO_CR3_EXITS = (PrimaryControls.CR3_LOAD_EXITING, PrimaryControls.CR3_STORE_EXITING)


def pae_case(vmxlab, program: str, *, tables=(), pdptes=None, cr3: int = POINTERS, **more) -> Case:
    """32-bit mode with PAE paging. `tables` lie at POINTERS, `pdptes` (or the first) are in the fields."""
    identity = struct.pack("<Q", 0xE3)  # 2 MiB: present, writable, accessed, dirty, large
    entries = list(tables) or [(DIRECTORY | PRESENT, 0, 0, 0)]
    values = entries[0] if pdptes is None else pdptes
    cr4 = int(CR4.PAE | vmxlab.capabilities.cr4_fixed0)
    fields = {Field.GUEST_CR4: cr4, Field.GUEST_CR3: cr3, **dict(zip(PDPTES, values, strict=True))}
    return Case(
        program=program,
        mode=Mode.PROTECTED,
        disable=NO_CR3_EXITS,
        fields={**fields, **more.pop("fields", {})},
        data={
            POINTERS: b"".join(struct.pack("<4Q", *table) for table in entries),
            DIRECTORY: identity,
            OTHER_DIRECTORY: identity,
            MARK: b"\x78\x56\x34\x12",
        },
        watch=[*PDPTES, Field.GUEST_CR3],
        **more,
    )


def pdptes_of(exit_) -> list[int]:
    return [exit_.watched[field] for field in PDPTES]


def test_vm_entry_loads_the_pdptes_from_their_fields(vmxlab):
    """Vol. 3C, 27.3.2.4: with EPT they come from the VMCS, not from the table that CR3 points to."""
    fields = (DIRECTORY | PRESENT, OTHER_DIRECTORY | PRESENT, 0, 0)
    run = vmxlab.run(
        pae_case(vmxlab, f"mov eax, [{FAR + MARK:#x}]; hlt", tables=[(0, 0, 0, 0)], pdptes=fields)
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == 0x1234_5678
    assert pdptes_of(run.exits[0]) == list(fields)


def test_a_pdpte_that_is_not_present_is_a_page_fault(vmxlab):
    """Vol. 3A, 4.4.1: bit 0 of the PDPTE register is 0: #PF for its GiB."""
    run = vmxlab.run(pae_case(vmxlab, f"nop; mov eax, [{FAR + MARK:#x}]; hlt"))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].interruption.vector == Vector.PF
    assert (run.exits[0].interruption_error_code, run.exits[0].raw_qualification) == (0, FAR + MARK)
    assert run.exits[0].rip == PROGRAM + 1


def test_mov_to_cr3_loads_the_pdptes_and_the_exit_saves_them(vmxlab):
    """Vol. 3A, 4.4.1 and Vol. 3C, 28.3.4: all four are read at MOV to CR3; the next exit saves them."""
    second = (DIRECTORY | PRESENT, OTHER_DIRECTORY | PRESENT, 0x1000 | PRESENT, 0x7000 | PRESENT)
    program = f"mov eax, {POINTERS + 32}; vmcall; mov cr3, eax; vmcall; mov eax, [{FAR + MARK:#x}]; hlt"
    first = (DIRECTORY | PRESENT, 0, 0, 0)
    run = vmxlab.run(pae_case(vmxlab, program, tables=[first, second]))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.VMCALL, ExitReason.HLT]
    assert [pdptes_of(exit_) for exit_ in run.exits] == [list(first), list(second), list(second)]
    assert run.exits[1].watched[Field.GUEST_CR3] == POINTERS + 32
    assert run.exits[2].registers["rax"] == 0x1234_5678


def test_a_change_in_memory_is_not_seen_until_cr3_is_loaded(vmxlab):
    """Vol. 3A, 4.4.1: translations use the registers; the table is read by MOV to CR3 (CR0, CR4) alone."""
    program = (
        f"mov dword ptr [{POINTERS + 8}], {OTHER_DIRECTORY | PRESENT}; vmcall; "
        f"mov eax, cr3; mov cr3, eax; mov ebx, [{FAR + MARK:#x}]; hlt"
    )
    run = vmxlab.run(pae_case(vmxlab, program))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert pdptes_of(run.exits[0])[1] == 0
    assert pdptes_of(run.exits[1])[1] == OTHER_DIRECTORY | PRESENT
    assert run.exits[1].registers["rbx"] == 0x1234_5678


@pytest.mark.parametrize("bit", [1, 2, 5, 8, 62])
def test_reserved_bits_make_mov_to_cr3_fault(vmxlab, bit):
    """Vol. 3A, 4.4.1: MOV to CR3 with a reserved bit in a present PDPTE is #GP(0), and loads nothing."""
    good = (DIRECTORY | PRESENT, 0, 0, 0)
    bad = (DIRECTORY | PRESENT, 0, 0, DIRECTORY | PRESENT | 1 << bit)
    run = vmxlab.run(pae_case(vmxlab, f"mov eax, {POINTERS + 32}; mov cr3, eax; hlt", tables=[good, bad]))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].interruption.vector == Vector.GP
    assert run.exits[0].interruption_error_code == 0
    assert run.exits[0].rip == PROGRAM + 5
    assert run.exits[0].watched[Field.GUEST_CR3] == POINTERS
    assert pdptes_of(run.exits[0]) == list(good)


def test_reserved_bits_of_a_pdpte_that_is_not_present_are_ignored(vmxlab):
    """Vol. 3A, 4.4.1: with bit 0 clear nothing else of it is looked at, by MOV to CR3 or by VM entry."""
    table = (DIRECTORY | PRESENT, 0xFFFF_FFFF_FFFF_FFFE, 0, 0x1E6)
    run = vmxlab.run(pae_case(vmxlab, "mov eax, cr3; mov cr3, eax; hlt", tables=[table]))
    assert run.reasons == [ExitReason.HLT]
    assert [value & PRESENT for value in pdptes_of(run.exits[0])] == [1, 0, 0, 0]


@pytest.mark.parametrize("number", range(4))
def test_vm_entry_checks_the_pdptes(vmxlab, number):
    """Vol. 3C, 27.3.1.6 and 27.8: a present PDPTE with a reserved bit: reason 33, qualification 2."""
    pdptes = [DIRECTORY | PRESENT] * 4
    pdptes[number] |= 1 << 1
    run = vmxlab.run(pae_case(vmxlab, "hlt", pdptes=pdptes))
    assert len(run.exits) == 1
    assert run.exits[0].entry_failed
    assert run.exits[0].reason is ExitReason.ENTRY_FAILURE_GUEST_STATE
    assert run.exits[0].raw_qualification == 2


def test_the_fields_are_not_checked_where_they_are_not_used(vmxlab):
    """Vol. 3C, 27.3.1.6: without PAE paging, here in 64-bit mode, any value may be there."""
    run = vmxlab.run(Case(fields=dict.fromkeys(PDPTES, (1 << 64) - 1)))
    assert run.reasons == [ExitReason.HLT]


def test_enabling_pae_loads_them_too(vmxlab):
    """Vol. 3A, 4.4.1: MOV to CR0 that sets PG with CR4.PAE loads the PDPTEs from the table at CR3."""
    vmxlab.require(S.UNRESTRICTED_GUEST)
    table = (DIRECTORY | PRESENT, OTHER_DIRECTORY | PRESENT, 0, 0)
    case = pae_case(vmxlab, "x", tables=[table], pdptes=(0, 0, 0, 0))
    cr0 = int(CR0.PE | CR0.ET | CR0.NE | vmxlab.capabilities.cr0_fixed0) & ~int(CR0.PG)
    run = vmxlab.run(
        Case(
            program=f"mov eax, cr0; bts eax, 31; mov cr0, eax; mov ebx, [{FAR + MARK:#x}]; hlt",
            mode=Mode.PROTECTED,
            enable=S.UNRESTRICTED_GUEST,
            disable=NO_CR3_EXITS,
            fields={**case.fields, Field.GUEST_CR0: cr0},
            data=case.data,
            watch=case.watch,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rbx"] == 0x1234_5678
    assert pdptes_of(run.exits[0]) == list(table)
