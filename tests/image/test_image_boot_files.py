"""The boot files: the ROM that the reset vector enters, and the ELF that QEMU and GRUB load."""

from __future__ import annotations

import dataclasses
import io
import struct
from itertools import pairwise

import pytest
from elftools.elf.elffile import ELFFile

from vmxlab.errors import ImageError
from vmxlab.image import layout
from vmxlab.image.frames import pack_payload
from vmxlab.image.rom import pack_elf, pack_rom

KIB, FOUR_GIB = 1024, 1 << 32
PAYLOADS = {
    "none": b"",
    "small": pack_payload([[b"a script"]]),
    "odd": pack_payload([[b"abc"]]) + b"x",
    "large": pack_payload([[bytes([i % 251 for i in range(200_000)])]]),
}
each_payload = pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)


def table_of(rom: bytes) -> dict[str, int]:
    """The stub's table, as guest/boot/reset.S describes it; its last kilobyte starts with it."""
    stub = rom[-1024:]
    assert stub[:8] == b"VMXLABRM"
    names = (
        *("monitor_source", "monitor_bytes", "monitor_target", "monitor_entry"),
        *("payload_source", "payload_bytes", "payload_target", "unused"),
    )
    return dict(zip(names, struct.unpack_from("<8I", stub, 8), strict=True))


# --- ROM ----------------------------------------------------------------------------------------------------


@each_payload
def test_a_rom_is_a_power_of_two_from_64_kib_on(monitor, payload):
    rom = pack_rom(monitor, payload)
    assert len(rom) >= 64 * KIB
    assert len(rom) & (len(rom) - 1) == 0
    needed = len(monitor.code) + len(payload) + 1024
    assert len(rom) == 64 * KIB or len(rom) < 2 * (needed + 4), "and no larger than it must be"


@each_payload
def test_the_table_says_what_the_stub_copies_to_where(monitor, payload):
    """The ROM ends at 4 GiB: a physical address there is an offset in the file."""
    rom = pack_rom(monitor, payload)
    table = table_of(rom)

    def content(what):
        offset = table[f"{what}_source"] - (FOUR_GIB - len(rom))
        return rom[offset : offset + table[f"{what}_bytes"]]

    assert content("monitor") == monitor.code
    assert content("payload") == payload + bytes(-len(payload) % 4)
    assert table["monitor_target"] == layout.MONITOR_BASE
    assert table["monitor_entry"] == monitor.entry
    assert table["payload_target"] == layout.PAYLOAD_BASE
    assert table["monitor_bytes"] % 4 == table["payload_bytes"] % 4 == 0, "the stub copies in words"
    assert table["unused"] == 0


@each_payload
def test_the_rest_of_the_stub_is_as_it_was_assembled(monitor, payload):
    rom = pack_rom(monitor, payload)
    assert len(monitor.reset_stub) == 1024
    assert rom[-1024 + 40 :] == monitor.reset_stub[40:]


def test_the_reset_vector_jumps_into_the_last_64_kib(monitor):
    """SDM Vol. 3A, 10.1.4: the first instruction is at FFFFFFF0H. A near jump in 16-bit code stays there."""
    rom = pack_rom(monitor)
    opcode = rom[-16]
    if opcode == 0xEB:
        target = 0xFFF2 + struct.unpack_from("<b", rom, len(rom) - 15)[0]
    else:
        assert opcode == 0xE9
        target = 0xFFF3 + struct.unpack_from("<h", rom, len(rom) - 15)[0]
    assert 0xFC00 + 40 <= target < 0xFFF0, "behind the table, in the stub"
    assert rom[len(rom) - 0x10000 + target] == 0xFA, "CLI comes first"


def test_a_rom_that_would_be_too_large_is_refused(paper_monitor):
    room = 2048 * KIB - 1024 - len(paper_monitor.code)
    assert len(pack_rom(paper_monitor, bytes(room))) == 2048 * KIB
    with pytest.raises(ImageError, match="a ROM has at most 2097152") as caught:
        pack_rom(paper_monitor, bytes(room + 1))
    assert "fewer cases" in caught.value.advice


@pytest.mark.parametrize("free", [0, 4])
def test_the_next_size_is_taken_when_it_no_longer_fits(paper_monitor, free):
    room = 64 * KIB - 1024 - len(paper_monitor.code)
    assert len(pack_rom(paper_monitor, bytes(room - free))) == 64 * KIB
    assert len(pack_rom(paper_monitor, bytes(room + 1 + free))) == 128 * KIB


@pytest.mark.parametrize(
    "stub",
    [b"", b"\0" * 1024, b"VMXLABRM", b"VMXLABRM" + bytes(1015), b"VMXLABRM" + bytes(1017)],
    ids=["empty", "no table", "only a table's start", "a byte short", "a byte long"],
)
def test_a_stub_that_is_none_is_refused(paper_monitor, stub):
    """The reset vector must stand exactly 16 bytes before the end: a cut stub would jump into nothing."""
    with pytest.raises(ImageError, match="reset-vector stub") as caught:
        pack_rom(dataclasses.replace(paper_monitor, reset_stub=stub))
    assert "make guest" in caught.value.advice


# --- ELF ----------------------------------------------------------------------------------------------------


def elf_of(data: bytes) -> ELFFile:
    return ELFFile(io.BytesIO(data))


def loaded(elf: ELFFile) -> dict[int, bytes]:
    return {s["p_paddr"]: s.data() for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"}


@each_payload
def test_the_elf_loads_the_monitor_and_the_payload(monitor, payload):
    elf = elf_of(pack_elf(monitor, payload))
    assert (elf.elfclass, elf["e_machine"], elf["e_entry"]) == (32, "EM_386", monitor.entry)
    segments = loaded(elf)
    assert segments[layout.MONITOR_BASE].ljust(len(monitor.code), b"\0") == monitor.code
    assert {**segments, layout.MONITOR_BASE: b""} == {
        layout.MONITOR_BASE: b"",
        **({layout.PAYLOAD_BASE: payload} if payload else {}),
    }


@each_payload
def test_no_segment_covers_another(monitor, payload):
    spans = sorted(
        (s["p_paddr"], s["p_paddr"] + s["p_memsz"])
        for s in elf_of(pack_elf(monitor, payload)).iter_segments()
        if s["p_type"] == "PT_LOAD"
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][1] <= layout.MONITOR_LIMIT


@each_payload
def test_a_multiboot_header_with_its_checksum_lies_in_the_first_8_kib(monitor, payload):
    """Multiboot Specification 0.6.96, 3.1: 32-bit aligned; magic, flags and checksum sum to 0."""
    head = pack_elf(monitor, payload)[:8192]
    headers = [
        struct.unpack_from("<III", head, at)
        for at in range(0, len(head) - 12, 4)
        if struct.unpack_from("<I", head, at) == (0x1BADB002,)
    ]
    assert len(headers) == 1
    assert sum(headers[0]) % (1 << 32) == 0
    assert headers[0][1] & 0x1_0000 == 0, "an ELF file is loaded by its program headers"


@each_payload
def test_a_pvh_note_names_the_32_bit_entry(monitor, payload):
    """Xen's note XEN_ELFNOTE_PHYS32_ENTRY, number 18: where QEMU enters an ELF without multiboot."""
    notes = [
        note
        for segment in elf_of(pack_elf(monitor, payload)).iter_segments()
        if segment["p_type"] == "PT_NOTE"
        for note in segment.iter_notes()
    ]
    (note,) = [note for note in notes if note["n_name"] == "Xen" and note["n_type"] == 18]
    assert int.from_bytes(note["n_descdata"], "little") == monitor.entry


def test_the_payload_changes_nothing_else_of_the_elf(monitor):
    packed = pack_elf(monitor, PAYLOADS["small"])
    assert pack_elf(monitor) == monitor.elf
    before, after = elf_of(monitor.elf), elf_of(packed)
    assert after.num_segments() == before.num_segments() + 1
    assert [s.name for s in after.iter_sections()] == [s.name for s in before.iter_sections()]


@pytest.mark.parametrize("claim", [False, True], ids=["", "claim"])
@each_payload
def test_program_headers_are_where_grub_reads_them(monitor, payload, claim):
    """grub-core/loader/multiboot_elfxx.c: in the first 8 KiB, as the multiboot header. The rest stays."""
    packed = pack_elf(monitor, payload, claim_memory=claim)
    phoff, phentsize, phnum = (elf_of(packed)[f"e_{name}"] for name in ("phoff", "phentsize", "phnum"))
    end = phoff + phentsize * phnum
    assert end <= 8192
    assert packed[end : len(monitor.elf)] == monitor.elf[end:]
    assert not any(monitor.elf[phoff + phentsize * elf_of(monitor.elf).num_segments() : end])


@each_payload
def test_claimed_memory_is_all_that_the_image_uses_from_1_mib_on(monitor, payload):
    spans = sorted(
        (s["p_paddr"], s["p_paddr"] + s["p_memsz"])
        for s in elf_of(pack_elf(monitor, payload, claim_memory=True)).iter_segments()
        if s["p_type"] == "PT_LOAD"
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    gaps = [(end, start) for (_, end), (start, _) in pairwise(spans) if end != start]
    after = layout.PAYLOAD_BASE + (layout.PAYLOAD_BYTES if payload else 0)
    assert (spans[0][0], spans[-1][1]) == (layout.MONITOR_BASE, layout.MEMORY_BYTES)
    first = layout.MONITOR_BASE + len(monitor.code)
    assert [gap for gap in gaps if gap[1] != first] == [(after, layout.CASE_BASE)]


def test_elf_without_room_for_a_program_header_is_refused(monitor):
    full = bytearray(monitor.elf)
    full[52 + 2 * 32] = 1
    with pytest.raises(ImageError, match="no room for another program header"):
        pack_elf(dataclasses.replace(monitor, elf=bytes(full)), b"1234")


@each_payload
def test_boot_files_are_reproducible(monitor, payload):
    assert pack_rom(monitor, payload) == pack_rom(monitor, payload)
    assert pack_elf(monitor, payload) == pack_elf(monitor, payload)
