"""VMXON and VMCS regions: the first words and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import Misaligned, OutOfRange, VmxlabError
from vmxlab.structures import PAGE_SIZE, VmxRegion

properties = settings(derandomize=True, max_examples=50, deadline=None)


@pytest.mark.parametrize("revision_id", [0, 1, 4, 0x2B, 0x7FFF_FFFF])
@pytest.mark.parametrize("shadow", [False, True])
def test_the_first_word_is_the_revision_id_with_the_shadow_indicator_in_bit_31(
    revision_id: int, shadow: bool
) -> None:
    data = VmxRegion(revision_id, shadow).to_bytes()
    assert len(data) == PAGE_SIZE
    word = data[0] | data[1] << 8 | data[2] << 16 | data[3] << 24
    assert word == revision_id + (2**31 if shadow else 0)
    assert data[4:] == bytes(PAGE_SIZE - 4)


@pytest.mark.parametrize("revision_id", [0x8000_0000, 0xFFFF_FFFF, 1 << 32, -1])
def test_a_revision_id_over_31_bits_is_refused(revision_id: int) -> None:
    with pytest.raises(OutOfRange, match="revision identifier") as caught:
        VmxRegion(revision_id)
    assert f"{revision_id:#x}" in str(caught.value)
    assert isinstance(caught.value, VmxlabError)
    assert isinstance(caught.value, ValueError)


@given(st.binary(max_size=64), st.integers(0, PAGE_SIZE - 64))
@properties
def test_a_region_read_back_keeps_every_byte(some: bytes, where: int) -> None:
    data = (bytes(where) + some).ljust(PAGE_SIZE, b"\0")
    region = VmxRegion.from_bytes(data)
    assert region.to_bytes() == data
    assert VmxRegion.from_bytes(region.to_bytes()) == region


def test_a_vmx_abort_is_seen_in_the_second_word() -> None:
    data = bytearray(VmxRegion(4).to_bytes())
    data[4] = 2
    assert VmxRegion.from_bytes(bytes(data)).abort_indicator == 2


@pytest.mark.parametrize("length", [0, 1, 4095, 4097])
def test_anything_but_a_page_is_refused(length: int) -> None:
    with pytest.raises(OutOfRange):
        VmxRegion.from_bytes(bytes(length))


def test_more_data_than_the_page_holds_is_refused() -> None:
    assert len(VmxRegion(0, data=b"\1" * (PAGE_SIZE - 8)).to_bytes()) == PAGE_SIZE
    with pytest.raises(OutOfRange):
        VmxRegion(0, data=b"\1" * (PAGE_SIZE - 7))
    with pytest.raises(OutOfRange):
        VmxRegion(0, abort_indicator=1 << 32)


def test_a_region_lies_on_one_page_below_52_bits() -> None:
    region = VmxRegion(4)
    assert region.pages(0x7000) == [(0x7000, region.to_bytes())]
    with pytest.raises(Misaligned):
        region.pages(0x7004)
    for base in (-0x1000, 1 << 52):
        with pytest.raises(OutOfRange):
            region.phys_addr(base)
