"""MSR areas, with the manual's table written out as bytes."""

from __future__ import annotations

import pytest

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.structures import MsrArea, MsrEntry


def test_an_entry_is_index_reserved_bits_and_value() -> None:
    """SDM Vol. 3C, table 25-15: bits 31:0, 63:32 and 127:64."""
    entry = MsrEntry(0xC000_0081, 0x1122_3344_5566_7788, reserved=0x99AA_BBCC)
    assert entry.to_bytes() == bytes.fromhex("810000c0 ccbbaa99 8877665544332211")


def test_an_area_keeps_its_order() -> None:
    entries = (MsrEntry(2, 20), MsrEntry(1, 10), MsrEntry(2, 30))
    area = MsrArea([(2, 20), MsrEntry(1, 10), (2, 30)])
    assert len(area) == 3
    assert area.to_bytes() == b"".join(entry.to_bytes() for entry in entries)
    assert area.values == (20, 10, 30)
    assert [entry.msr for entry in area] == [2, 1, 2]
    assert MsrArea.from_bytes(area.to_bytes()) == area
    assert hash(MsrArea(area.entries)) == hash(area)


def test_an_area_to_be_filled_names_its_msrs() -> None:
    assert MsrArea.of_msrs([5, 7]) == MsrArea([(5, 0), (7, 0)])
    assert MsrArea().to_bytes() == b""


def test_reserved_bits_survive() -> None:
    data = MsrEntry(1, 2, reserved=3).to_bytes()
    assert MsrArea.from_bytes(data).entries == (MsrEntry(1, 2, 3),)


@pytest.mark.parametrize(
    "wrong",
    [{"msr": 1 << 32}, {"msr": -1}, {"msr": 1, "value": 1 << 64}, {"msr": 1, "reserved": 1 << 32}],
    ids=["msr", "negative", "value", "reserved"],
)
def test_what_an_entry_can_not_hold_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(OutOfRange):
        MsrEntry(**wrong)


def test_half_an_entry_is_no_area() -> None:
    with pytest.raises(OutOfRange):
        MsrArea.from_bytes(bytes(24))


def test_where_an_area_may_lie() -> None:
    """SDM Vol. 3C, 27.2.1.2: 16-byte aligned, and its last byte within the physical addresses."""
    area = MsrArea.of_msrs([1, 2])
    assert area.phys_addr((1 << 40) - 32, width=40) == (1 << 40) - 32
    with pytest.raises(OutOfRange):
        area.phys_addr((1 << 40) - 16, width=40)
    with pytest.raises(Misaligned):
        area.phys_addr(8)


def test_an_area_shows_its_first_entries() -> None:
    assert repr(MsrArea([(0x10, 1)])) == "<MsrArea of 1: 0x10=0x1>"
    assert repr(MsrArea.of_msrs(range(6))).endswith("0x3=0x0, ...>")
