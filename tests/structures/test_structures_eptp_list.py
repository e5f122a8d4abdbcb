"""EptpList: 512 EPTPs in a page, any values."""

from __future__ import annotations

import pytest

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.structures import EptpList, EPTPointer


def test_an_empty_list_is_a_page_of_zeros():
    assert EptpList().to_bytes() == bytes(4096)
    assert len(EptpList()) == 512


@pytest.mark.parametrize("index", [0, 1, 255, 511])
def test_an_entry_lies_at_8_times_its_index(index):
    eptps = EptpList()
    eptps.set(index, EPTPointer(address=0x1234_5000, accessed_dirty=True))
    data = eptps.to_bytes()
    assert data[8 * index : 8 * index + 8] == (0x1234_505E).to_bytes(8, "little")
    assert not any(data[: 8 * index] + data[8 * index + 8 :])
    assert eptps[index] == EPTPointer(address=0x1234_5000, accessed_dirty=True)


def test_the_first_entries_may_be_given_at_once():
    eptps = EptpList([EPTPointer(address=0x1000), 7])
    assert (eptps[0].address, eptps[1].bits, eptps[2].bits) == (0x1000, 7, 0)


@pytest.mark.parametrize("bits", [0, (1 << 64) - 1, 0xFFF, 1 << 63])
def test_any_64_bit_value_may_be_in_it(bits):
    assert EptpList([bits])[0].bits == bits


def test_bytes_give_the_same_list_back():
    eptps = EptpList(range(0, 512 * 0x1111, 0x1111))
    assert EptpList.from_bytes(eptps.to_bytes()) == eptps
    assert EptpList.from_bytes(eptps.to_bytes()) != EptpList()


def test_a_copy_is_its_own():
    eptps = EptpList([1])
    copy = eptps.copy()
    copy.set(0, 2)
    assert (eptps[0].bits, copy[0].bits) == (1, 2)


@pytest.mark.parametrize("index", [-1, 512, 1 << 32])
def test_an_index_beyond_the_list_is_refused(index):
    with pytest.raises(OutOfRange, match="512 entries"):
        EptpList().set(index, 0)
    with pytest.raises(OutOfRange):
        EptpList()[index]


def test_what_does_not_fit_is_refused():
    with pytest.raises(OutOfRange):
        EptpList([0] * 513)
    with pytest.raises(OutOfRange):
        EptpList([1 << 64])
    with pytest.raises(OutOfRange):
        EptpList.from_bytes(bytes(4095))


def test_the_page_lies_where_the_field_can_point():
    assert EptpList([5]).pages(0x3000) == [(0x3000, EptpList([5]).to_bytes())]
    with pytest.raises(Misaligned):
        EptpList().pages(0x3008)


def test_it_says_how_many_entries_it_has():
    assert repr(EptpList([1, 0, 3])) == "<EptpList, 2 of 512 entries set>"
