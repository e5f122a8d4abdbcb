"""VirtualizationExceptionInformation: the layout of SDM Vol. 3C, Table 26-1."""

from __future__ import annotations

import pytest

from vmxlab.errors import OutOfRange
from vmxlab.structures import VirtualizationExceptionInformation as Information

WRITTEN = Information(
    exit_reason=48,
    in_use=0xFFFF_FFFF,
    raw_qualification=0x182,
    guest_linear_address=0x1122_3344_5566_7788,
    guest_physical_address=0x0000_0012_3456_7000,
    eptp_index=0xABCD,
)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, "30000000"),
        (4, "ffffffff"),
        (8, "8201000000000000"),
        (16, "8877665544332211"),
        (24, "0070563412000000"),
        (32, "cdab"),
    ],
)
def test_each_value_lies_at_its_offset(offset, content):
    data = WRITTEN.to_bytes()
    assert data[offset : offset + len(content) // 2].hex() == content
    assert len(data) == 4096
    assert not any(data[34:])


def test_bytes_give_the_same_values_back():
    assert Information.from_bytes(WRITTEN.to_bytes()) == WRITTEN
    assert Information.from_bytes(WRITTEN.to_bytes()[:34]) == WRITTEN


def test_the_qualification_is_that_of_an_ept_violation():
    assert WRITTEN.qualification.write
    assert not WRITTEN.qualification.read
    assert WRITTEN.qualification.translated


def test_it_is_written_where_reason_and_mark_are_there():
    assert WRITTEN.is_written
    assert not Information().is_written
    assert not Information(exit_reason=48).is_written
    assert not Information(exit_reason=48, in_use=1).is_written


def test_what_does_not_fit_is_refused():
    with pytest.raises(OutOfRange, match="eptp index"):
        Information(eptp_index=0x1_0000)
    with pytest.raises(OutOfRange):
        Information(guest_linear_address=-1)
    with pytest.raises(OutOfRange):
        Information.from_bytes(bytes(33))
    with pytest.raises(OutOfRange):
        Information.from_bytes(bytes(4097))
