"""I/O bitmaps against an independent model: sets of port numbers and a bytearray, no bit array."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.structures import PAGE_SIZE, IOBitmap

properties = settings(derandomize=True, max_examples=40, deadline=None)
PORTS = 65536


def model_bytes(ports: set[int]) -> bytes:
    """SDM Vol. 3C, 25.6.4, in the plainest way: bit n of the 64 Ki bits stands for port n."""
    data = bytearray(8192)
    for port in ports:
        data[port // 8] += 2 ** (port % 8)
    return bytes(data)


def model_exits(ports: set[int], port: int, size: int) -> bool:
    """SDM Vol. 3C, 26.1.3: any covered port's bit, and always when it wraps around."""
    covered = [port + n for n in range(size)]
    return covered[-1] > 65535 or any(p in ports for p in covered)


def test_every_port_has_its_own_bit() -> None:
    bitmap = IOBitmap.passthrough_all()
    for port in range(PORTS):
        bitmap.set_intercept(port, True)
        data = bytearray(8192)
        data[port >> 3] = 1 << (port & 7)
        assert bitmap.to_bytes() == data, hex(port)
        bitmap.set_intercept(port, False)
    assert bitmap == IOBitmap.passthrough_all()


def test_every_port_can_be_let_through_alone() -> None:
    bitmap = IOBitmap.intercept_all()
    for port in range(PORTS):
        bitmap.set_intercept(port, False)
        assert not bitmap.intercepts(port), hex(port)
        assert port == 0 or bitmap.intercepts(port - 1), hex(port)
        bitmap.set_intercept(port, True)
    assert bitmap == IOBitmap.intercept_all()


def test_ports_set_one_by_one_add_up() -> None:
    bitmap, ports = IOBitmap.passthrough_all(), set()
    for port in range(0, PORTS, 3):
        bitmap.set_intercept(port, True)
        ports.add(port)
    assert bitmap.to_bytes() == model_bytes(ports)
    assert all(bitmap.intercepts(port) == (port in ports) for port in range(PORTS))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_access_at_each_port_follows_the_model(size: int) -> None:
    ports = {0, 7, 8, 0x60, 0x1FFF, 0x2000, 0x7FFF, 0x8000, 0x9FFF, 0xA000, 0xCF8, 0xFFFF}
    bitmap = IOBitmap.passthrough_all()
    for port in ports:
        bitmap.set_intercept(port, True)
    wrong = [p for p in range(PORTS) if bitmap.intercepts(p, size) != model_exits(ports, p, size)]
    assert not wrong


RANGES = [
    (base, count)
    for base in (0, 1, 0x60, 0x1FFF, 0x7FFF, 0x8000, 0xFFFF)
    for count in (0, 1, 7, 8, 9, 255, 0x1FFF, 0x2000, 0x8000, 0x10000)
    if base + count <= PORTS
]


@pytest.mark.parametrize(("base", "count"), RANGES)
@pytest.mark.parametrize("intercept", [True, False])
def test_a_range_sets_exactly_its_ports(base: int, count: int, intercept: bool) -> None:
    bitmap = IOBitmap.passthrough_all() if intercept else IOBitmap.intercept_all()
    bitmap.set_intercept_of_range(base, count, intercept)
    ports = set(range(base, base + count))
    assert bitmap.to_bytes() == model_bytes(ports if intercept else set(range(PORTS)) - ports)


def test_all_ports_by_range_are_all_ports() -> None:
    bitmap = IOBitmap.passthrough_all()
    for base in range(0, PORTS, 0x100):
        bitmap.set_intercept_of_range(base, 0x100, True)
    assert bitmap == IOBitmap.intercept_all()
    assert list(bitmap.intercepted_ports()) == [range(PORTS)]


@given(st.lists(st.tuples(st.integers(0, PORTS - 1), st.integers(0, 0x3000), st.booleans()), max_size=8))
@properties
def test_any_ranges_in_any_order_follow_the_model(changes: list[tuple[int, int, bool]]) -> None:
    bitmap, ports = IOBitmap.passthrough_all(), set()
    for base, count, intercept in changes:
        count = min(count, PORTS - base)
        bitmap.set_intercept_of_range(base, count, intercept)
        touched = range(base, base + count)
        ports = ports | set(touched) if intercept else ports - set(touched)
    assert bitmap.to_bytes() == model_bytes(ports)
    assert {port for run in bitmap.intercepted_ports() for port in run} == ports
    assert IOBitmap.from_bytes(bitmap.to_bytes()) == bitmap


@pytest.mark.parametrize(
    ("port", "size", "exits"),
    [
        (0x60, 1, True),
        (0x61, 1, False),
        (0x5F, 2, True),
        (0x5E, 2, False),
        (0x5D, 4, True),
        (0x5C, 4, False),
        (0x7FFF, 2, True),  # covers 8000H, in the other bitmap
        (0x7FFD, 4, True),
        (0x7FFC, 4, False),
        (0x8001, 4, False),
    ],
)
def test_wide_access_exits_if_any_covered_port_is_set(port: int, size: int, exits: bool) -> None:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    bitmap.set_intercept(0x8000, True)
    assert bitmap.intercepts(port, size) is exits


@pytest.mark.parametrize(
    ("port", "size", "wraps"),
    [
        (0xFFFF, 1, False),
        (0xFFFE, 2, False),
        (0xFFFF, 2, True),
        (0xFFFC, 4, False),
        (0xFFFD, 4, True),
        (0xFFFE, 4, True),
        (0xFFFF, 4, True),
    ],
)
def test_access_that_wraps_past_ffff_always_exits(port: int, size: int, wraps: bool) -> None:
    assert IOBitmap.passthrough_all().intercepts(port, size) is wraps


def test_bitmap_a_is_the_low_half_and_b_the_high_half() -> None:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x7FFF, True)
    assert (bitmap.a[-1], any(bitmap.b)) == (0x80, False)
    bitmap.set_intercept(0x8000, True)
    assert bitmap.b[0] == 1
    assert bitmap.a + bitmap.b == bitmap.to_bytes()
    assert len(bitmap.a) == len(bitmap.b) == PAGE_SIZE


@pytest.mark.parametrize("port", [-1, 0x10000, 0x10060, 1 << 32])
def test_a_port_over_ffff_is_refused(port: int) -> None:
    bitmap = IOBitmap.passthrough_all()
    with pytest.raises(OutOfRange, match="I/O port"):
        bitmap.set_intercept(port, True)
    with pytest.raises(OutOfRange):
        bitmap.set_intercept_of_range(port, 1, True)
    with pytest.raises(OutOfRange):
        bitmap.intercepts(port)
    assert bitmap == IOBitmap.passthrough_all()


@pytest.mark.parametrize(("base", "count"), [(0xFFFF, 2), (0, 0x10001), (0x60, -1)])
def test_a_range_past_the_last_port_is_refused_whole(base: int, count: int) -> None:
    bitmap = IOBitmap.passthrough_all()
    with pytest.raises(OutOfRange):
        bitmap.set_intercept_of_range(base, count, True)
    assert bitmap == IOBitmap.passthrough_all()


@pytest.mark.parametrize("size", [0, 3, 8, -1])
def test_other_access_sizes_are_refused(size: int) -> None:
    with pytest.raises(OutOfRange, match="size"):
        IOBitmap.passthrough_all().intercepts(0x60, size)


@pytest.mark.parametrize("length", [0, 4096, 8191, 8193])
def test_bytes_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(OutOfRange):
        IOBitmap.from_bytes(bytes(length))


def test_a_copy_goes_its_own_way() -> None:
    bitmap = IOBitmap.passthrough_all()
    other = bitmap.copy()
    other.set_intercept(1, True)
    assert not bitmap.intercepts(1)
    assert bitmap != other
    assert bitmap != bitmap.to_bytes()


def test_both_pages_are_laid_out_a_before_b() -> None:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept_of_range(0x7FF0, 0x20, True)
    assert bitmap.pages(0x9000) == [(0x9000, bitmap.a), (0xA000, bitmap.b)]
    with pytest.raises(Misaligned):
        bitmap.phys_addr(0x9001)
    with pytest.raises(OutOfRange):
        bitmap.phys_addr((1 << 52) - PAGE_SIZE)


def test_its_repr_names_the_ports() -> None:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    bitmap.set_intercept_of_range(0x3F8, 8, True)
    assert repr(bitmap) == "<IOBitmap: 9 ports exit: 0x60, 0x3f8-0x3ff>"
