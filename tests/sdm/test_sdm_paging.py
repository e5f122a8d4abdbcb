"""Bits of ordinary paging structures and of the page-fault error code."""

from __future__ import annotations

import pytest

from vmxlab.sdm.paging import PROTECTION_KEY_SHIFT, PROTECTION_KEYS, PageFaultErrorCode, PageFlags
from vmxlab.structures import ept_entry


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("PRESENT", 0),
        ("WRITE", 1),
        ("USER", 2),
        ("ACCESSED", 5),
        ("DIRTY", 6),
        ("LARGE", 7),
        ("EXECUTE_DISABLE", 63),
    ],
)
def test_bits_of_an_entry(name: str, bit: int) -> None:
    """Vol. 3A, tables 4-14 to 4-20."""
    assert PageFlags[name] == 1 << bit


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("PRESENT", 0),
        ("WRITE", 1),
        ("USER", 2),
        ("RESERVED", 3),
        ("FETCH", 4),
        ("PROTECTION_KEY", 5),
        ("SHADOW_STACK", 6),
        ("HLAT", 7),
        ("SGX", 15),
    ],
)
def test_bits_of_the_error_code(name: str, bit: int) -> None:
    """Vol. 3A, figure 4-12."""
    assert PageFaultErrorCode[name] == 1 << bit


def test_protection_key_lies_below_execute_disable() -> None:
    """Vol. 3A, 4.6.2: bits 62:59."""
    assert PROTECTION_KEYS << PROTECTION_KEY_SHIFT == PageFlags.EXECUTE_DISABLE


def test_large_pages_have_the_same_bit_as_in_ept() -> None:
    """Vol. 3C, 29.3.2: bit 7."""
    assert PageFlags.LARGE == ept_entry.LARGE
