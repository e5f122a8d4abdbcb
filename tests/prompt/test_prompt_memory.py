"""Memory, bitmaps and EPT from the prompt: what is shown is what is there, and the processor acts by it."""

from __future__ import annotations

import re

import pytest

from vmxlab.cases.memory import L2_MEMORY, L2_MEMORY_BYTES, PROGRAM
from vmxlab.image import layout

FREE = layout.FREE_PAGES


@pytest.fixture
def loaded(prompt):
    """The baseline, set up anew."""
    prompt("load")
    return prompt


def shown(prompt, what, count, size=1):
    """The numbers that `mem` shows."""
    unit = f"u{8 * size} " if size > 1 else ""
    lines = prompt(f"mem {unit}{what} {count}").splitlines()
    return [int(word, 16) for line in lines for word in line.partition(": ")[2].split()]


# --- memory -------------------------------------------------------------------------------------------------


def test_bytes_are_written_with_and_without_spaces(prompt):
    assert prompt(f"mem {FREE:#x} = 01 0203 0xfe ff") == "5 bytes written\n"
    assert shown(prompt, f"{FREE:#x}", 5) == [1, 2, 3, 0xFE, 0xFF]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_numbers_of_each_size_lie_there_as_little_endian(prompt, size):
    top = (1 << 8 * size) - 1
    prompt(f"mem u{8 * size} {FREE:#x} = 0x1234 {top:#x} 7")
    assert shown(prompt, f"{FREE:#x}", 3, size) == [0x1234, top, 7]
    expected = b"".join(value.to_bytes(size, "little") for value in (0x1234, top, 7))
    assert bytes(shown(prompt, f"{FREE:#x}", 3 * size)) == expected


def test_a_number_too_large_for_its_size_writes_nothing(prompt):
    prompt(f"mem u16 {FREE:#x} = 5 5")
    assert "0x10000 is out of range" in prompt(f"mem u16 {FREE:#x} = 6 0x10000")
    assert shown(prompt, f"{FREE:#x}", 2, 2) == [5, 5]


def test_a_line_of_memory_has_its_address(prompt):
    lines = prompt(f"mem {FREE:#x} 40").splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{FREE + 16 * n:#x}" for n in range(3)]


@pytest.mark.parametrize("line", ["mem 0x100000 = 00", "mem u64 0x14e000 = 0", "mem 0xfffff = 00 00"])
def test_the_monitor_itself_is_not_written(prompt, line):
    assert "the monitor's own memory" in prompt(line)
    assert "usage: mem" in prompt("mem")


def test_registers_of_the_apic_are_read_as_such(prompt):
    """A wrong access of them would end Bochs."""
    (version,) = shown(prompt, "0xfee00030", 1, 4)
    assert version & 0xFF in range(0x10, 0x16)  # SDM Vol. 3A, 11.4.8
    for line in ("mem 0xfee00030", "mem u32 0xfee00034 1", "mem u64 0xfee00030 1", "mem u32 0xfec00020 1"):
        assert "not a register of 32 bits" in prompt(line)


def test_addresses_of_l2_go_through_its_paging_and_ept(loaded):
    here = shown(loaded, f"{L2_MEMORY + PROGRAM:#x}", 16)
    assert shown(loaded, f"gpa:{PROGRAM:#x}", 16) == here
    assert shown(loaded, f"gla:{PROGRAM:#x}", 16) == here
    assert here[:3] == [0x90, 0xE4, 0x60]  # nop; in al, 0x60


def test_an_access_over_two_pages_goes_to_both(loaded):
    loaded(f"ept map 0x9000 {FREE:#x}")
    assert loaded("mem gla:0x8ffe = 11 22 33 44") == "4 bytes written\n"
    assert shown(loaded, f"{L2_MEMORY + 0x8FFE:#x}", 2) == [0x11, 0x22]
    assert shown(loaded, f"{FREE:#x}", 2) == [0x33, 0x44]


def test_what_is_not_mapped_for_l2_is_said(loaded):
    assert loaded("mem gpa:0x20000") == "gpa:0x20000 is not mapped by EPT\n"
    assert loaded("mem gla:0x40000000") == "gla:0x40000000 is not mapped by L2's paging\n"
    assert loaded(f"mem gpa:0x1fffe = {'00' * 4}") == "gpa:0x20000 is not mapped by EPT\n"


# --- code ---------------------------------------------------------------------------------------------------


def test_code_goes_where_l2_goes_on(loaded):
    assert loaded("code 90 f4") == f"2 bytes at gla:0x8000, physical address {L2_MEMORY + PROGRAM:#x}\n"
    assert "rip 0x8001, instruction length 1: f4\n" in loaded("launch")


def test_code_goes_to_an_address(loaded):
    assert loaded("code at 0x9000 f4") == f"1 byte at gpa:0x9000, physical address {L2_MEMORY + 0x9000:#x}\n"
    loaded("reg rip 0x9000")
    assert "rip 0x9000, instruction length 1: f4\n" in loaded("launch")


# --- bitmaps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [0x60, 0x7FFF, 0x8000, 0xFFFF])
def test_a_port_exits_while_its_bit_is_on(loaded, port):
    code = f"code 66ba{port.to_bytes(2, 'little').hex()} ec f4"  # mov dx, port; in al, dx; hlt
    assert loaded(code, f"port {port:#x} on") == f"port {port:#x} on: exits\n"
    assert f"exit: IO_INSTRUCTION (30): IN port {port:#x}, 1 byte\n" in loaded("launch")
    loaded(f"port {port} off")
    assert "exit: HLT" in loaded("resume")


def test_ports_are_shown_in_runs(loaded):
    loaded("port 0x3f8-0x3ff on", "port 0x8000 on")
    assert loaded("port show") == (
        "ports 0x0-0x3f7 off: no exit\nports 0x3f8-0x3ff on: exits\nports 0x400-0x7fff off: no exit\n"
        "port 0x8000 on: exits\nports 0x8001-0xffff off: no exit\n"
    )
    assert loaded("port 0x3ff show") == "port 0x3ff on: exits\n"


def test_many_runs_of_ports_are_not_all_shown(loaded):
    loaded(*(f"port {port} on" for port in range(0, 80, 2)))
    lines = loaded("port show").splitlines()
    assert len(lines) == 33
    assert lines[-1] == "and so on, from port 0x20"


@pytest.mark.parametrize(("msr", "name"), [(0x174, "IA32_SYSENTER_CS"), (0xC000_0080, "IA32_EFER")])
def test_an_msr_exits_while_its_bit_is_on_for_reads_and_writes_apart(loaded, msr, name):
    read_and_write = (
        f"code b9{msr.to_bytes(4, 'little').hex()} 0f32 0f30 f4"  # mov ecx, msr; rdmsr; wrmsr; hlt
    )
    loaded(read_and_write)
    assert loaded(f"msr {name} w on") == f"WRMSR of {name} ({msr:#x}) on: exits\n"
    assert "write of " in loaded("launch")
    loaded(f"msr {msr:#x} rw off", f"msr {name} r on", "reg rip 0x8000")
    assert f"exit: RDMSR (31): read of {name} ({msr:#x})\n" in loaded("resume")
    assert loaded(f"msr {name} show") == (
        f"RDMSR of {name} ({msr:#x}) on: exits\nWRMSR of {name} ({msr:#x}) off: no exit\n"
    )


def test_an_msr_outside_of_the_bitmap_has_no_bit(loaded):
    for msr in ("0x2000", "0xbfffffff", "0xc0002000"):
        assert "has no bit" in loaded(f"msr {msr} rw on")


def test_a_bitmap_that_is_not_used_is_said(loaded):
    controls = loaded.value("vmread PRIMARY_PROCESSOR_BASED_CONTROLS")
    loaded(f"vmwrite PRIMARY_PROCESSOR_BASED_CONTROLS {controls & ~(1 << 25 | 1 << 28):#x}")
    assert "note: USE_IO_BITMAPS is 0 in" in loaded("port 0x60 on")
    assert "note: USE_MSR_BITMAPS is 0 in" in loaded("msr IA32_EFER r on")


# --- EPT ----------------------------------------------------------------------------------------------------


def pages(prompt, page_walker):
    """Every page that the EPT maps, by a walk of its own over memory."""
    root = prompt.value("vmread EPT_POINTER") & ~0xFFF
    walker = page_walker(
        lambda at: b"".join(v.to_bytes(8, "little") for v in shown(prompt, f"{at:#x}", 512, 8))
    )
    return walker.pages(root, present=walker.PRESENT_IN_EPT)


def test_ept_is_shown_in_runs_of_pages(loaded):
    assert loaded("ept show") == (
        f"  gpa:0x0-{L2_MEMORY_BYTES - 1:#x} -> {L2_MEMORY:#x}  rwx WB  {L2_MEMORY_BYTES >> 12} x 4k\n"
    )


def test_a_walk_has_every_entry(loaded):
    *steps, end = loaded("ept show 0x8123").splitlines()
    assert [step.split()[0] for step in steps] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert end == f"gpa:0x8123 is physical address {L2_MEMORY + 0x8123:#x}"
    for step in steps:
        at, entry = re.findall(r"0x[0-9a-f]+", step)[:2]
        assert shown(loaded, at, 1, 8) == [int(entry, 16)]


def test_a_page_that_is_mapped_is_there_for_l2(loaded):
    loaded("code 48 8b 04 25 00 00 10 00 f4")  # mov rax, [0x100000]; hlt
    assert "EPT_VIOLATION (48): read, EPT allows ---; GPA 0x100000; linear 0x100000" in loaded("launch")
    answer = loaded(f"ept map 0x100000 {FREE:#x}")
    assert f"gpa:0x100000 is physical address {FREE:#x}\nINVEPT, single-context: VMsucceed\n" in answer
    loaded(f"mem u64 {FREE:#x} = 0x1234")
    assert "rax 0x0 -> 0x1234" in loaded("resume")


def test_a_page_that_is_taken_away_is_gone_for_l2(loaded):
    loaded("ept unmap 0x10000", "code a1 00 00 01 00 00 00 00 00 f4")  # mov eax, [0x10000]; hlt
    assert "EPT_VIOLATION (48): read, EPT allows ---; GPA 0x10000" in loaded("launch")
    assert loaded("ept unmap 0x10000") == "gpa:0x10000 is not mapped\n"


@pytest.mark.parametrize(
    ("options", "level", "bits"),
    [
        ("", "PTE", 0x437),
        ("r uc", "PTE", 0x1),
        ("4k wt rx", "PTE", 0x425),
        ("2m", "PDE", 0x4B7),
        ("rw 1g wp", "PDPTE", 0xAB),
        ("none", "PTE", 0x30),
    ],
)
def test_pages_of_each_size_with_rights_and_memory_type(loaded, options, level, bits):
    """SDM Vol. 3C, tables 29-3, 29-5 and 29-7: rights, memory type, and bit 7 of a large page."""
    gpa = 0x80_4000_0000
    last = loaded(f"ept map {gpa:#x} 0x40000000 {options}").partition("\ngpa:")[0].splitlines()[-1]
    name, at = re.match(r"  (\w+) +at (0x[0-9a-f]+):", last).groups()
    assert (name, shown(loaded, at, 1, 8)) == (level, [0x4000_0000 | bits])


def test_a_large_page_is_split_for_a_smaller_change(loaded, page_walker):
    gpa = 0x40_0000_0000
    loaded(f"ept map {gpa:#x} 0 1g rx uc")
    answer = loaded(f"ept map {gpa + 0x3000:#x} {FREE:#x}")
    assert answer.count("was mapped there is split") == 2
    found = {p.linear: (p.bytes, p.physical, p.entry) for p in pages(loaded, page_walker) if p.linear >= gpa}
    expected = {gpa + n * 4096: (4096, n * 4096, 0x405) for n in range(512)}
    expected |= {gpa + (n << 21): (2 << 20, n << 21, 0x485) for n in range(1, 512)}
    expected[gpa + 0x3000] = (4096, FREE, 0x437)
    assert found == expected


def test_tables_come_from_pages_that_no_table_uses_until_none_is_left(loaded):
    """All but four pages of EPT_TABLES hang below the root; each page of 4 KiB mapped here needs three."""
    root = loaded.value("vmread EPT_POINTER") & ~0xFFF
    assert root == layout.EPT_TABLES
    used = [root + (n << 12) | 7 for n in range(4, layout.EPT_TABLES_MAX - 4)]
    for n in range(0, len(used), 60):
        values = " ".join(f"{value:#x}" for value in used[n : n + 60])
        loaded(f"mem u64 {root + 8 * (256 + n):#x} = {values}")
    assert "is physical address 0x0" in loaded("ept map 0x8000000000 0")
    assert "no page for a table is free from 0x1010000 to 0x10fffff" in loaded("ept map 0x10000000000 0")
    assert loaded("ept show 0x8000").endswith(f"is physical address {L2_MEMORY + 0x8000:#x}\n")
    loaded("load")
    assert "is physical address 0x0" in loaded("ept map 0x10000000000 0")


def test_tables_that_lead_in_a_circle_are_shown_with_an_end(loaded):
    root = loaded.value("vmread EPT_POINTER") & ~0xFFF
    loaded(*(f"mem u64 {root + 8 * n:#x} = {root | 7:#x}" for n in range(4)))
    assert "and so on" in loaded("ept show")
    assert "PTE" in loaded("ept show 0")


def test_ept_from_nothing(loaded):
    loaded("vmwrite EPT_POINTER 0")
    assert loaded("ept show") == "EPT_POINTER is 0x0: there are no tables; 'ept new' makes some\n"
    assert loaded("ept new").endswith("01e: nothing is mapped\n")
    assert loaded("ept show") == "nothing is mapped\n"
    loaded(f"ept map 0 {L2_MEMORY:#x} 2m")
    assert "exit: HLT" in loaded("launch")


def test_a_walk_length_that_is_none_is_said(loaded):
    loaded("vmwrite EPT_POINTER 0x1010006")
    assert loaded("ept show") == "EPT_POINTER is 0x1010006: a page walk of 1 levels is none\n"


def test_ept_that_is_not_used_is_said(loaded):
    controls = loaded.value("vmread SECONDARY_PROCESSOR_BASED_CONTROLS")
    loaded(f"vmwrite SECONDARY_PROCESSOR_BASED_CONTROLS {controls & ~2:#x}")
    assert "note: ENABLE_EPT is 0 in" in loaded("ept map 0x100000 0")
