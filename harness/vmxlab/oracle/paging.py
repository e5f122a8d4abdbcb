"""L2's own paging: its modes, which entries are legal, and what they allow (SDM Vol. 3A, chapter 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vmxlab.oracle.accesses import Access, PagingState
from vmxlab.oracle.values import CannotTell, Rule
from vmxlab.sdm.paging import PROTECTION_KEY_SHIFT, PROTECTION_KEYS, PageFaultErrorCode, PageFlags
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS

_ADDRESS = (1 << 52) - (1 << 12)
_KEY_DISABLES_ACCESS, _KEY_DISABLES_WRITE = 1, 2

NOT_PRESENT = Rule("an entry with P = 0 gives a page fault with P = 0 in its error code", "Vol. 3A, 4.7")
RESERVED = Rule("a reserved bit in a present entry gives a page fault with RSVD = 1", "Vol. 3A, 4.7")
RIGHTS = Rule("an access that the entries' rights don't allow is a page fault with P = 1", "Vol. 3A, 4.6.1")
FLAGS = Rule("translation sets accessed flags, a write the dirty flag of its page", "Vol. 3A, 4.8")
NO_PAGING = Rule("without paging a linear address is the physical one", "Vol. 3A, 4.1.1")


class PagingMode(Enum):
    """The paging modes (Vol. 3A, 4.1.1). Values: (levels, bytes of an entry, address bits by a level)."""

    NONE = (0, 0, 0)
    BITS_32 = (2, 4, 10)
    PAE = (3, 8, 9)
    LEVEL_4 = (4, 8, 9)
    LEVEL_5 = (5, 8, 9)

    @property
    def levels(self) -> int:
        """How many levels of tables there are, the four PDPTEs of PAE paging counted as one."""
        return self.value[0]

    @property
    def entry_bytes(self) -> int:
        """Size of an entry."""
        return self.value[1]

    @property
    def linear_bits(self) -> int:
        """Width of linear addresses; wider ones are canonical if the upper bits repeat the highest."""
        return {PagingMode.LEVEL_4: 48, PagingMode.LEVEL_5: 57}.get(self, 32)

    def shift(self, level: int) -> int:
        """The lowest address bit that selects an entry of this level."""
        return int(12 + self.value[2] * (level - 1))

    def index(self, linear: int, level: int) -> int:
        """Which entry of a table of this level translates `linear`."""
        return int(linear >> self.shift(level) & (1 << self.value[2]) - 1)

    @classmethod
    def of(cls, state: PagingState) -> PagingMode:
        """The mode by CR0.PG, CR4.PAE, IA32_EFER.LME (LMA follows it) and CR4.LA57."""
        if not state.cr0 & CR0.PG:
            return cls.NONE
        if not state.cr4 & CR4.PAE:
            return cls.BITS_32
        if not state.efer & (EFER.LMA | EFER.LME):
            return cls.PAE
        return cls.LEVEL_5 if state.cr4 & CR4.LA57 else cls.LEVEL_4


def is_canonical(state: PagingState, linear: int) -> bool:
    """Whether a linear address of 64-bit mode is canonical (Vol. 1, 3.3.7.1)."""
    width = 57 if state.cr4 & CR4.LA57 else 48
    upper = linear >> width - 1
    return upper in (0, (1 << 65 - width) - 1)


def maps_page(state: PagingState, mode: PagingMode, level: int, entry: int) -> bool:
    """Whether a present entry that sets no reserved bit maps a page (Vol. 3A, 4.3 to 4.5)."""
    if level == 1:
        return True
    if not entry & PageFlags.LARGE:
        return False
    if mode is PagingMode.BITS_32:
        return bool(state.cr4 & CR4.PSE)
    return level == 2 or (level == 3 and mode is not PagingMode.PAE)


def reserved_bits(state: PagingState, mode: PagingMode, level: int, entry: int) -> int:
    """The bits that must be 0 in such a present entry (Vol. 3A, 4.3, 4.4.2 and 4.5.4).

    CannotTell where that is up to a CPUID bit that is not known. PAE paging checks its PDPTEs when they are
    loaded: see `reserved_pdpte_bits`.
    """
    if mode is PagingMode.BITS_32:
        return _reserved_32_bit(state, entry) if level == 2 and maps_page(state, mode, level, entry) else 0
    top = 63 if mode is PagingMode.PAE else 52
    reserved = (1 << top) - (1 << state.maxphyaddr)
    if not state.efer & EFER.NXE:
        reserved |= PageFlags.EXECUTE_DISABLE
    if level == 1 or not entry & PageFlags.LARGE:
        return int(reserved)
    if level == 3:
        if state.page_1g is None:
            raise CannotTell("whether the processor has pages of 1 GiB is not known")
        if state.page_1g:
            return int(reserved | (1 << 30) - (1 << 13))
    return int(reserved | ((1 << 21) - (1 << 13) if level == 2 else PageFlags.LARGE))


def _reserved_32_bit(state: PagingState, entry: int) -> int:
    """Of a PDE that maps 4 MiB: bits 21:13 less those that extend the address (PSE-36)."""
    all_of_them = (1 << 22) - (1 << 13)
    if state.pse36 is None and entry & all_of_them:
        raise CannotTell("whether the processor has the PSE-36 mechanism is not known")
    if not state.pse36:
        return all_of_them
    return (1 << 22) - (1 << min(40, state.maxphyaddr) - 19)


def reserved_pdpte_bits(state: PagingState) -> int:
    """The bits that must be 0 in a present PDPTE of PAE paging (Vol. 3A, table 4-8)."""
    return (1 << 64) - (1 << state.maxphyaddr) | 0x1E0 | PageFlags.WRITE | PageFlags.USER


def address_in(mode: PagingMode, level: int, entry: int, *, page: bool) -> int:
    """Where the table or the page of an entry begins, guest-physical."""
    if not page:
        return int(entry & _ADDRESS)
    if mode is PagingMode.BITS_32 and level == 2:
        return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
    return int(entry & _ADDRESS & -(1 << mode.shift(level)))


@dataclass(frozen=True, slots=True)
class Rights:
    """What the entries that translate a linear address allow together (Vol. 3A, 4.6.1).

    `user`: it is a user-mode address. `key`: its protection key, None where there are none.
    """

    user: bool
    write: bool
    execute_disable: bool
    shadow_stack: bool = False
    key: int | None = None

    @classmethod
    def of(cls, state: PagingState, mode: PagingMode, entries: Sequence[int]) -> Rights:
        """By all entries that have rights, from the top; the last one maps the page."""
        *above, page = entries
        read_write_above = all(entry & PageFlags.WRITE for entry in above)
        return cls(
            user=all(entry & PageFlags.USER for entry in entries),
            write=read_write_above and bool(page & PageFlags.WRITE),
            execute_disable=bool(state.efer & EFER.NXE)
            and any(entry & PageFlags.EXECUTE_DISABLE for entry in entries),
            shadow_stack=read_write_above and page & (PageFlags.WRITE | PageFlags.DIRTY) == PageFlags.DIRTY,
            key=page >> PROTECTION_KEY_SHIFT & PROTECTION_KEYS - 1 if mode.levels >= 4 else None,
        )


WITHOUT_PAGING = Rights(user=True, write=True, execute_disable=False)
"""What the advanced information of an EPT violation says where CR0.PG = 0 (Vol. 3C, Table 28-7)."""


def is_allowed(state: PagingState, rights: Rights, access: Access) -> bool:
    """Whether the rights allow the access, protection keys left out (Vol. 3A, 4.6.1)."""
    if access.shadow_stack:
        return rights.shadow_stack and rights.user == access.user
    if access.fetches:
        if rights.execute_disable:
            return False
        return rights.user if access.user else not (rights.user and state.cr4 & CR4.SMEP)
    if access.user:
        return rights.user and (rights.write or not access.writes)
    if rights.user and state.cr4 & CR4.SMAP and (access.implicit or not state.rflags & RFLAGS.AC):
        return False
    return rights.write or not access.writes or not state.cr0 & CR0.WP


def key_forbids(state: PagingState, rights: Rights, access: Access) -> bool:
    """Whether the address's protection key forbids the access (Vol. 3A, 4.6.2)."""
    if rights.key is None or access.fetches:
        return False
    enabled, name = (CR4.PKE, "pkru") if rights.user else (CR4.PKS, "pkrs")
    if not state.cr4 & enabled:
        return False
    keys: int | None = getattr(state, name)
    if keys is None:
        raise CannotTell(f"{'PKRU' if rights.user else 'IA32_PKRS'} is not known")
    forbidden = keys >> 2 * rights.key & 3
    if forbidden & _KEY_DISABLES_ACCESS:
        return True
    guarded = access.writes and (access.user or bool(state.cr0 & CR0.WP))
    return guarded and bool(forbidden & _KEY_DISABLES_WRITE)


def error_code(
    state: PagingState, access: Access, *, present: bool = True, reserved: bool = False, key: bool = False
) -> PageFaultErrorCode:
    """The error code of a page fault by this access (Vol. 3A, 4.7).

    `present`: no entry had P = 0. `reserved`: an entry set a reserved bit. `key`: the key forbids it.
    """
    tells_fetches = state.cr4 & CR4.SMEP or (state.cr4 & CR4.PAE and state.efer & EFER.NXE)
    code = PageFaultErrorCode(0)
    for flag, holds in (
        (PageFaultErrorCode.PRESENT, present),
        (PageFaultErrorCode.WRITE, access.writes),
        (PageFaultErrorCode.USER, access.user),
        (PageFaultErrorCode.RESERVED, reserved),
        (PageFaultErrorCode.FETCH, access.fetches and tells_fetches),
        (PageFaultErrorCode.PROTECTION_KEY, key),
        (PageFaultErrorCode.SHADOW_STACK, access.shadow_stack),
    ):
        if holds:
            code |= flag
    return code
