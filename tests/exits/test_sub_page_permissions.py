"""Sub-page write permissions for EPT (SDM Vol. 3C, 29.3.4): 128 bytes of a page that may be written."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, InstructionError, PageSize, SecondaryControls, guest_ept, on
from vmxlab.cases.memory import DATA, PROGRAM, STACK_TOP
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import Vector
from vmxlab.structures import SubPagePermissionTable
from vmxlab.structures.sub_page import SUB_PAGE_SIZE, SUB_PAGES, VALID

from .guest_setups import handled

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT)

TABLES = FREE_PAGES
PAGE = DATA + 0x4000
VALUE = 0x5A5A_5A5A
STORE = "mov [{:#x}], eax"
STORE_LENGTH = 7


def spp_case(program: str, table: SubPagePermissionTable, *, page: int = PAGE, **more) -> Case:
    """The page is read-only by EPT, and has bit 61 of its PTE set; RAX holds VALUE."""
    ept = guest_ept()
    ept.protect(page, 0x1000, write=False, sub_page_write=True)
    return Case(
        program=program,
        ept=more.pop("ept", ept),
        enable=S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
        registers={"rax": VALUE},
        memory=dict(table.tables(TABLES)),
        fields={Field.SUB_PAGE_PERMISSION_TABLE_POINTER: TABLES, **more.pop("fields", {})},
        **more,
    )


def table_with(*writable: int, page: int = PAGE) -> SubPagePermissionTable:
    table = SubPagePermissionTable()
    table.allow(page, writable)
    return table


def sub_page(number: int, offset: int = 0) -> int:
    return PAGE + number * SUB_PAGE_SIZE + offset


def check_violation(exit_, address: int, rip: int) -> None:
    """The write that a sub-page does not allow: an EPT violation like any other."""
    assert exit_.full_reason == ExitReason.EPT_VIOLATION, exit_
    q = exit_.qualification
    assert (q.read, q.write, q.fetch) == (False, True, False)
    assert (q.readable, q.writable, q.executable) == (True, False, True)
    assert (q.guest_linear_valid, q.translated) == (True, True)
    assert (exit_.guest_linear_address, exit_.guest_physical_address) == (address, address)
    assert exit_.rip == rip
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def check_event(exit_, address: int, rip: int, *, miss: bool) -> None:
    """Vol. 3C, 28.2.1: bit 11 tells a miss from a misconfiguration; both addresses are recorded."""
    assert exit_.full_reason == ExitReason.SPP, exit_
    assert (exit_.qualification.miss, exit_.qualification.nmi_unblocking) == (miss, False)
    assert exit_.qualification.asynchronous is False
    assert (exit_.guest_linear_address, exit_.guest_physical_address) == (address, address)
    assert exit_.rip == rip
    assert not exit_.interruption.valid


# --- permissions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(0, SUB_PAGES, 5))
def test_a_sub_page_with_its_bit_set_is_written(vmxlab, number):
    """Vol. 3C, 29.3.4.2: bit 2n of the level-1 entry allows writes to sub-page n, its first and last byte."""
    addresses = [sub_page(number), sub_page(number, SUB_PAGE_SIZE - 4)]
    program = "; ".join(STORE.format(address) for address in addresses)
    run = vmxlab.run(spp_case(f"{program}; mov ebx, [{addresses[0]:#x}]; hlt", table_with(number)))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rbx"] == VALUE


def test_a_sub_page_with_its_bit_clear_is_not(vmxlab):
    """Vol. 3C, 29.3.4.2: a write to any other sub-page of the page is an EPT violation."""
    for number in (0, 1, 15, 31):
        table = table_with(*(n for n in range(SUB_PAGES) if n != number))
        address = sub_page(number, 0x40)
        run = vmxlab.run(spp_case(f"nop; {STORE.format(address)}; hlt", table))
        assert run.reasons == [ExitReason.EPT_VIOLATION], number
        check_violation(run.exits[0], address, PROGRAM + 1)


def test_reads_and_fetches_need_no_permission_of_a_sub_page(vmxlab):
    """Vol. 3C, 29.3.4.1: writes alone are eligible; the page's own rights hold for all else."""
    code = {sub_page(3): bytes.fromhex("bb 07 00 00 00 f4")}  # mov ebx, 7; hlt
    run = vmxlab.run(
        spp_case(f"mov ecx, [{sub_page(3):#x}]; mov edi, {sub_page(3)}; jmp rdi", table_with(), data=code)
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rbx"] == 7


def test_a_page_that_may_be_written_asks_no_table(vmxlab):
    """Vol. 3C, 29.3.4.1: with write access by EPT bit 61 of the PTE has no effect."""
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, sub_page_write=True)
    run = vmxlab.run(spp_case(f"{STORE.format(PAGE)}; hlt", SubPagePermissionTable(), ept=ept))
    assert run.reasons == [ExitReason.HLT]


def test_a_page_without_bit_61_asks_no_table(vmxlab):
    """Vol. 3C, 29.3.4.1: with bit 61 of the PTE clear a read-only page is read-only."""
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, write=False)
    run = vmxlab.run(spp_case(f"nop; {STORE.format(PAGE)}; hlt", table_with(*range(SUB_PAGES)), ept=ept))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], PAGE, PROGRAM + 1)


def test_without_the_control_bit_61_is_ignored(vmxlab):
    """Vol. 3C, 29.3.4: with "sub-page write permissions for EPT" 0 the page is read-only."""
    case = spp_case(f"nop; {STORE.format(PAGE)}; hlt", table_with(*range(SUB_PAGES)))
    control = S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT
    run = vmxlab.run(Case(program=case.program, ept=case.ept, disable=control, memory=case.memory))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], PAGE, PROGRAM + 1)


# --- SPP-related events ------------------------------------------------------------------------------------


def test_a_table_that_is_not_valid_is_a_miss(vmxlab):
    """Vol. 3C, 29.3.4.2: with bit 0 of an entry of level 4, 3 or 2 clear: reason 66, SPP miss."""
    for level in (4, 3, 2):
        table = table_with(*range(SUB_PAGES))
        table.set_raw_entry(PAGE, level, 0)
        run = vmxlab.run(spp_case(f"nop; {STORE.format(sub_page(2))}; hlt", table))
        assert run.reasons == [ExitReason.SPP], level
        check_event(run.exits[0], sub_page(2), PROGRAM + 1, miss=True)


def test_reserved_bits_of_the_tables_are_a_misconfiguration(vmxlab):
    """Vol. 3C, 29.3.4.2: bits 11:1 and those beyond the width, in a valid entry of level 4, 3 or 2."""
    reserved = (2, 1 << 11, 1 << vmxlab.physical_address_width, 1 << 63)
    for level, value in ((level, VALID | bit) for level in (4, 3, 2) for bit in reserved):
        table = table_with(*range(SUB_PAGES))
        table.set_raw_entry(PAGE, level, value)
        run = vmxlab.run(spp_case(f"nop; {STORE.format(sub_page(2))}; hlt", table))
        assert run.reasons == [ExitReason.SPP], (level, hex(value))
        check_event(run.exits[0], sub_page(2), PROGRAM + 1, miss=False)


def test_a_miss_can_be_repaired(vmxlab):
    """Vol. 3C, 29.3.4: the write did not happen, and is made again when L1 has put the table there."""
    table = table_with(2)
    entry = dict(table.tables(TABLES))[TABLES][:8]
    table.set_raw_entry(PAGE, 4, 0)
    repair = on(ExitReason.SPP, times=1).write(TABLES, entry).invept().resume()
    program = f"{STORE.format(sub_page(2))}; mov ebx, [{sub_page(2):#x}]; hlt"
    run = vmxlab.run(spp_case(program, table, reactions=[repair]))
    assert run.reasons == [ExitReason.SPP, ExitReason.HLT]
    assert run.exits[1].registers["rbx"] == VALUE


def test_a_miss_while_an_event_is_delivered(vmxlab):
    """Vol. 3C, 28.2.4: an SPP-related event in the delivery of #UD has it in the IDT-vectoring fields."""
    stack = STACK_TOP & ~0xFFF
    run = vmxlab.run(spp_case("nop; ud2", SubPagePermissionTable(), page=stack, **handled(Vector.UD)))
    assert run.reasons == [ExitReason.SPP]
    event = run.exits[0].idt_vectoring
    assert (event.vector, event.type) == (Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    assert run.exits[0].qualification.miss
    assert run.exits[0].rip == PROGRAM + 1


def test_large_pages_have_no_sub_pages(vmxlab):
    """Vol. 3C, 29.3.4.1: only a page of 4 KiB is eligible; bit 61 of a PDE that maps a page is ignored."""
    vmxlab.require_ept("page_2m")
    far = 0x80_0000
    ept = guest_ept()
    ept.map(far, FREE_PAGES + 0x20_0000, PageSize.SIZE_2M, raw=0b101 | 6 << 3 | 1 << 61)
    run = vmxlab.run(spp_case(f"nop; {STORE.format(far)}; hlt", SubPagePermissionTable(), ept=ept))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], far, PROGRAM + 1)


# --- VM entry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [TABLES + 8, TABLES | 1 << 62], ids=["misaligned", "too-wide"])
def test_vm_entry_checks_the_table_pointer(vmxlab, address):
    """Vol. 3C, 27.2.1.1: bits 11:0 of the SPPTP are 0, and it is within the width: else VMfail(7)."""
    fields = {Field.SUB_PAGE_PERMISSION_TABLE_POINTER: address}
    run = vmxlab.run(spp_case("hlt", SubPagePermissionTable(), fields=fields))
    assert not run.exits
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
