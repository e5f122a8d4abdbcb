"""From a linear address to a machine address, as the SDM says: through L2's paging and EPT.

    ending = translate(state, 0x40_0000, Access(AccessKind.WRITE), read)
    match ending:
        case Translated(): ...
        case EptViolation(gpa=gpa): ...

The walk goes step by step (Vol. 3C, 29.3.3.3): EPT translates the address of each paging-structure entry,
then the entry is judged, and after the last one the rights of all of them together; only then EPT is asked
for the page itself. What the manual leaves open (in which order flags of several entries are set, whether a
failing walk sets accessed flags) is not guessed: it is in `possible_flags`, or the answer is Unknown.

Nothing is cached here: a translation is what memory says now. Whether the processor may still have an older
one (Vol. 3A, 4.10; Vol. 3C, 29.4) is for the caller to know.
"""

from __future__ import annotations

from dataclasses import replace

from vmxlab.errors import OutOfRange
from vmxlab.oracle import paging
from vmxlab.oracle.accesses import (
    Access,
    AccessKind,
    EptMisconfiguration,
    EptViolation,
    PageFault,
    PagingState,
    PdpteLoad,
    PdptesLoaded,
    PmlFull,
    Read,
    ReservedPdpte,
    Translated,
    Translation,
)
from vmxlab.oracle.paging import PagingMode
from vmxlab.oracle.values import CannotTell, Rule, Unknown
from vmxlab.oracle.walker import Ended, Overlay, Walker
from vmxlab.sdm.controls import TertiaryControls
from vmxlab.sdm.paging import PageFlags
from vmxlab.sdm.registers import CR4
from vmxlab.structures.checks import PAGE_SIZE
from vmxlab.structures.ept_entry import ADDRESS

__all__ = [
    "Access",
    "AccessKind",
    "EptMisconfiguration",
    "EptViolation",
    "PageFault",
    "PagingState",
    "PdpteLoad",
    "PdptesLoaded",
    "PmlFull",
    "ReservedPdpte",
    "Translated",
    "Translation",
    "is_canonical",
    "load_pdptes",
    "translate",
    "translate_bytes",
]

_U64 = (1 << 64) - 1
_PDPTES_ALIGNMENT = 32


def translate(state: PagingState, linear: int, access: Access, read: Read) -> Translation:
    """What becomes of an access to one byte (or within one page) at `linear`.

    `read(address, size)` gives machine memory. Unknown where memory that the walk needs is not known, or the
    SDM does not say. OutOfRange for a linear address that the mode doesn't have: canonical or not is asked
    before, with `is_canonical`.
    """
    mode = PagingMode.of(state)
    _require_linear(state, mode, linear)
    walker = Walker(state, read)
    try:
        _refuse_unmodelled(state, mode)
        return walker.translate(mode, linear, access)
    except Ended as end:
        return end.ending
    except CannotTell as end:
        return end.unknown


def translate_bytes(
    state: PagingState, linear: int, size: int, access: Access, read: Read
) -> tuple[Translated, ...] | Translation:
    """The same for an access of `size` bytes: one Translated for each page it touches, or what stops it.

    An access that touches two pages and fails in one ends as that page's access does, with the address of
    the first byte in that page. Unknown where both fail: the SDM does not say which is found first.
    OutOfRange for a size that touches more than two pages.
    """
    if not 1 <= size <= PAGE_SIZE:
        raise OutOfRange("size of an access", size, f"1 to {PAGE_SIZE} bytes, so that it touches two pages")
    first_size = min(size, PAGE_SIZE - linear % PAGE_SIZE)
    first = translate(state, linear, access, read)
    if first_size == size:
        return (first,) if isinstance(first, Translated) else first
    mask = _U64 if PagingMode.of(state).linear_bits > 32 else 0xFFFF_FFFF
    following = linear + first_size & mask
    second = translate(state, following, access, read)
    if isinstance(first, Unknown) or isinstance(second, Unknown):
        return first if isinstance(first, Unknown) else second
    if isinstance(first, Translated):
        return _both(state, first, following, access, read, second)
    if isinstance(second, Translated):
        return _beside(first, second)
    return Unknown("both pages fail, and the SDM does not say which is accessed first")


def _both(
    state: PagingState, first: Translated, following: int, access: Access, read: Read, alone: Translation
) -> tuple[Translated, ...] | Translation:
    """What comes of the second page (`alone`: if the first weren't accessed) where the first translates."""
    if not isinstance(alone, Translated):
        return _beside(alone, first)
    memory = Overlay(read, first.writes)
    index = state.pml_index
    if index is not None:
        state = replace(state, pml_index=index - len(first.logged) & 0xFFFF)
    second = translate(state, following, access, memory.read)
    if not isinstance(second, Translated):
        return Unknown("one page fails after an access to the other, whose order the SDM does not say")
    if first.logged and second.logged:
        return Unknown("both pages are logged, and the SDM does not say in which order")
    return first, second


def is_canonical(state: PagingState, linear: int) -> bool:
    """Whether a linear address of 64-bit mode is canonical; one that isn't is #GP(0) or #SS(0)."""
    return paging.is_canonical(state, linear)


def load_pdptes(state: PagingState, cr3: int, read: Read) -> PdpteLoad:
    """What becomes of a load of the PDPTEs for PAE paging by MOV to CR0, CR3 or CR4 (Vol. 3A, 4.4.1).

    It reads 32 bytes at bits 31:5 of CR3, by EPT without a linear address, and never as a write.
    """
    walker = Walker(state, read)
    try:
        values = []
        for number in range(4):
            gpa = (cr3 & 0xFFFF_FFFF & -_PDPTES_ALIGNMENT) + 8 * number
            values.append(walker.read_pdpte(gpa))
        for number, value in enumerate(values):
            if value & PageFlags.PRESENT and value & paging.reserved_pdpte_bits(state):
                return ReservedPdpte(number=number, **walker.effects(_RESERVED_PDPTE))
        first, second, third, fourth = values
        return PdptesLoaded(pdptes=(first, second, third, fourth), **walker.effects(_PDPTES))
    except Ended as end:
        assert not isinstance(end.ending, Translated | PageFault)
        return end.ending
    except CannotTell as end:
        return end.unknown


_PDPTES = Rule("MOV to CR loads the four PDPTEs that bits 31:5 of CR3 lead to", "Vol. 3A, 4.4.1")
_RESERVED_PDPTE = Rule(
    "a present PDPTE with a reserved bit set is #GP(0) when it is loaded", "Vol. 3A, 4.4.1"
)


def _beside(
    failure: PageFault | EptViolation | EptMisconfiguration | PmlFull | Unknown, other: Translated
) -> Translation:
    """The failure of one page, where the other's flags may have been set before or not."""
    if isinstance(failure, Unknown):
        return failure
    if other.logged:
        return Unknown("one page fails, and whether the other was logged before the SDM does not say")
    return replace(failure, possible_flags=(*failure.possible_flags, *other.writes))


def _require_linear(state: PagingState, mode: PagingMode, linear: int) -> None:
    if mode.linear_bits == 32:
        if not 0 <= linear < 1 << 32:
            raise OutOfRange("linear address", linear, "without 4-level paging they have 32 bits")
    elif not 0 <= linear <= _U64 or not paging.is_canonical(state, linear):
        raise OutOfRange("linear address", linear, f"it is not canonical for {mode.linear_bits} bits")


def _refuse_unmodelled(state: PagingState, mode: PagingMode) -> None:
    if mode in (PagingMode.LEVEL_4, PagingMode.LEVEL_5) and state.cr3 & ADDRESS & -(1 << state.maxphyaddr):
        raise CannotTell("CR3 has address bits beyond the physical-address width, which no load of it allows")
    if state.cr4 & CR4.LASS:
        raise CannotTell("linear-address-space separation is not modelled")
    if state.eptp is None:
        return
    for control, what in (
        (TertiaryControls.ENABLE_HLAT, "hypervisor-managed linear-address translation"),
        (TertiaryControls.GUEST_PAGING_VERIFICATION, "guest-paging verification"),
    ):
        if state.tertiary & control:
            raise CannotTell(f"{what} is not modelled")
