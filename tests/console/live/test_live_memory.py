"""Memory of a live machine, by machine addresses and through the EPT."""

from __future__ import annotations

import random

import pytest

from vmxlab import Case, Ept, Lab, guest_ept
from vmxlab.cases.memory import DATA, L2_MEMORY, UNMAPPED
from vmxlab.console.live import memory
from vmxlab.errors import CaseError, L1Fault, OutOfRange
from vmxlab.image import layout

FREE = layout.FREE_PAGES


def test_bytes_and_words_are_what_was_written(vm):
    vm.memory[FREE : FREE + 5] = b"\x01\x02\x03\x04\x05"
    assert vm.memory[FREE] == 1
    assert vm.memory[FREE + 1 : FREE + 4] == b"\x02\x03\x04"
    vm.memory[FREE + 1] = 0xAA
    assert vm.memory.read(FREE, 5) == b"\x01\xaa\x03\x04\x05"
    assert vm.memory[FREE:FREE] == b""
    for size, read, write in (
        (1, vm.memory.read_u8, vm.memory.write_u8),
        (2, vm.memory.read_u16, vm.memory.write_u16),
        (4, vm.memory.read_u32, vm.memory.write_u32),
        (8, vm.memory.read_u64, vm.memory.write_u64),
    ):
        value = int.from_bytes(bytes(range(0x81, 0x81 + size)), "little")
        write(FREE, value)
        assert read(FREE) == value
        assert vm.memory.read(FREE, size) == value.to_bytes(size, "little")
        with pytest.raises(OutOfRange, match=f"{8 * size} bits"):
            write(FREE, 1 << 8 * size)


def test_a_long_range_comes_back_whole(vm, monkeypatch):
    monkeypatch.setattr(memory, "_READ_BYTES", 1024)
    monkeypatch.setattr(memory, "_WRITE_BYTES", 2048)
    content = random.Random(0).randbytes(1500) + bytes(1000) + bytes(range(256)) * 3
    vm.memory.write(FREE, content)
    assert vm.memory.read(FREE, len(content)) == content


def test_what_l2_writes_is_there(vm):
    vm.enter(f"mov qword ptr [{DATA:#x}], 0x1234")
    assert vm.memory.read_u64(L2_MEMORY + DATA) == 0x1234
    assert vm.guest_memory.read_u64(DATA) == 0x1234


def test_memory_that_is_not_there_is_a_typed_error_and_the_machine_goes_on(vm):
    with pytest.raises(L1Fault, match="CR2 0x100000000") as caught:
        vm.memory.read(0x1_0000_0000, 4)
    assert caught.value.last_record
    with pytest.raises(L1Fault):
        vm.memory.write_u8(1 << 40, 1)
    assert vm.enter("hlt").rip == 0x8000


def test_the_monitor_s_own_memory_is_read_and_not_written(vm):
    assert any(vm.memory.read(layout.MONITOR_BASE, 64))
    with pytest.raises(OutOfRange, match="the monitor"):
        vm.memory.write(layout.MONITOR_BASE, b"\0")
    vm.ept.map(UNMAPPED, layout.MONITOR_BASE)
    assert vm.guest_memory.read(UNMAPPED, 64) == vm.memory.read(layout.MONITOR_BASE, 64)
    with pytest.raises(OutOfRange, match="L2-physical"):
        vm.guest_memory.write_u8(UNMAPPED, 0)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (slice(FREE, FREE + 4), b"12345"),
        (slice(FREE, None), b""),
        (slice(FREE, FREE + 4, 2), b"12"),
        (slice(FREE + 4, FREE), b""),
        (slice(FREE, FREE + 4), 4),
        (FREE, b"1"),
    ],
)
def test_a_slice_that_makes_no_sense_is_refused(vm, where, value):
    with pytest.raises(CaseError):
        vm.memory[where] = value
    with pytest.raises(OutOfRange):
        _ = vm.memory[-1]


def test_guest_memory_follows_the_ept_page_by_page(vm):
    vm.ept = Ept()
    vm.ept.map(0x4000, FREE + 0x3000)
    vm.ept.map(0x5000, FREE)
    vm.guest_memory.write(0x4FFC, b"abcdefgh")
    assert vm.memory.read(FREE + 0x3FFC, 4) == b"abcd"
    assert vm.memory.read(FREE, 4) == b"efgh"
    assert vm.guest_memory[0x4FFC:0x5004] == b"abcdefgh"
    with pytest.raises(CaseError, match="does not map L2-physical address 0x6000"):
        vm.guest_memory.read(0x5FFC, 8)


def test_without_ept_guest_memory_is_l2_s_own(tmp_path):
    with Lab("bochs", model="core2_penryn_t9600", log_dir=tmp_path) as lab:
        vm = lab.live()
        assert vm.enter(f"mov byte ptr [{DATA:#x}], 7").reason.name == "HLT"
        assert vm.guest_memory[DATA] == 7
        with pytest.raises(OutOfRange, match="without EPT"):
            vm.guest_memory.read(0x20000, 1)


def test_a_case_brings_memory_and_data(lab):
    ept = guest_ept()
    ept.map(UNMAPPED, FREE)
    with lab.live(
        Case(ept=ept, memory={FREE: b"machine"}, data={DATA: b"guest"}, registers={"rbx": 5})
    ) as vm:
        assert vm.guest_memory.read(UNMAPPED, 7) == b"machine"
        assert vm.guest_memory.read(DATA, 5) == b"guest"
        assert vm.registers["rbx"] == 5
        assert vm.enter("add rbx, 1").registers["rbx"] == 6
