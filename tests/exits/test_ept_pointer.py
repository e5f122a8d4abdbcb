"""The EPT pointer: what VM entry accepts (SDM Vol. 3C, 27.2.1.1), and its accessed and dirty flags (29.3.5).

`EPTPointer.check` has to say the same as the processor of every value.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from vmxlab import (
    Case,
    Ept,
    EPTPointer,
    ExitReason,
    Field,
    InstructionError,
    OutcomeKind,
    SecondaryControls,
    guest_ept,
)
from vmxlab.cases.memory import DATA, PAGE_TABLES, PROGRAM
from vmxlab.cases.steps import STANDARD, Enter, ReportMemory, Vmread, Vmwrite
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.structures.ept_entry import shift_of

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)

VALID = EPTPointer(address=EPT_TABLES)
"""Write-back, 4 levels, no accessed and dirty flags: what most processors with EPT take."""


def enters(vmxlab, pointer: EPTPointer) -> bool:
    """Whether VM entry accepts it; anything but that and VMfailValid(7) without an exit fails the test."""
    run = vmxlab.run(
        Case(eptp=pointer, steps=(*STANDARD[:-1], Enter(go_on=True), Vmread(Field.VM_INSTRUCTION_ERROR)))
    )
    if run.entry.ok:
        assert run.exits
        assert not run.exits[0].entry_failed
        return True
    assert run.entry.kind is OutcomeKind.FAIL_VALID
    assert run.entry.error is InstructionError.ENTRY_INVALID_CONTROL_FIELDS
    assert run.outcome("vmread").value == 7
    assert run.exits == ()
    return False


def assert_check_predicts(vmxlab, pointer: EPTPointer) -> bool:
    """The processor does what `EPTPointer.check` says; returns whether it entered."""
    broken = pointer.check(vmxlab.capabilities.ept_vpid, vmxlab.physical_address_width)
    entered = enters(vmxlab, pointer)
    assert entered is not bool(broken), f"{pointer!r}: {[str(rule) for rule in broken]}"
    return entered


# --- valid or not ------------------------------------------------------------------------------------------


def test_valid_pointer_enters(vmxlab):
    """Vol. 3C, 27.2.1.1: nothing to complain of; L2 runs to its HLT."""
    vmxlab.require_ept("memory_type_wb", "page_walk_length_4")
    assert VALID.check(vmxlab.capabilities.ept_vpid, vmxlab.physical_address_width) == []
    assert vmxlab.run(Case(eptp=VALID)).reasons == [ExitReason.HLT]


@pytest.mark.parametrize("memory_type", range(8))
def test_memory_type(vmxlab, memory_type):
    """Vol. 3C, 27.2.1.1: UC (0) and WB (6) where IA32_VMX_EPT_VPID_CAP[8] and [14] say so, and no other."""
    entered = assert_check_predicts(vmxlab, replace(VALID, memory_type=memory_type))
    capability = vmxlab.capabilities.ept_vpid
    assert entered is {0: capability.memory_type_uc, 6: capability.memory_type_wb}.get(memory_type, False)


def test_l2_runs_with_uncacheable_ept_paging_structures(vmxlab):
    """Vol. 3C, 29.3.7.1: the type is that of accesses to the EPT tables; L2 sees no difference."""
    vmxlab.require_ept("memory_type_uc")
    run = vmxlab.run(
        Case(program="mov rax, [DATA]; hlt", data={DATA: b"\x07"}, eptp=replace(VALID, memory_type=0))
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == 7


@pytest.mark.parametrize("length", range(1, 9))
def test_page_walk_length(vmxlab, length):
    """Vol. 3C, 27.2.1.1: bits 5:3 are 3, or 4 where IA32_VMX_EPT_VPID_CAP[7] says so, and nothing else."""
    entered = assert_check_predicts(vmxlab, replace(VALID, page_walk_length=length))
    capability = vmxlab.capabilities.ept_vpid
    assert entered is {4: capability.page_walk_length_4, 5: capability.page_walk_length_5}.get(length, False)


@pytest.mark.parametrize("field", ["accessed_dirty", "supervisor_shadow_stack"])
def test_flag_is_valid_with_its_capability_only(vmxlab, field):
    """Vol. 3C, 27.2.1.1: bit 6 needs IA32_VMX_EPT_VPID_CAP[21], bit 7 needs [23]."""
    entered = assert_check_predicts(vmxlab, replace(VALID, **{field: True}))
    assert entered is getattr(vmxlab.capabilities.ept_vpid, field)


@pytest.mark.parametrize("bit", range(8, 12))
def test_bits_11_to_8_are_reserved(vmxlab, bit):
    """Vol. 3C, 27.2.1.1."""
    assert not assert_check_predicts(vmxlab, replace(VALID, reserved=1 << bit))


def test_address_bits_beyond_the_processors_width_are_reserved(vmxlab):
    """Vol. 3C, 27.2.1.1: bits 63:N, N being the physical-address width."""
    for bit in range(vmxlab.physical_address_width, 64):
        assert not assert_check_predicts(vmxlab, replace(VALID, address=EPT_TABLES | 1 << bit)), f"bit {bit}"


def test_several_faults_are_one_failure(vmxlab):
    """Vol. 3C, 27.2.1.1: whatever is wrong, the error is the same."""
    pointer = EPTPointer.from_bits((1 << 64) - 1)
    assert len(pointer.check(vmxlab.capabilities.ept_vpid, vmxlab.physical_address_width)) >= 4
    assert not enters(vmxlab, pointer)


def test_zero_is_no_valid_pointer(vmxlab):
    """Vol. 3C, 27.2.1.1: a field that nobody wrote has walk length 1."""
    assert not assert_check_predicts(vmxlab, EPTPointer.from_bits(0))


def test_pointer_is_not_checked_without_ept(vmxlab):
    """Vol. 3C, 27.2.1.1: these checks are made if "enable EPT" is 1."""
    run = vmxlab.run(Case(disable=SecondaryControls.ENABLE_EPT, fields={Field.EPT_POINTER: (1 << 64) - 1}))
    assert run.reasons == [ExitReason.HLT]


def test_pointer_that_was_refused_can_be_mended(vmxlab):
    """Vol. 3C, 27.2: a failed check changes nothing; VMLAUNCH of the same VMCS may follow."""
    steps = (*STANDARD[:-1], Enter(go_on=True), Vmwrite(Field.EPT_POINTER, VALID.bits), Enter())
    run = vmxlab.run(Case(eptp=replace(VALID, reserved=1 << 8), steps=steps))
    assert [o.kind for o in run.outcomes if o.operation == "vmlaunch"] == [
        OutcomeKind.FAIL_VALID,
        OutcomeKind.SUCCEED,
    ]
    assert run.reasons == [ExitReason.HLT]


def test_empty_root_table_faults_at_the_first_access(vmxlab):
    """Vol. 3C, 29.3.2: with no entry present L2's read of its own PML4 entry is an EPT violation."""
    case = Case(eptp=EPTPointer(address=FREE_PAGES), memory={FREE_PAGES: bytes(4096)})
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    assert run.exits[0].guest_physical_address == PAGE_TABLES
    assert run.exits[0].guest_linear_address == PROGRAM


# --- accessed and dirty flags ------------------------------------------------------------------------------

ACCESSED, DIRTY = 1 << 8, 1 << 9
WITH_FLAGS = EPTPointer.from_table_phys(EPT_TABLES)
PAGE = DATA + 0x8000


def flags_after(vmxlab, access: str, ept: Ept, gpa: int, eptp: EPTPointer, **more) -> dict[int, int]:
    """By level from 4 down: bits 9:8 of the entries that translate `gpa`, after L2 made one access to it."""
    leaf = next(
        level for start, level, _ in ept.leaves() if gpa >> shift_of(level) == start >> shift_of(level)
    )
    addresses = {level: ept.entry_address(EPT_TABLES, gpa, level) for level in range(4, leaf - 1, -1)}
    steps = (*STANDARD, *(ReportMemory(address, 8) for address in addresses.values()))
    run = vmxlab.run(
        Case(program=f"{access}; hlt", registers={"rdi": gpa}, ept=ept, eptp=eptp, steps=steps, **more)
    )
    assert run.reasons == [ExitReason.HLT]
    return {
        level: int.from_bytes(run.memory[address], "little") & (ACCESSED | DIRTY)
        for level, address in addresses.items()
    }


READ, WRITE, FETCH = "mov rbx, [rdi]", "mov [rdi], rbx", "jmp rdi"
ACCESSES = pytest.mark.parametrize("access", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
HLT_THERE = {PAGE: b"\xf4"}

FAR = 0x4000_0000 + FREE_PAGES
"""An address of L2 in the second GiB, and L2's own paging for it: one page of 2 MiB, accessed and dirty."""
FAR_PAGING = {
    PAGE_TABLES + 0x1000 + 8: struct.pack("<Q", DATA + 0x1000 | 0x23),
    DATA + 0x1000 + (FREE_PAGES >> 21) * 8: struct.pack("<Q", FAR | 0xE3),
}


@ACCESSES
def test_access_sets_the_accessed_flags_and_a_write_the_dirty_flag(vmxlab, access):
    """Vol. 3C, 29.3.5: accessed in every entry used; dirty, by a write, in the one that maps the page."""
    vmxlab.require_ept("accessed_dirty")
    leaf = ACCESSED | (DIRTY if access == WRITE else 0)
    flags = flags_after(vmxlab, access, guest_ept(), PAGE, WITH_FLAGS, data=HLT_THERE)
    assert flags == {4: ACCESSED, 3: ACCESSED, 2: ACCESSED, 1: leaf}


@ACCESSES
def test_flags_stay_clear_unless_they_are_enabled(vmxlab, access):
    """Vol. 3C, 29.3.2: with EPTP bit 6 clear bits 8 and 9 of the entries are ignored."""
    flags = flags_after(vmxlab, access, guest_ept(), PAGE, VALID, data=HLT_THERE)
    assert flags == dict.fromkeys((4, 3, 2, 1), 0)


@pytest.mark.parametrize("access", [READ, WRITE], ids=["read", "write"])
@pytest.mark.parametrize(("feature", "size", "level"), [("page_2m", 1 << 21, 2), ("page_1g", 1 << 30, 3)])
def test_flags_of_a_large_page_are_in_its_one_entry(vmxlab, access, feature, size, level):
    """Vol. 3C, 29.3.5: the same for the PDE of a page of 2 MiB and the PDPTE of one of 1 GiB."""
    vmxlab.require_ept("accessed_dirty", feature)
    ept = guest_ept()
    ept.map(FAR & -size, FREE_PAGES & -size, size)
    flags = flags_after(vmxlab, access, ept, FAR, WITH_FLAGS, data=FAR_PAGING)
    leaf = ACCESSED | (DIRTY if access == WRITE else 0)
    assert flags == dict.fromkeys(range(4, level, -1), ACCESSED) | {level: leaf}


def test_walk_of_the_guests_paging_sets_the_dirty_flag(vmxlab):
    """Vol. 3C, 29.3.5, 29.3.3.2: accesses to L2's paging structures are treated as writes."""
    vmxlab.require_ept("accessed_dirty")
    flags = flags_after(vmxlab, "nop", guest_ept(), PAGE_TABLES, WITH_FLAGS)
    assert flags[1] == ACCESSED | DIRTY


def test_processor_clears_no_flag(vmxlab):
    """Vol. 3C, 29.3.5: the flags are sticky: only software clears them."""
    vmxlab.require_ept("accessed_dirty")
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, accessed=True, dirty=True)
    assert flags_after(vmxlab, READ, ept, PAGE, WITH_FLAGS)[1] == ACCESSED | DIRTY


def test_write_that_is_denied_sets_no_dirty_flag(vmxlab):
    """Vol. 3C, 29.3.5: a write that exits as an EPT violation did not happen."""
    vmxlab.require_ept("accessed_dirty")
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, write=False)
    entry = ept.entry_address(EPT_TABLES, PAGE, 1)
    run = vmxlab.run(
        Case(
            program="mov [rdi], rbx; hlt",
            registers={"rdi": PAGE},
            ept=ept,
            eptp=WITH_FLAGS,
            steps=(*STANDARD, ReportMemory(entry, 8)),
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    assert not int.from_bytes(run.memory[entry], "little") & DIRTY
