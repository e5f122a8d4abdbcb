"""From a guest-physical address to a machine address by EPT (SDM Vol. 3C, 29.3), and what stops it.

`EptPath` is the entries that translate one address. Whether they are configured properly, what they allow and
which flags an access sets in them are questions about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import and_

from vmxlab.oracle.accesses import Access, AccessKind, PagingState, Read
from vmxlab.oracle.paging import Rights
from vmxlab.oracle.values import Bits, CannotTell, Rule
from vmxlab.sdm.controls import SecondaryControls, TertiaryControls
from vmxlab.sdm.registers import CR0
from vmxlab.structures.capability_msrs import EptVpidCap
from vmxlab.structures.ept_entry import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    ENTRIES,
    PAGING_WRITE,
    SUB_PAGE_WRITE,
    SUPERVISOR_SHADOW_STACK,
    SUPPRESS_VE,
    USER_EXECUTE,
    WRITE,
    is_page,
    is_present,
    misconfigurations,
    shift_of,
)
from vmxlab.structures.ept_pointer import EPTPointer

_GPA_BITS = 48
_LEVELS = 4

EPT = Rule("guest-physical addresses are translated by EPT", "Vol. 3C, 29.3.2")
NOT_PRESENT = Rule("an EPT entry that is not present is an EPT violation", "Vol. 3C, 29.3.3.2")
MISCONFIGURED = Rule(
    "an EPT entry that is not configured properly is an EPT misconfiguration", "Vol. 3C, 29.3.3.1"
)
BIT_12_IS_RESERVED = Rule("bit 12 of an entry that maps a large page is reserved", "Vol. 3C, 29.3.2")
RIGHTS = Rule("an access that the EPT entries don't allow together is an EPT violation", "Vol. 3C, 29.3.3.2")
ENTRY_BY_ENTRY = Rule("entries are judged one by one, their rights after the last", "Vol. 3C, 29.3.3.3")
PAGING_ACCESS_IS_A_WRITE = Rule(
    "with EPTP bit 6 an access to L2's paging structures is treated as a write", "Vol. 3C, 29.3.3.2"
)
FLAG_UPDATE_IS_A_WRITE = Rule("setting a flag in L2's paging structures is a data write", "Vol. 3C, 29.3.3.2")
FLAGS = Rule("with EPTP bit 6 the EPT entries' accessed and dirty flags are set", "Vol. 3C, 29.3.5")
LOG = Rule("an access that sets a dirty flag for EPT is logged", "Vol. 3C, 29.3.6")
LOG_FULL = Rule("a flag for EPT is not set while the PML index is not 0 to 511", "Vol. 3C, 29.3.6")
QUALIFICATION = Rule("what the exit qualification of an EPT violation says", "Vol. 3C, Table 28-7")

PML_ENTRIES = 512


# Bits of Table 28-7 that are not those of the access (2:0).
_READABLE_SHIFT = 3
_USER_EXECUTABLE = 1 << 6
_LINEAR_VALID = 1 << 7
_TRANSLATED = 1 << 8
_USER_ADDRESS, _READ_WRITE, _EXECUTE_DISABLE = 1 << 9, 1 << 10, 1 << 11
_SHADOW_STACK, _SUPERVISOR_SHADOW_STACK = 1 << 13, 1 << 14
_DEFINED = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class EptEntry:
    """An entry that a walk has met: its level (4 to 1), machine address and value."""

    level: int
    address: int
    value: int


@dataclass(frozen=True, slots=True)
class EptPath:
    """The entries that translate `gpa`, from the top.

    The last one maps its page, is not present, or is misconfigured.
    """

    gpa: int
    entries: tuple[EptEntry, ...]
    misconfigured: bool
    mode_based_execute: bool

    @property
    def last(self) -> EptEntry:
        """Where the walk ends."""
        return self.entries[-1]

    @property
    def is_complete(self) -> bool:
        """Whether it ends at a page."""
        return not self.misconfigured and is_present(self.last.value, self.mode_based_execute)

    @property
    def page_size(self) -> int:
        """Of the page it ends at, in bytes."""
        return 1 << shift_of(self.last.level)

    @property
    def hpa(self) -> int:
        """The machine address of the byte at `gpa`."""
        return self.last.value & ADDRESS & -self.page_size | self.gpa & self.page_size - 1

    @property
    def rights(self) -> int:
        """The AND of all entries."""
        return reduce(and_, (entry.value for entry in self.entries))


def walk(state: PagingState, gpa: int, read: Read) -> EptPath:
    """Walk the EPT paging structures for one address; CannotTell where memory or features are not known."""
    eptp, features = eptp_of(state), _features(state)
    if eptp.page_walk_length != _LEVELS:
        raise CannotTell(f"EPT with a page-walk length of {eptp.page_walk_length} is not modelled")
    if gpa >> _GPA_BITS:
        raise CannotTell(f"guest-physical address {gpa:#x} is wider than what EPT of 4 levels translates")
    by_mode = _by_mode(state)
    table, entries = eptp.address, []
    for level in range(_LEVELS, 0, -1):
        address = table + 8 * (gpa >> shift_of(level) & ENTRIES - 1)
        value = read(address, 8)
        if value is None:
            raise CannotTell(f"the EPT entry at {address:#x} is not known")
        entries.append(EptEntry(level, address, value))
        if _is_misconfigured(state, value, level, features):
            return EptPath(gpa, tuple(entries), True, by_mode)
        if not is_present(value, by_mode) or is_page(value, level):
            break
        table = value & ADDRESS
    return EptPath(gpa, tuple(entries), False, by_mode)


def _by_mode(state: PagingState) -> bool:
    return bool(state.secondary & SecondaryControls.MODE_BASED_EXECUTE_CONTROL_FOR_EPT)


def _is_misconfigured(state: PagingState, value: int, level: int, features: EptVpidCap) -> bool:
    faults = misconfigurations(
        value,
        level,
        features,
        physical_address_width=state.maxphyaddr,
        mode_based_execute=_by_mode(state),
    )
    return any(True for _ in faults)


def has_nothing_wrong_but_bit_12(state: PagingState, entry: EptEntry) -> bool:
    """Whether a misconfigured entry maps a large page, and would be good with bit 12 clear."""
    is_large = entry.level > 1 and is_page(entry.value, entry.level)
    good = entry.value & ~(1 << 12)
    return is_large and not _is_misconfigured(state, good, entry.level, _features(state))


def eptp_of(state: PagingState) -> EPTPointer:
    """The EPTP by its fields; the state must have one."""
    if state.eptp is None:
        raise ValueError("there is no EPT in this state")
    return _pointer(state.eptp)


@lru_cache(maxsize=64)
def _pointer(bits: int) -> EPTPointer:
    return EPTPointer.from_bits(bits)


def has_flags(state: PagingState) -> bool:
    """Whether there are accessed and dirty flags for EPT."""
    return state.eptp is not None and eptp_of(state).accessed_dirty


def allows(state: PagingState, path: EptPath, access: Access, linear_rights: Rights | None) -> bool:
    """Whether a complete path allows the access (Vol. 3C, 29.3.3.2).

    `linear_rights`: of the linear address, for the access to its translation; None for one to L2's paging
    structures, which is never a fetch. CannotTell for what is not modelled: shadow stacks of supervisors,
    sub-page write permissions, and paging-write control, where they would decide.
    """
    wanted = int(access.kind)
    if access.fetches and path.mode_based_execute and linear_rights is not None and linear_rights.user:
        wanted = USER_EXECUTE
    if access.shadow_stack and not access.user and eptp_of(state).supervisor_shadow_stack:
        raise CannotTell("access rights for supervisor shadow-stack pages of EPT are not modelled")
    missing = wanted & ~path.rights
    if missing == WRITE:
        _refuse_special_writes(state, path, linear_rights)
    return not missing


def _refuse_special_writes(state: PagingState, path: EptPath, linear_rights: Rights | None) -> None:
    sub_page = state.secondary & SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT
    if sub_page and path.last.level == 1 and path.last.value & SUB_PAGE_WRITE:
        raise CannotTell("sub-page write permissions are not modelled")
    paging_write = state.tertiary & TertiaryControls.EPT_PAGING_WRITE_CONTROL
    if paging_write and linear_rights is None and path.last.value & PAGING_WRITE:
        raise CannotTell("EPT paging-write control is not modelled")


def flags_to_set(path: EptPath, *, write: bool) -> list[EptEntry]:
    """The entries of a complete path whose flags an access sets, with the values they then have.

    (Vol. 3C, 29.3.5; to be asked only with EPTP bit 6.)
    """
    changed = []
    for entry in path.entries:
        flags = ACCESSED | DIRTY if write and entry is path.last else ACCESSED
        if flags & ~entry.value:
            changed.append(EptEntry(entry.level, entry.address, entry.value | flags))
    return changed


def sets_dirty(path: EptPath, *, write: bool) -> bool:
    """Whether an access changes the dirty flag of a complete path from 0 to 1."""
    return write and not path.last.value & DIRTY


def is_convertible(state: PagingState, path: EptPath) -> bool:
    """Whether a violation may be a #VE, as far as entries and controls say (Vol. 3C, 26.5.7.1).

    Bit 63 of the last entry decides: the one that is not present, or that maps the page.
    """
    enabled = state.secondary & SecondaryControls.EPT_VIOLATION_VE and state.cr0 & CR0.PE
    return bool(enabled) and not path.last.value & SUPPRESS_VE


def qualification(
    state: PagingState,
    path: EptPath,
    access: Access,
    *,
    linear: bool = True,
    linear_rights: Rights | None = None,
    flag_update: bool = False,
) -> Bits:
    """The exit qualification of a violation (Vol. 3C, Table 28-7); bits that the SDM leaves open are unknown.

    `access`: the one to the guest-physical address. `linear`: it came by a linear address. `linear_rights`:
    of that address, if the access was to its translation. `flag_update`: it was to set a flag there.
    """
    value, known = int(access.kind), _DEFINED
    if flag_update or (access.kind is AccessKind.READ_MODIFY_WRITE and linear_rights is not None):
        value, known = int(AccessKind.WRITE), known & ~int(AccessKind.READ)
    if path.is_complete:
        value |= (path.rights & 0b111) << _READABLE_SHIFT
    if not path.mode_based_execute:
        known &= ~_USER_EXECUTABLE
    elif path.is_complete and path.rights & USER_EXECUTE:
        value |= _USER_EXECUTABLE
    value |= _LINEAR_VALID if linear else 0
    value |= _TRANSLATED if linear_rights is not None else 0
    if not linear:
        known &= ~_TRANSLATED
    more, more_known = _advanced_information(state, linear_rights)
    value |= _SHADOW_STACK if access.shadow_stack else 0
    if path.is_complete and eptp_of(state).supervisor_shadow_stack:
        value |= _SUPERVISOR_SHADOW_STACK if path.last.value & SUPERVISOR_SHADOW_STACK else 0
    else:
        known &= ~_SUPERVISOR_SHADOW_STACK
    return Bits(value | more, known & more_known)


def _advanced_information(state: PagingState, rights: Rights | None) -> tuple[int, int]:
    """Bits 11:9, and which bits are known: these three only with IA32_VMX_EPT_VPID_CAP[22] and bits 7, 8."""
    if rights is None or not _features(state).advanced_exit_information:
        return 0, _DEFINED & ~(_USER_ADDRESS | _READ_WRITE | _EXECUTE_DISABLE)
    shown = _USER_ADDRESS if rights.user else 0
    shown |= _READ_WRITE if rights.write else 0
    shown |= _EXECUTE_DISABLE if rights.execute_disable else 0
    return shown, _DEFINED


def _features(state: PagingState) -> EptVpidCap:
    if state.ept_features is None:
        raise ValueError("an EPTP without IA32_VMX_EPT_VPID_CAP: PagingState refuses that")
    return state.ept_features
