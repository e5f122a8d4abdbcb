"""Ordinary paging: bits of its structures, and the error code of a page fault.

SDM Vol. 3A, 4.3 to 4.7. (The bits of EPT entries are in `vmxlab.structures.ept_entry`.)
"""

from __future__ import annotations

from vmxlab.sdm.flags import BitFlags


class PageFlags(BitFlags):
    """Bits of an entry, of whatever level and paging mode has them (Vol. 3A, tables 4-4 to 4-20)."""

    PRESENT = 1 << 0
    WRITE = 1 << 1  # R/W
    USER = 1 << 2  # U/S
    PWT = 1 << 3
    PCD = 1 << 4
    ACCESSED = 1 << 5
    DIRTY = 1 << 6  # in the entry that maps a page
    LARGE = 1 << 7  # PS: the entry of level 2 or 3 maps a page
    GLOBAL = 1 << 8
    HLAT_RESTART = 1 << 11
    EXECUTE_DISABLE = 1 << 63


PROTECTION_KEY_SHIFT = 59
"""Bits 62:59 of the entry that maps a page, with 4-level and 5-level paging (Vol. 3A, 4.6.2)."""

PROTECTION_KEYS = 16
"""Each has two bits in PKRU and in IA32_PKRS: access-disable in bit 2i, write-disable in bit 2i+1."""


class PageFaultErrorCode(BitFlags):
    """The error code of #PF (Vol. 3A, 4.7)."""

    PRESENT = 1 << 0  # P: 0 if an entry was not present
    WRITE = 1 << 1  # W/R
    USER = 1 << 2  # U/S: the access was a user-mode one
    RESERVED = 1 << 3  # RSVD
    FETCH = 1 << 4  # I/D
    PROTECTION_KEY = 1 << 5  # PK
    SHADOW_STACK = 1 << 6  # SS
    HLAT = 1 << 7
    SGX = 1 << 15
