"""The oracle's translation agrees with the processor: tables of all entries, rights, modes and accesses.

SDM Vol. 3A, chapter 4; Vol. 3C, 29.3 and Table 28-7. What comes of an access is said by
`vmxlab.oracle.translation` alone; here is only what is asked.
"""

from __future__ import annotations

from itertools import product

import pytest

from vmxlab import EntryControls, SecondaryControls
from vmxlab.oracle.accesses import AccessKind
from vmxlab.sdm.paging import PROTECTION_KEY_SHIFT, PageFlags
from vmxlab.sdm.registers import CR0, CR4, RFLAGS
from vmxlab.structures.ept_entry import ACCESSED, DIRTY, IGNORE_PAT, LARGE, SUPPRESS_VE

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT, EntryControls.LOAD_IA32_EFER)

P, W, U, A, D = (int(PageFlags[name]) for name in ("PRESENT", "WRITE", "USER", "ACCESSED", "DIRTY"))
PS, XD = int(PageFlags.LARGE), int(PageFlags.EXECUTE_DISABLE)
RWX, WB = 0b111, 6 << 3
BEYOND_WIDTH = 1 << 50
KINDS = (AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.READ_MODIFY_WRITE)

EPT_FLAGS = pytest.mark.parametrize("ept_flags", [False, True], ids=["no-ept-flags", "ept-flags"])
PLACES = [(page, level) for page in (3, 2, 1, 0) for level in (3, 2, 1)]
"""Each EPT entry of a probe: of the pages of L2's paging structures (3 to 1), and of the page itself (0)."""
LEVELS = (4, 3, 2, 1)


def ept_bits(level: int, bits: int) -> int:
    return bits | (WB if level == 1 else 0)


def guest_bits(level: int, bits: int) -> int:
    return bits | P | A | (D if level == 1 else 0)


# --- EPT ---------------------------------------------------------------------------------------------------


@EPT_FLAGS
def test_rights_of_every_ept_entry(agreement, ept_flags):
    """Vol. 3C, 29.3.3.1, 29.3.3.2: all combinations of bits 2:0, in each entry, for each kind of access."""
    probes = [
        agreement.Probe(kind).with_ept(page, level, ept_bits(level, rights))
        for kind in KINDS
        for page, level in PLACES
        for rights in range(8)
    ]
    result = agreement.holds(agreement.Setting(ept_flags=ept_flags), probes)
    assert len(result.kinds) == 3


def test_other_bits_of_every_ept_entry(agreement):
    """Vol. 3C, 29.3.2, 29.3.3.1: each other bit of an entry is ignored, or reserved where it is."""
    others = [1 << bit for bit in (*range(3, 7), 7, 10, 11, 50, 52, 57, 58, 60, 62, 63)]
    probes = [
        agreement.Probe().with_ept(page, level, RWX | bit)
        for page, level in PLACES
        for bit in others
        if not (level == 3 and bit == LARGE)  # a page of 1 GiB at an address where there is no memory
    ]
    agreement.holds(agreement.Setting(), probes)


def test_memory_types_and_large_pages_of_ept(agreement):
    """Vol. 3C, 29.3.3.1: types 2, 3 and 7 are reserved, in a page of any size."""
    probes = [
        agreement.Probe(kind).with_ept(page, level, RWX | memory_type << 3 | more)
        for kind in KINDS
        for page in (3, 0)
        for level, large in ((1, 0), (2, LARGE))
        for memory_type in range(8)
        for more in (large, large | IGNORE_PAT)
    ]
    agreement.holds(agreement.Setting(), probes)


@EPT_FLAGS
def test_flags_of_ept(agreement, ept_flags):
    """Vol. 3C, 29.3.5: which accesses set which flags, and that a flag that is set stays."""
    probes = [
        agreement.Probe(kind).with_ept(page, level, ept_bits(level, RWX | flags))
        for kind in KINDS
        for page, level in PLACES
        for flags in (0, ACCESSED, DIRTY, ACCESSED | DIRTY, SUPPRESS_VE)
    ]
    result = agreement.holds(agreement.Setting(ept_flags=ept_flags), probes, flags=True)
    assert result.kinds == {"Translated": len(probes)}


def test_rights_of_two_ept_entries_together(agreement):
    """Vol. 3C, Table 28-7: bits 5:3 are those of all entries of the page together."""
    legal = (0b001, 0b011, 0b100, 0b101, 0b111)
    probes = [
        agreement.Probe(kind).with_ept(0, upper, above).with_ept(0, 1, WB | below)
        for kind, upper, above, below in product(KINDS, (3, 2), legal, legal)
    ]
    agreement.holds(agreement.Setting(), probes)


# --- L2's own paging ---------------------------------------------------------------------------------------

SETTINGS = {
    "user": {"user": True},
    "user-smap-smep": {"user": True, "cr4": CR4.SMAP | CR4.SMEP},
    "supervisor": {},
    "supervisor-without-wp": {"cr0": 0},
    "smep": {"cr4": CR4.SMEP},
    "smap": {"cr4": CR4.SMAP},
    "smap-without-wp": {"cr4": CR4.SMAP, "cr0": 0},
    "smap-with-ac": {"cr4": CR4.SMAP, "rflags": RFLAGS.AC},
    "no-nxe": {"efer": 0},
    "no-nxe-smep": {"efer": 0, "cr4": CR4.SMEP},
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_rights_of_every_entry_of_l2(agreement, setting):
    """Vol. 3A, 4.6.1, 4.7: R/W, U/S and XD in each entry, and the error code."""
    probes = [
        agreement.Probe(kind).with_guest(level, guest_bits(level, rights))
        for kind in KINDS
        for level in LEVELS
        for rights in (0, W, U, W | U, W | XD, W | U | XD)
    ]
    agreement.holds(agreement.Setting(**setting), probes)


@pytest.mark.parametrize("setting", [SETTINGS["user"], SETTINGS["supervisor"], SETTINGS["no-nxe"]])
def test_entries_of_l2_that_translate_nothing(agreement, setting):
    """Vol. 3A, 4.5.4, 4.7: not present, and reserved bits, in each entry and for pages of each size."""
    bad = [
        *((level, bits) for level in LEVELS for bits in (0, W | U | A, BEYOND_WIDTH | XD)),
        *((level, P | W | U | A | BEYOND_WIDTH) for level in LEVELS),
        *((level, P | A | BEYOND_WIDTH | XD) for level in LEVELS),
        (4, P | W | U | A | PS),
        *((3, P | W | U | A | D | PS | 1 << bit) for bit in (12, 13, 20, 29)),
        *((2, P | W | U | A | D | PS | 1 << bit) for bit in (12, 13, 20)),
        *((level, P | W | U | A | D | 1 << bit) for level in LEVELS for bit in (8, 9, 11, 52, 58)),
    ]
    probes = [agreement.Probe(kind).with_guest(level, bits) for kind in KINDS for level, bits in bad]
    result = agreement.holds(agreement.Setting(**setting), probes)
    assert result.kinds["PageFault"] > len(probes) / 3


@EPT_FLAGS
@pytest.mark.parametrize("user", [False, True], ids=["supervisor", "user"])
def test_flags_of_l2(agreement, user, ept_flags):
    """Vol. 3A, 4.8: which accesses set which flags in L2's entries, for pages of each size."""
    large = {1: 0, 2: PS, 3: PS}
    probes = [
        agreement.Probe(kind, tuple(P | W | U | bits for bits in flags)).with_guest(
            page, P | W | U | large[page] | flags[3]
        )
        for kind in KINDS[:3]
        for page in ((1, 2, 3) if agreement.page_1g else (1, 2))
        for flags in product((0, A), (0, A), (0, A), (0, D, A | D))
    ]
    result = agreement.holds(agreement.Setting(user=user, ept_flags=ept_flags), probes, flags=True)
    assert result.kinds["Translated"] == len(probes)


PKRU = 0b11_10_01_00
"""Key 0: all allowed, 1: no access, 2: no writes, 3: both forbidden."""

USERS = pytest.mark.parametrize("user", [False, True], ids=["supervisor", "user"])
WITH_WP = pytest.mark.parametrize("cr0", [0, CR0.WP], ids=["without-wp", "wp"])


def with_keys(agreement, mode: int, kinds=KINDS):
    """Pages whose address is a user-mode or a supervisor-mode one, with each of four keys."""
    return [
        agreement.Probe(kind).with_guest(1, P | W | A | D | mode | rights | key << PROTECTION_KEY_SHIFT)
        for kind in kinds
        for rights in (0, XD)
        for key in range(4)
    ]


@USERS
@WITH_WP
def test_protection_keys(agreement, user, cr0):
    """Vol. 3A, 4.6.2, 4.7: user-mode accesses to user-mode addresses; fetches; supervisor-mode addresses."""
    setting = agreement.Setting(user=user, cr0=cr0, cr4=CR4.PKE, pkru=PKRU)
    # A supervisor's writes with CR0.WP are the next test's.
    kinds = KINDS if user or not cr0 else [kind for kind in KINDS if not kind & AccessKind.WRITE]
    agreement.holds(setting, with_keys(agreement, U if user else 0, kinds))
    agreement.holds(setting, with_keys(agreement, 0 if user else U, [AccessKind.FETCH]))


@pytest.mark.vmx_known_difference("protection-keys-of-supervisor-mode-addresses")
def test_protection_keys_of_pkru_do_not_bind_writes_to_supervisor_mode_addresses(agreement):
    """Vol. 3A, 4.6.2: PKRU is for user-mode addresses, whatever CR0.WP is."""
    setting = agreement.Setting(cr0=CR0.WP, cr4=CR4.PKE, pkru=PKRU)
    agreement.holds(setting, with_keys(agreement, 0, [AccessKind.WRITE, AccessKind.READ_MODIFY_WRITE]))


@pytest.mark.vmx_known_difference("protection-keys-by-privilege-level")
@WITH_WP
def test_protection_keys_of_user_mode_addresses_bind_supervisors_too(agreement, cr0):
    """Vol. 3A, 4.6.2: PKRU is for data accesses to user-mode addresses, at whatever CPL."""
    setting = agreement.Setting(cr0=cr0, cr4=CR4.PKE, pkru=PKRU)
    agreement.holds(setting, with_keys(agreement, U, [AccessKind.READ, AccessKind.WRITE]))


@pytest.mark.vmx_known_difference("protection-keys-by-privilege-level")
def test_protection_keys_of_supervisor_mode_addresses_are_not_those_of_pkru(agreement):
    """Vol. 3A, 4.7: the PK flag of a page fault is of a user-mode address."""
    setting = agreement.Setting(user=True, cr4=CR4.PKE, pkru=PKRU)
    agreement.holds(setting, with_keys(agreement, 0, [AccessKind.READ, AccessKind.WRITE]))


# --- both ------------------------------------------------------------------------------------------------


@EPT_FLAGS
def test_what_comes_first_where_both_levels_fail(agreement, ept_flags):
    """Vol. 3C, 29.3.3.3: the walk goes on entry by entry, each first by EPT, and ends at what it meets."""
    of_l2 = [
        (4, 0),
        (3, 0),
        (2, 0),
        (1, 0),
        (3, P | A | 1 << 50),
        (1, P | A | 1 << 50),
        (1, P | A),
        (2, P | A),
    ]
    probes = [
        agreement.Probe(kind).with_guest(guest_level, bits).with_ept(page, 1, WB | rights)
        for kind in (AccessKind.WRITE, AccessKind.FETCH)
        for guest_level, bits in of_l2
        for page in (3, 2, 1, 0)
        for rights in (0, 0b001, 0b010)
    ]
    result = agreement.holds(agreement.Setting(user=True, ept_flags=ept_flags), probes, flags=True)
    assert len(result.kinds) >= 3


@EPT_FLAGS
def test_advanced_information(agreement, ept_flags):
    """Vol. 3C, Table 28-7: bits 11:9 say what L2's own paging makes of the linear address."""
    agreement.vmxlab.require_ept("advanced_exit_information")
    probes = [
        agreement.Probe(AccessKind.READ).with_guest(level, guest_bits(level, rights)).with_ept(0, 1, 0)
        for level in LEVELS
        for rights in (0, W, U, W | U, W | XD, U | XD)
    ]
    agreement.holds(agreement.Setting(ept_flags=ept_flags), probes)
