"""Frames and payloads: a script arrives as it was sent, or not at all."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab import Case, IOBitmap
from vmxlab.errors import ImageError
from vmxlab.image import layout
from vmxlab.image.compiler import compile_cases
from vmxlab.image.frames import Frame, decode_frame, encode_frame, pack_payload
from vmxlab.image.protocol import PROTOCOL_VERSION

# Units with much in common, as the operations of scripts have, and some longer than a chunk.
unit = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"", b"\0", b"unit", b"a longer unit of operations" * 3, bytes(40), bytes(range(100))]),
)
scripts = st.lists(unit, max_size=12)
several = settings(derandomize=True, max_examples=120, deadline=None)


def script(units):
    return b"".join(units)


def taken(data, previous=b""):
    """The script of a frame, or None where it is refused. Any other error is one."""
    try:
        return decode_frame(data, previous)
    except ImageError:
        return None


# --- there and back -----------------------------------------------------------------------------------------


@several
@given(scripts)
def test_a_frame_gives_its_script(units):
    assert decode_frame(encode_frame(units).data) == script(units)


@several
@given(scripts, scripts)
def test_a_frame_gives_its_script_from_the_one_before(before, units):
    frame = encode_frame(units, encode_frame(before))
    assert decode_frame(frame.data, script(before)) == script(units)


@several
@given(st.lists(scripts, min_size=1, max_size=6))
def test_a_payload_gives_all_scripts_in_order(all_scripts):
    payload = pack_payload(all_scripts)
    assert read_payload(payload) == [script(units) for units in all_scripts]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(scripts.filter(script), st.data())
def test_one_unit_changed_costs_little_more_than_that_unit(units, data):
    index = data.draw(st.integers(0, len(units) - 1))
    changed = [*units[:index], b"another unit", *units[index + 1 :]]
    frame = encode_frame(changed, encode_frame(units))
    assert len(frame.data) <= 16 + 60 + 2 * len(units)


def test_the_same_script_again_is_one_copy():
    units = [bytes([i]) * 50 for i in range(100)]
    frame = encode_frame(units, encode_frame(units))
    assert len(frame.data) <= 16 + 6


def test_a_copy_may_lead_backwards():
    before = [b"A" * 40, b"B" * 40, b"C" * 40]
    units = [before[2], before[1], before[0], before[2]]
    frame = encode_frame(units, encode_frame(before))
    assert decode_frame(frame.data, script(before)) == script(units)
    assert len(frame.data) < 16 + 30, "copies, not literals"


def test_a_frame_knows_what_it_is_a_difference_to():
    first = encode_frame([b"one" * 20])
    second = encode_frame([b"one" * 20, b"two"], first)
    assert struct.unpack_from("<IIII", first.data)[3] == 0
    assert struct.unpack_from("<IIII", second.data)[3] == first.crc32
    assert taken(second.data, b"") is None


def read_payload(payload, wait=0):
    """An independent reader of the payload's header, with the frames decoded."""
    magic, version, count, size, crc, flags = struct.unpack_from("<IIIIII", payload)
    body = payload[24:]
    assert flags == wait
    assert (magic, version, size, crc) == (0x50584D56, PROTOCOL_VERSION, len(body), zlib.crc32(body))
    found, previous = [], b""
    while body:
        (operations,) = struct.unpack_from("<I", body)
        previous = decode_frame(body[: 16 + operations], previous)
        found.append(previous)
        body = body[16 + operations :]
    assert len(found) == count
    return found


# --- damage -------------------------------------------------------------------------------------------------

BEFORE = [b"CASE one", bytes(64), b"VMXON" * 9, bytes(range(80))]
AFTER = [b"CASE two", bytes(64), b"VMXON" * 9, b"more", bytes(range(80)), b"end"]
FRAMES = {
    "alone": (encode_frame(AFTER), b""),
    "difference": (encode_frame(AFTER, encode_frame(BEFORE)), script(BEFORE)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_cut_anywhere_is_refused(name):
    frame, previous = FRAMES[name]
    assert taken(frame.data, previous) == script(AFTER)
    for length in range(len(frame.data)):
        assert taken(frame.data[:length], previous) is None, length


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_with_one_bit_flipped_is_refused_or_gives_the_same_script(name):
    frame, previous = FRAMES[name]
    for bit in range(len(frame.data) * 8):
        damaged = bytearray(frame.data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert taken(bytes(damaged), previous) in (None, script(AFTER)), bit
        if bit >= 16 * 8:
            assert taken(bytes(damaged), previous) is None, "the operations have a checksum"


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=40))
def test_operations_made_of_rubbish_are_refused_or_read_and_nothing_else(operations, previous):
    """A checksum that fits proves nothing: what is inside is checked for itself."""
    for length in (0, 7, len(operations)):
        header = struct.pack("<IIII", len(operations), length, zlib.crc32(operations), 1)
        result = taken(header + operations, previous)
        assert result is None or len(result) == length


@pytest.mark.parametrize(
    "operations",
    [
        b"\x02",  # a literal of 1 byte, and none there
        b"\x80",  # a varint without its end
        b"\x03",  # a copy without its distance
        b"\x03\x01",  # a copy from before the old script
        b"\x07\x09",  # three bytes from five before it: an index that Python would take
        b"\x03\x14",  # a copy from behind it
        b"\x15\x00",  # a copy of more than it has
    ],
)
def test_operations_that_reach_outside_are_refused(operations):
    for length in range(10):
        header = struct.pack("<IIII", len(operations), length, zlib.crc32(operations), 1)
        with pytest.raises(ImageError, match=r"cut short|outside"):
            decode_frame(header + operations, b"123456789")


def test_a_frame_with_bytes_behind_its_end_is_refused():
    frame = encode_frame(AFTER)
    assert taken(frame.data + b"\0") is None


# --- limits -------------------------------------------------------------------------------------------------


def test_a_script_may_fill_the_monitors_buffer_and_no_more():
    room = layout.SCRIPT_BUFFER_BYTES
    frame = encode_frame([bytes(room)])
    assert len(frame.data) <= layout.FRAME_BUFFER_BYTES
    with pytest.raises(ImageError, match=rf"{room + 1} bytes; the monitor takes {room}") as caught:
        encode_frame([bytes(room), b"x"])
    assert "smaller pages" in caught.value.advice


def test_a_payload_that_does_not_fit_says_how_many_bytes_it_needs():
    big = [bytes([i]) * 7 + bytes([i, 0]) * (layout.SCRIPT_BUFFER_BYTES // 2 - 4) for i in range(17)]
    assert pack_payload([[unit] for unit in big[:15]])
    with pytest.raises(
        ImageError, match=r"the cases need \d+ bytes; an image has room for 8388608"
    ) as caught:
        pack_payload([[unit] for unit in big])
    assert "fewer cases" in caught.value.advice


def test_no_cases_make_an_empty_payload():
    assert read_payload(pack_payload([])) == []


def test_cases_that_wait_differ_in_a_flag_alone():
    payload, waiting = pack_payload([AFTER]), pack_payload([AFTER], wait=True)
    assert read_payload(waiting, wait=1) == [script(AFTER)]
    assert (payload[:20], payload[24:]) == (waiting[:20], waiting[24:])


def test_a_thousand_similar_cases_are_a_small_payload(target_for):
    cases = []
    for port in range(1000):
        bitmap = IOBitmap.passthrough_all()
        bitmap.set_intercept(port, True)
        code = b"\xba" + port.to_bytes(4, "little") + b"\xec\xf4"  # mov edx, port; in al, dx; hlt
        cases.append(Case(program=code, io_bitmap=bitmap, name=f"port-{port:#x}"))
    compiled = compile_cases(cases, target_for("skylake"))
    payload = pack_payload([case.units for case in compiled])
    assert len(payload) < 100_000
    assert read_payload(payload)[-1] == script(compiled[-1].units)


def test_a_frame_is_a_value():
    assert encode_frame(AFTER) == Frame(AFTER, FRAMES["alone"][0].data, FRAMES["alone"][0].crc32)
