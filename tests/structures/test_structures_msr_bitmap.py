"""The MSR bitmap against an independent model: a bytearray with the offsets of the manual written out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.structures import PAGE_SIZE, MsrBitmap

properties = settings(derandomize=True, max_examples=40, deadline=None)

# SDM Vol. 3C, 25.6.9: (first MSR, is a write, offset of its KiB)
QUADRANTS = [
    (0x0000_0000, False, 0x000),
    (0xC000_0000, False, 0x400),
    (0x0000_0000, True, 0x800),
    (0xC000_0000, True, 0xC00),
]
OUTSIDE = [0x2000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF]
quadrants = pytest.mark.parametrize(
    ("first", "write", "offset"), QUADRANTS, ids=["read-low", "read-high", "write-low", "write-high"]
)


def set_one(bitmap: MsrBitmap, msr: int, write: bool, intercept: bool) -> None:
    (bitmap.set_write_intercept if write else bitmap.set_read_intercept)(msr, intercept)


def set_range(bitmap: MsrBitmap, base: int, count: int, write: bool, intercept: bool) -> None:
    change = bitmap.set_write_intercept_of_range if write else bitmap.set_read_intercept_of_range
    change(base, count, intercept)


@quadrants
def test_every_msr_has_its_own_bit(first: int, write: bool, offset: int) -> None:
    bitmap = MsrBitmap.passthrough_all()
    for number in range(0x2000):
        set_one(bitmap, first + number, write, True)
        data = bytearray(PAGE_SIZE)
        data[offset + number // 8] = 1 << number % 8
        assert bitmap.to_bytes() == data, hex(first + number)
        assert bitmap.intercepts(first + number, write=write)
        assert not bitmap.intercepts(first + number, write=not write)
        set_one(bitmap, first + number, write, False)
    assert bitmap == MsrBitmap.passthrough_all()


@quadrants
def test_every_msr_can_be_let_through_alone(first: int, write: bool, offset: int) -> None:
    bitmap = MsrBitmap.intercept_all()
    for number in range(0x2000):
        set_one(bitmap, first + number, write, False)
        assert not bitmap.intercepts(first + number, write=write)
        set_one(bitmap, first + number, write, True)
    assert bitmap == MsrBitmap.intercept_all()


@quadrants
@pytest.mark.parametrize(
    ("start", "count"), [(0, 0x2000), (0, 1), (0x1FFF, 1), (1, 0x1FFF), (0x80, 0x15), (7, 2), (0x100, 0)]
)
def test_a_range_sets_exactly_its_msrs(first: int, write: bool, offset: int, start: int, count: int) -> None:
    bitmap = MsrBitmap.passthrough_all()
    set_range(bitmap, first + start, count, write, True)
    data = bytearray(PAGE_SIZE)
    for number in range(start, start + count):
        data[offset + number // 8] |= 1 << number % 8
    assert bitmap.to_bytes() == data
    set_range(bitmap, first + start, count, write, False)
    assert bitmap == MsrBitmap.passthrough_all()


@given(
    st.lists(
        st.tuples(st.sampled_from(QUADRANTS), st.integers(0, 0x1FFF), st.integers(0, 0x2000), st.booleans()),
        max_size=8,
    )
)
@properties
def test_any_ranges_in_any_order_follow_the_model(
    changes: list[tuple[tuple[int, bool, int], int, int, bool]],
) -> None:
    bitmap = MsrBitmap.passthrough_all()
    exits: dict[bool, set[int]] = {False: set(), True: set()}
    for (first, write, _), start, count, intercept in changes:
        count = min(count, 0x2000 - start)
        set_range(bitmap, first + start, count, write, intercept)
        touched = set(range(first + start, first + start + count))
        exits[write] = exits[write] | touched if intercept else exits[write] - touched
    for write in (False, True):
        assert {msr for run in bitmap.intercepted_msrs(write) for msr in run} == exits[write]
    assert MsrBitmap.from_bytes(bitmap.to_bytes()) == bitmap


@pytest.mark.parametrize("msr", OUTSIDE)
@pytest.mark.parametrize("write", [False, True])
def test_an_msr_outside_both_ranges_always_exits(msr: int, write: bool) -> None:
    assert MsrBitmap.passthrough_all().intercepts(msr, write=write)


@pytest.mark.parametrize("msr", [*OUTSIDE, -1, 1 << 32])
@pytest.mark.parametrize("intercept", [False, True])
def test_setting_an_msr_outside_both_ranges_is_a_clear_error(msr: int, intercept: bool) -> None:
    bitmap = MsrBitmap.passthrough_all()
    for change in (bitmap.set_read_intercept, bitmap.set_write_intercept):
        with pytest.raises(OutOfRange, match="always exits") as caught:
            change(msr, intercept)
        assert caught.value.value == msr
    assert bitmap == MsrBitmap.passthrough_all()


@pytest.mark.parametrize(
    ("base", "count"),
    [(0x1FFF, 2), (0, 0x2001), (0, 0xC000_2000), (0xC000_1FFF, 2), (0xBFFF_FFFF, 2), (0x2000, 1), (0x10, -1)],
)
@pytest.mark.parametrize("write", [False, True])
def test_a_range_that_leaves_its_half_is_refused_whole(base: int, count: int, write: bool) -> None:
    bitmap = MsrBitmap.passthrough_all()
    with pytest.raises(OutOfRange):
        set_range(bitmap, base, count, write, True)
    assert bitmap == MsrBitmap.passthrough_all()


@pytest.mark.parametrize("msr", [-1, 1 << 32])
def test_what_ecx_cannot_hold_is_refused(msr: int) -> None:
    with pytest.raises(OutOfRange):
        MsrBitmap.passthrough_all().intercepts(msr)


def test_the_four_quadrants_stand_where_the_manual_has_them() -> None:
    bitmap = MsrBitmap.passthrough_all()
    bitmap.set_read_intercept(0x10, True)
    bitmap.set_read_intercept(0xC000_0080, True)
    bitmap.set_write_intercept(0x1B, True)
    bitmap.set_write_intercept_of_range(0xC000_0100, 3, True)
    data = bitmap.to_bytes()
    assert data == bitmap.read_low + bitmap.read_high + bitmap.write_low + bitmap.write_high
    assert [n for n in range(PAGE_SIZE) if data[n]] == [0x002, 0x410, 0x803, 0xC20]
    assert repr(bitmap) == (
        "<MsrBitmap: reads exit: 0x10, 0xc0000080; writes exit: 0x1b, 0xc0000100-0xc0000102>"
    )


def test_it_is_one_page() -> None:
    bitmap = MsrBitmap.intercept_all()
    assert bitmap.pages(0x3000) == [(0x3000, b"\xff" * PAGE_SIZE)]
    with pytest.raises(Misaligned):
        bitmap.phys_addr(0x3800)
    with pytest.raises(OutOfRange):
        MsrBitmap.from_bytes(bytes(4095))
    other = bitmap.copy()
    other.set_read_intercept(0, False)
    assert bitmap.intercepts(0)
