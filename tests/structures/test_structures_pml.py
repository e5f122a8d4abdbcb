"""PageModificationLog: what was logged, from the PML index."""

from __future__ import annotations

import pytest

from vmxlab.errors import OutOfRange
from vmxlab.structures import PageModificationLog
from vmxlab.structures.pml import FULL, LAST_INDEX

LOG = PageModificationLog(tuple(0x1000 * n for n in range(512)))


def test_a_log_is_empty_at_first():
    assert PageModificationLog().to_bytes() == bytes(4096)
    assert PageModificationLog().logged(LAST_INDEX) == ()


def test_entries_are_in_the_order_of_their_addresses():
    data = LOG.to_bytes()
    assert data[8:16] == (0x1000).to_bytes(8, "little")
    assert PageModificationLog.from_bytes(data) == LOG


@pytest.mark.parametrize(
    ("index", "first", "numbers"),
    [
        (511, 511, []),
        (510, 511, [511]),
        (508, 511, [511, 510, 509]),
        (0, 2, [2, 1]),
        (FULL, 2, [2, 1, 0]),
        (FULL, 0, [0]),
        (FULL, 511, list(range(511, -1, -1))),
    ],
)
def test_what_was_logged_is_read_downward(index, first, numbers):
    assert LOG.logged(index, first) == tuple(0x1000 * n for n in numbers)


@pytest.mark.parametrize(
    ("index", "first"), [(512, 511), (5, 4), (0xFFFE, 511), (0, 512), (0, FULL), (-1, 3)]
)
def test_an_index_that_can_not_be_is_refused(index, first):
    with pytest.raises(OutOfRange):
        LOG.logged(index, first)


def test_what_is_no_log_is_refused():
    with pytest.raises(OutOfRange):
        PageModificationLog((0,) * 511)
    with pytest.raises(OutOfRange):
        PageModificationLog((1 << 64, *(0,) * 511))
    with pytest.raises(OutOfRange):
        PageModificationLog.from_bytes(bytes(8))
