"""Bitmaps and EPT of a live machine: what is changed in Python is what the processor sees."""

from __future__ import annotations

import pytest

from vmxlab import Case, Ept, ExitReason, Field, IOBitmap, MsrBitmap, PrimaryControls, guest_ept
from vmxlab.cases.memory import L2_MEMORY, L2_MEMORY_BYTES, UNMAPPED
from vmxlab.console.live.structures import LiveStructures
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.image import layout
from vmxlab.image.protocol import Op
from vmxlab.sdm.msrs import Msr

FREE = layout.FREE_PAGES


def test_all_is_let_through_at_first(vm):
    assert vm.enter("in al, 0x60; mov ecx, 0xc0000080; rdmsr").reason is ExitReason.HLT


def test_a_port_exits_when_its_bit_is_set_and_no_longer(vm):
    vm.io_bitmap.set_intercept(0x60, True)
    exit_ = vm.enter("in al, 0x60")
    assert (exit_.reason, exit_.qualification.port) == (ExitReason.IO_INSTRUCTION, 0x60)
    vm.io_bitmap.set_intercept(0x60, False)
    assert vm.resume().reason is ExitReason.HLT


def test_an_msr_exits_when_its_bit_is_set(vm):
    program = f"mov ecx, {int(Msr.IA32_EFER):#x}; rdmsr"
    vm.msr_bitmap.set_read_intercept(Msr.IA32_EFER, True)
    assert vm.enter(program).reason is ExitReason.RDMSR
    vm.msr_bitmap = MsrBitmap()
    assert vm.enter(program).reason is ExitReason.HLT


def test_a_bitmap_that_is_assigned_is_the_live_one(vm):
    bitmap = IOBitmap()
    vm.io_bitmap = bitmap
    bitmap.set_intercept_of_range(0, 0x10000, True)
    assert vm.enter("in al, 0x80").reason is ExitReason.IO_INSTRUCTION
    assert vm.memory.read(layout.IO_BITMAP_A, 0x2000) == bitmap.to_bytes()


def test_a_page_is_there_once_it_is_mapped_and_its_rights_hold(vm):
    program = f"mov rax, [{UNMAPPED:#x}]; mov [{UNMAPPED:#x}], rax"
    exit_ = vm.enter(program)
    assert (exit_.reason, exit_.guest_physical_address) == (ExitReason.EPT_VIOLATION, UNMAPPED)
    vm.ept.map(UNMAPPED, FREE, write=False)
    vm.memory.write_u64(FREE, 0x1122)
    exit_ = vm.resume()
    assert exit_.reason is ExitReason.EPT_VIOLATION
    assert exit_.qualification.write
    assert exit_.registers["rax"] == 0x1122
    vm.ept.protect(UNMAPPED, 0x1000, write=True)
    assert vm.resume().reason is ExitReason.HLT
    vm.ept.unmap(UNMAPPED, 0x1000)
    assert vm.enter(program).reason is ExitReason.EPT_VIOLATION


def test_a_cached_translation_goes_with_its_entry(vm):
    """SDM Vol. 3C, 29.4.3.1: INVEPT makes the processor look again."""
    vm.ept.map(UNMAPPED, FREE)
    vm.memory.write_u64(FREE, 1)
    vm.memory.write_u64(FREE + 0x1000, 2)
    assert vm.enter(f"mov rax, [{UNMAPPED:#x}]").registers["rax"] == 1
    vm.ept.map(UNMAPPED, FREE + 0x1000, replace=True)
    assert vm.enter(f"mov rax, [{UNMAPPED:#x}]").registers["rax"] == 2
    assert any(outcome.operation == "invept" for run in vm.link.recent for outcome in run.outcomes)


def test_tables_that_move_are_all_there(vm):
    """A mapping below the others puts its table in between: the later ones lie elsewhere then."""
    vm.ept = Ept()
    vm.ept.map(0x4000_0000, L2_MEMORY, length=L2_MEMORY_BYTES)
    vm.ept.map(0, L2_MEMORY, length=L2_MEMORY_BYTES)
    assert vm.enter("hlt").reason is ExitReason.HLT
    vm.ept.map(0x20_0000, FREE)
    assert vm.enter("mov rax, [0x200000]").reason is ExitReason.HLT
    for at, table in vm.ept.tables(layout.EPT_TABLES):
        assert vm.memory.read(at, 64) == table[:64]


def test_more_tables_than_there_is_room_for_are_refused_until_they_are_gone(vm):
    for number in range(layout.EPT_TABLES_MAX):
        vm.ept.map((number + 1) << 21, FREE)
    with pytest.raises(OutOfRange, match="EPT paging structures"):
        vm.resume()
    vm.ept = guest_ept()
    assert vm.enter("hlt").reason is ExitReason.HLT


def test_a_case_says_what_is_intercepted(lab):
    bitmap = IOBitmap()
    bitmap.set_intercept(0x61, True)
    with lab.live(Case(io_bitmap=bitmap, fields={Field.EXCEPTION_BITMAP: 0})) as vm:
        assert vm.enter("in al, 0x60; in al, 0x61").qualification.port == 0x61
        vm.io_bitmap.set_intercept(0x61, False)
        assert vm.resume().reason is ExitReason.HLT
        assert vm.vmread(Field.EXCEPTION_BITMAP) == 0
    assert bitmap.intercepts(0x61), "the case's own is another one"


def test_a_bitmap_that_is_not_in_use_is_refused_by_name(lab):
    with lab.live(Case(disable=PrimaryControls.USE_MSR_BITMAPS)) as vm:
        assert vm.enter("mov ecx, 0xc0000080; rdmsr").reason is ExitReason.RDMSR


def test_only_what_differs_is_sent():
    structures = LiveStructures(IOBitmap(), MsrBitmap(), guest_ept())
    structures.arrived(structures.changed())
    assert structures.changed() == {}
    structures.io_bitmap.set_intercept(0x60, True)
    (unit,) = structures.units(structures.changed())
    assert unit[0] == Op.DATA
    assert unit[1:9] == (layout.IO_BITMAP_A + 8).to_bytes(8, "little")
    assert unit[9:] == b"\x08\0\0\0" + bytes([0, 0, 0, 0, 1, 0, 0, 0])
    structures.arrived(structures.changed())
    assert structures.changed() == {}


def test_a_live_machine_takes_no_reactions(lab):
    from vmxlab import on

    with pytest.raises(CaseError, match="no reactions"):
        lab.live(Case(reactions=[on(ExitReason.CPUID).skip()]))
