"""One entry of the EPT paging structures: its bits, and when it is misconfigured.

SDM Vol. 3C, 29.3.2 and 29.3.3.1.

An entry is a plain 64-bit int here, as tables have thousands of them. Levels are counted from the bottom: 1
is an EPT PTE, 2 a PDE, 3 a PDPTE, 4 a PML4E; an entry of level n controls 2**(12 + 9 * (n - 1)) bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from vmxlab.errors import CaseError
from vmxlab.sdm.registers import MemoryType
from vmxlab.structures.capability_msrs import EptVpidCap, memory_type
from vmxlab.structures.checks import MAX_PHYSICAL_ADDRESS_WIDTH, BrokenRule, require_bits

ENTRIES = 512
"""Entries of a table, 8 bytes each."""

LEVEL_NAMES = {4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}

READ = 1 << 0
WRITE = 1 << 1
EXECUTE = 1 << 2  # of supervisor-mode addresses only, with mode-based execute control
MEMORY_TYPE_SHIFT = 3
MEMORY_TYPE = 7 << MEMORY_TYPE_SHIFT
IGNORE_PAT = 1 << 6
LARGE = 1 << 7  # maps a page: in a PDPTE 1 GiB, in a PDE 2 MiB; reserved in a PML4E, ignored in a PTE
ACCESSED = 1 << 8
DIRTY = 1 << 9
USER_EXECUTE = 1 << 10  # ignored without mode-based execute control
VERIFY_GUEST_PAGING = 1 << 57
PAGING_WRITE = 1 << 58
SUPERVISOR_SHADOW_STACK = 1 << 60
SUB_PAGE_WRITE = 1 << 61  # in a PTE only
SUPPRESS_VE = 1 << 63

ADDRESS = (1 << MAX_PHYSICAL_ADDRESS_WIDTH) - (1 << 12)
"""Bits 51:12, where an address stands in every kind of entry."""

REFERENCE = READ | WRITE | EXECUTE | USER_EXECUTE
"""Bits of an entry that only leads to a table: all rights, so that the entry of the page decides."""

ATTRIBUTE_WORDS = (
    (IGNORE_PAT, "ignore-pat"),
    (ACCESSED, "accessed"),
    (DIRTY, "dirty"),
    (VERIFY_GUEST_PAGING, "verify-guest-paging"),
    (PAGING_WRITE, "paging-write"),
    (SUPERVISOR_SHADOW_STACK, "supervisor-shadow-stack"),
    (SUB_PAGE_WRITE, "sub-page-write"),
    (SUPPRESS_VE, "suppress-ve"),
)
"""The bits that are neither rights nor memory type, in words."""

_RIGHTS = READ | WRITE | EXECUTE
_MISCONFIGURATION = "SDM Vol. 3C, 29.3.3.1"


class PageSize(IntEnum):
    """Sizes in bytes of the pages that EPT can map."""

    SIZE_4K = 1 << 12
    SIZE_2M = 1 << 21
    SIZE_1G = 1 << 30

    @property
    def level(self) -> int:
        """The level of the entry that maps such a page: 1, 2 or 3."""
        return (self.bit_length() - 13) // 9 + 1

    @property
    def label(self) -> str:
        """ "4K", "2M" or "1G"."""
        return self.name.removeprefix("SIZE_")


def shift_of(level: int) -> int:
    """The lowest bit of a guest-physical address that selects an entry of this level: 12, 21, 30, 39."""
    return 12 + 9 * (level - 1)


def is_page(entry: int, level: int) -> bool:
    """Whether such an entry maps a page rather than lead to a table (it may be not present all the same)."""
    return level == 1 or (level < 4 and bool(entry & LARGE))


def is_present(entry: int, mode_based_execute: bool = False) -> bool:
    """Whether the processor uses the entry: any of bits 2:0, with mode-based execute control bit 10 too."""
    return bool(entry & (_RIGHTS | USER_EXECUTE if mode_based_execute else _RIGHTS))


def change_bits(
    level: int,
    *,
    read: bool | None = None,
    write: bool | None = None,
    execute: bool | None = None,
    user_execute: bool | None = None,
    memory_type: int | None = None,
    ignore_pat: bool | None = None,
    accessed: bool | None = None,
    dirty: bool | None = None,
    suppress_ve: bool | None = None,
    supervisor_shadow_stack: bool | None = None,
    paging_write: bool | None = None,
    verify_guest_paging: bool | None = None,
    sub_page_write: bool | None = None,
) -> tuple[int, int]:
    """The bits (to set, to clear) that give an entry of this level these attributes; None leaves it be.

    `user_execute` follows `execute` where it is None. Any of the eight memory types may be asked for, also
    the reserved 2, 3 and 7. OutOfRange for a wider one; CaseError for sub-page write permissions of a large
    page.
    """
    if sub_page_write and level != 1:
        raise CaseError(
            "sub-page write permissions (bit 61) exist only for pages of 4 KiB (SDM Vol. 3C, 29.3.2)"
        )
    to_set = to_clear = 0
    for wanted, bit in (
        (read, READ),
        (write, WRITE),
        (execute, EXECUTE),
        (execute if user_execute is None else user_execute, USER_EXECUTE),
        (ignore_pat, IGNORE_PAT),
        (accessed, ACCESSED),
        (dirty, DIRTY),
        (suppress_ve, SUPPRESS_VE),
        (supervisor_shadow_stack, SUPERVISOR_SHADOW_STACK),
        (paging_write, PAGING_WRITE),
        (verify_guest_paging, VERIFY_GUEST_PAGING),
        (sub_page_write, SUB_PAGE_WRITE),
    ):
        if wanted is not None:
            to_set |= bit if wanted else 0
            to_clear |= 0 if wanted else bit
    if memory_type is not None:
        to_clear |= MEMORY_TYPE
        to_set |= require_bits("EPT memory type", memory_type, 3) << MEMORY_TYPE_SHIFT
    return to_set, to_clear


def describe_bits(entry: int) -> str:
    """The attributes of an entry that maps a page, as short text: "rwx WB" or "r-- UC ignore-pat dirty"."""
    words = [describe_rights(entry)]
    kind = memory_type((entry & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT)
    words.append(kind.name if isinstance(kind, MemoryType) else f"type{kind}")
    words += [word for bit, word in ATTRIBUTE_WORDS if entry & bit]
    return " ".join(words)


def describe_rights(entry: int) -> str:
    """Bits 2:0 as "rwx"; bit 10 only where it differs from bit 2, as "+ux" or "-ux"."""
    rights = "".join(
        letter if entry & bit else "-" for letter, bit in (("r", READ), ("w", WRITE), ("x", EXECUTE))
    )
    if bool(entry & USER_EXECUTE) != bool(entry & EXECUTE):
        rights += " +ux" if entry & USER_EXECUTE else " -ux"
    return rights


@dataclass(frozen=True, slots=True)
class EptFault:
    """A misconfigured entry: the processor exits with EPT misconfiguration where a translation meets it.

    `gpa` is the first guest-physical address it controls, `level` 4 to 1, `entry` its 64-bit value (without
    the address in an entry that leads to a table of these structures), `rule` what it breaks.
    """

    gpa: int
    level: int
    entry: int
    rule: BrokenRule

    def __str__(self) -> str:
        """Which entry and what is wrong with it."""
        return f"EPT {LEVEL_NAMES[self.level]} {self.entry:#x} of {self.gpa:#x}: {self.rule}"


def misconfigurations(
    entry: int,
    level: int,
    capabilities: EptVpidCap | None = None,
    *,
    physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH,
    mode_based_execute: bool = False,
) -> Iterator[BrokenRule]:
    """The rules of 29.3.3.1 that an entry breaks; none for an entry that is not present and grants nothing.

    Without `capabilities` only those that no processor allows.
    """
    if not entry & READ:
        if entry & WRITE:
            yield BrokenRule("writes are allowed (bit 1) but reads are not (bit 0)", _MISCONFIGURATION)
        fetch = EXECUTE | (USER_EXECUTE if mode_based_execute else 0)
        if entry & fetch and capabilities is not None and not capabilities.execute_only:
            yield _lacking("instruction fetches are allowed but reads are not (bit 0)", "execute_only")
    if not is_present(entry, mode_based_execute):
        return
    page = is_page(entry, level)
    reserved = reserved_bits(level, page, physical_address_width) & entry
    if reserved:
        yield BrokenRule(f"reserved bits {reserved:#x} are set", _MISCONFIGURATION)
    if page:
        kind = memory_type((entry & MEMORY_TYPE) >> MEMORY_TYPE_SHIFT)
        if not isinstance(kind, MemoryType):
            yield BrokenRule(f"memory type {kind} (bits 5:3) is reserved", _MISCONFIGURATION)
        needed = {2: "page_2m", 3: "page_1g"}.get(level)
        if needed is not None and capabilities is not None and not getattr(capabilities, needed):
            yield _lacking("it maps a large page (bit 7)", needed)


def reserved_bits(level: int, page: bool, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH) -> int:
    """The bits that must be 0 in a present entry (SDM Vol. 3C, 29.3.2)."""
    reserved = ADDRESS & ~((1 << physical_address_width) - 1)
    if page:
        return reserved | (1 << shift_of(level)) - (1 << 12)
    return reserved | 0x78 | (LARGE if level == 4 else 0)


def address_bits(entry: int, level: int, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH) -> int:
    """The bits where such an entry may hold any address without being misconfigured by it."""
    mask = ADDRESS & (1 << physical_address_width) - 1
    return mask & -(1 << shift_of(level)) if is_page(entry, level) else mask


def _lacking(text: str, field: str) -> BrokenRule:
    feature = getattr(EptVpidCap, field).feature
    return BrokenRule(text, _MISCONFIGURATION, EptVpidCap.bit_name(field), feature)
