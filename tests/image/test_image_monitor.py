"""Finding the built monitor, and what is said where it is not built, cut or damaged."""

from __future__ import annotations

import pytest
from elftools.elf.elffile import ELFFile

from vmxlab.errors import ImageError
from vmxlab.image import layout
from vmxlab.image import monitor as monitor_module
from vmxlab.image.monitor import Monitor, load_monitor

MIB = 1 << 20


@pytest.fixture
def place(tmp_path, monkeypatch, monitor):
    """The only folder that is looked into: it holds a copy of the built monitor."""
    folder = tmp_path / "guest"
    folder.mkdir()
    (folder / "monitor.elf").write_bytes(monitor.elf)
    (folder / "reset.bin").write_bytes(monitor.reset_stub)
    monkeypatch.setattr(monitor_module, "_PLACES", (tmp_path / "nothing", folder))
    return folder


def refusal() -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_monitor()
    return caught.value


def test_the_monitor_lies_where_the_layout_says(monitor):
    assert len(monitor.code) % 4 == 0
    assert layout.MONITOR_BASE <= monitor.entry < layout.MONITOR_BASE + len(monitor.code)
    for name in ("exit_entry", "exit_stack_top", "page_table_root", "gdt", "idt", "tss"):
        assert layout.MONITOR_BASE < getattr(monitor, name) <= layout.MONITOR_LIMIT, name
    assert monitor.page_table_root % 4096 == 0
    assert monitor.exit_stack_top % 16 == 0
    assert monitor.gdt_bytes > layout.SELECTOR_TSS + 15, "a TSS descriptor has 16 bytes"
    assert monitor.idt_bytes == 256 * 16 or monitor.idt_bytes >= 32 * 16


def test_addresses_are_those_of_the_symbol_table(place, monitor):
    with (place / "monitor.elf").open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        for name, address in (("vmx_exit_entry", monitor.exit_entry), ("monitor_tss", monitor.tss)):
            (symbol,) = table.get_symbol_by_name(name)
            assert symbol["st_value"] == address


def test_a_copy_elsewhere_is_the_same_monitor(place, monitor):
    assert load_monitor() == monitor


def test_a_monitor_that_was_built_again_is_read_again(place, monitor):
    first = load_monitor()
    stub = bytearray(monitor.reset_stub)
    stub[-1] ^= 1
    (place / "reset.bin").write_bytes(stub)
    (place / "reset.bin").touch()
    assert load_monitor() != first
    assert isinstance(load_monitor(), Monitor)


@pytest.mark.parametrize("missing", ["monitor.elf", "reset.bin"])
def test_a_monitor_that_is_not_built_says_how_to_build_it(place, missing):
    (place / missing).unlink()
    error = refusal()
    assert "not built" in error.message
    assert str(place) in error.message
    assert "make guest" in error.advice


def test_an_empty_file_is_no_monitor(place):
    (place / "monitor.elf").write_bytes(b"")
    error = refusal()
    assert str(place / "monitor.elf") in error.message
    assert "make guest" in error.advice


def cuts(size: int) -> list[int]:
    return sorted({*range(1, 128, 9), *range(size // 20, size, size // 20), size - 40, size - 1})


def test_a_monitor_cut_anywhere_is_refused(place, monitor):
    """Never a monitor that boots into nothing: the symbol and section tables lie at the file's end."""
    for length in cuts(len(monitor.elf)):
        (place / "monitor.elf").write_bytes(monitor.elf[:length])
        error = refusal()
        assert str(place / "monitor.elf") in error.message, length
        assert "make guest" in error.advice


@pytest.mark.parametrize("start", range(0, 52, 4))
@pytest.mark.parametrize("value", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\0\0\x80"])
def test_a_damaged_file_header_is_refused_or_makes_no_difference(place, monitor, start, value):
    damaged = monitor.elf[:start] + value + monitor.elf[start + 4 :]
    (place / "monitor.elf").write_bytes(damaged)
    try:
        assert load_monitor().code == monitor.code
    except ImageError as error:
        assert "make guest" in error.advice


@pytest.mark.parametrize("field", [56, 68], ids=["p_offset", "p_filesz"])
def test_a_segment_that_is_not_in_the_file_is_refused(place, monitor, field):
    damaged = monitor.elf[:field] + b"\xff\xff\xff\x7f" + monitor.elf[field + 4 :]
    (place / "monitor.elf").write_bytes(damaged)
    assert "make guest" in refusal().advice


def test_another_program_is_no_monitor(place, tmp_path):
    (place / "monitor.elf").write_bytes(b"#!/bin/sh\nexit 0\n" * 20)
    assert "can't be read as a monitor" in refusal().message


@pytest.mark.parametrize("size", [0, 100, 1023, 1025])
def test_a_stub_of_the_wrong_size_is_refused(place, monitor, size):
    (place / "reset.bin").write_bytes((monitor.reset_stub * 2)[:size])
    error = refusal()
    assert str(place / "reset.bin") in error.message
    assert "make guest" in error.advice
