"""Pages as operations: whatever the bytes are, the monitor makes the same ones again."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab import IOBitmap, MsrBitmap, guest_ept
from vmxlab.cases.guest_state import guest_memory
from vmxlab.cases.program import Mode
from vmxlab.image import script
from vmxlab.image.protocol import Op

AT = 0x123_4000


def made(parts: list[bytes], size: int, background: int) -> bytes:
    """What the monitor's FILL, DATA and SEQUENCE make of memory that holds `background`."""
    memory = bytearray([background]) * size
    for part in parts:
        code, address = struct.unpack_from("<BQ", part)
        offset, operands = address - AT, part[9:]
        if code == 2:
            count, value = struct.unpack("<IB", operands)
            content = bytes([value]) * count
        elif code == 3:
            (count,) = struct.unpack_from("<I", operands)
            content = operands[4:]
            assert len(content) == count
        else:
            assert code == 4
            count, first, stride = struct.unpack("<IQQ", operands)
            content = b"".join(struct.pack("<Q", (first + i * stride) % (1 << 64)) for i in range(count))
        assert offset >= 0 and offset + len(content) <= size, "outside of the page"
        memory[offset : offset + len(content)] = content
    return bytes(memory)


def assert_made_again(content: bytes) -> None:
    assert made(script.page(AT, content), len(content), 0xCC) == content
    assert made(script.page(AT, content, zeroed=True), len(content), 0) == content


# --- properties ---------------------------------------------------------------------------------------------

words = st.lists(st.integers(0, (1 << 64) - 1), max_size=40)
progressions = st.builds(
    lambda first, stride, count: [(first + i * stride) % (1 << 64) for i in range(count)],
    st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 0x87, 0xFFFF_FFFF_FFFF_FFF0]),
    st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 0x1000, 0x20_0000, (1 << 64) - 1]),
    st.integers(0, 12),
)
runs = st.builds(
    lambda value, count: [value] * count,
    st.sampled_from([0, (1 << 64) - 1, 0xCCCC_CCCC_CCCC_CCCC, 1]),
    st.integers(0, 20),
)
structured = st.lists(words | progressions | runs, max_size=8).map(
    lambda parts: b"".join(struct.pack("<Q", word) for part in parts for word in part)
)
pages = st.builds(
    lambda body, tail, cut: (body + tail)[cut:], structured, st.binary(max_size=9), st.integers(0, 9)
)


@settings(derandomize=True, max_examples=250, deadline=None)
@given(pages)
def test_any_page_is_made_again(content):
    assert_made_again(content)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_of_any_size_are_made_again(content):
    assert_made_again(content)


@pytest.mark.parametrize("size", range(33))
@pytest.mark.parametrize("value", [0x00, 0xFF, 0x5A])
def test_every_small_size_is_made_again(size, value):
    assert_made_again(bytes([value]) * size)
    assert_made_again(bytes([value]) * size + b"\x01")


@pytest.mark.parametrize("position", range(24))
@pytest.mark.parametrize("background", [0x00, 0xFF])
def test_a_single_byte_that_differs_is_found_wherever_it_is(position, background):
    content = bytearray([background]) * 24
    content[position] ^= 0x10
    assert_made_again(bytes(content))


REAL = {
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "I/O bitmap": IOBitmap.intercept_all().a,
    "MSR bitmap": MsrBitmap.passthrough_all().to_bytes(),
    **{f"EPT table {i}": content for i, (_, content) in enumerate(guest_ept().tables(0))},
    **{
        f"{mode.name} {'ept' if ept else 'no ept'} {address:#x}": content
        for mode in Mode
        for ept in (True, False)
        for address, content in guest_memory(mode, with_ept=ept).items()
    },
    "falling": b"".join(struct.pack("<Q", 512 - i) for i in range(512)),
    "wrapping": b"".join(struct.pack("<Q", (i * (1 << 61)) % (1 << 64)) for i in range(512)),
    "three in a row": struct.pack("<6Q", 9, 1, 2, 3, 7, 8),
}


@pytest.mark.parametrize("name", REAL)
def test_the_pages_that_cases_have_are_made_again(name):
    assert_made_again(REAL[name])


# --- size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zeros", "ones", "I/O bitmap", "MSR bitmap"])
def test_a_page_of_one_value_is_one_fill(name):
    (part,) = script.page(AT, REAL[name])
    assert part[0] == Op.FILL
    assert len(part) == 14


def test_zeros_in_zeroed_memory_cost_nothing():
    assert script.page(AT, bytes(4096), zeroed=True) == []


def test_a_progression_is_a_sequence_only_where_that_is_shorter():
    three, four = (struct.pack(f"<{n}Q", *range(5, 5 + n)) for n in (3, 4))
    assert [part[0] for part in script.page(AT, three, zeroed=True)] == [Op.DATA]
    assert [part[0] for part in script.page(AT, four, zeroed=True)] == [Op.SEQUENCE]


def test_a_page_table_is_one_sequence():
    """512 entries of 2 MiB, from 0 on."""
    table = guest_memory(Mode.LONG, with_ept=True)[0x5000]
    assert len(table) == 4096
    (part,) = script.page(AT, table, zeroed=True)
    assert part[0] == Op.SEQUENCE
    assert struct.unpack("<QIQQ", part[1:]) == (AT, 512, 0x83, 0x20_0000)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=4096))
def test_no_page_costs_much_more_than_its_bytes(content):
    assert sum(map(len, script.page(AT, content))) <= len(content) + 40 + len(content) // 16 * 13


def test_the_same_page_at_two_addresses_differs_in_nothing_else():
    one, other = (script.page(at, REAL["EPT table 3"]) for at in (AT, AT + 0x1000))
    assert [part[9:] for part in one] == [part[9:] for part in other]
    assert one != other
