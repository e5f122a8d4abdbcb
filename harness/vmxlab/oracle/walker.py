"""The walk itself: one translation of one linear address, step by step (SDM Vol. 3C, 29.3.3.3).

`vmxlab.oracle.translation` asks; what each entry means is in `paging` and `ept`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from vmxlab.oracle import ept, paging
from vmxlab.oracle.accesses import (
    Access,
    AccessKind,
    EptMisconfiguration,
    EptViolation,
    Flags,
    PageFault,
    PagingState,
    PmlFull,
    Read,
    Translated,
    Write,
)
from vmxlab.oracle.paging import PagingMode, Rights
from vmxlab.oracle.values import Bits, CannotTell, Rule
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.paging import PageFlags
from vmxlab.structures.checks import PAGE_SIZE
from vmxlab.structures.ept_entry import ACCESSED, ADDRESS


class Ended(Exception):
    """A walk came to an end before its translation."""

    def __init__(self, ending: PageFault | EptViolation | EptMisconfiguration | PmlFull) -> None:
        super().__init__(ending)
        self.ending = ending


class Overlay:
    """Memory, with the flags that the walk has set in it."""

    def __init__(self, read: Read, writes: Iterable[Write] = ()) -> None:
        self._read = read
        self.writes: list[Write] = list(writes)

    def read(self, address: int, size: int) -> int | None:
        for written, written_size, value in reversed(self.writes):
            if written == address and written_size == size:
                return value
            if written < address + size and address < written + written_size:
                raise CannotTell(f"memory at {address:#x} is a paging-structure entry of two kinds")
        return self._read(address, size)


@dataclass(frozen=True, slots=True)
class _Used:
    """An entry of L2's paging structures that the walk used; `path` is EPT's to it, None without EPT."""

    gpa: int
    hpa: int
    size: int
    value: int
    path: ept.EptPath | None


class Walker:
    """One translation: what it has used, set and logged so far."""

    def __init__(self, state: PagingState, read: Read) -> None:
        self.state = state
        self.memory = Overlay(read)
        self.rules: list[Rule] = []
        self.logged: list[int] = []
        self.pml_index = state.pml_index
        self.linear: int | None = None
        self.used: list[_Used] = []

    # --- the order of things (Vol. 3C, 29.3.3.3) ---------------------------------------------------------

    def translate(self, mode: PagingMode, linear: int, access: Access) -> Translated:
        self.linear = linear
        if mode is PagingMode.NONE:
            self._rule(paging.NO_PAGING)
            rights, gpa, page_size = paging.WITHOUT_PAGING, linear, None
        else:
            rights, gpa, page_size = self._walk(mode, linear, access)
        path = self._judge(gpa, access, rights)
        updates = self._guest_flags(access)
        if path is not None:
            self._touch(path, write=access.writes, access=access)
        self.memory.writes += [(entry.hpa, entry.size, entry.value | flags) for entry, flags in updates]
        return Translated(
            linear=linear,
            gpa=gpa,
            hpa=gpa if path is None else path.hpa,
            page_size=page_size,
            ept_page_size=None if path is None else path.page_size,
            **self.effects(),
        )

    def _walk(self, mode: PagingMode, linear: int, access: Access) -> tuple[Rights, int, int]:
        """L2's paging structures, entry by entry, then their rights: (rights, address, size of the page)."""
        state = self.state
        table, level = self._root(mode, linear, access)
        while True:
            gpa = table + mode.entry_bytes * mode.index(linear, level)
            entry = self._read_entry(gpa, mode.entry_bytes)
            if not entry.value & PageFlags.PRESENT:
                self._page_fault(paging.NOT_PRESENT, access, present=False)
            if entry.value & paging.reserved_bits(state, mode, level, entry.value):
                self._page_fault(paging.RESERVED, access, reserved=True)
            self.used.append(entry)
            page = paging.maps_page(state, mode, level, entry.value)
            table = paging.address_in(mode, level, entry.value, page=page)
            if page:
                break
            level -= 1
        rights = Rights.of(state, mode, [entry.value for entry in self.used])
        key = paging.key_forbids(state, rights, access)
        if key or not paging.is_allowed(state, rights, access):
            self._page_fault(paging.RIGHTS, access, key=key)
        size = 1 << mode.shift(level)
        return rights, table | linear & size - 1, size

    def _root(self, mode: PagingMode, linear: int, access: Access) -> tuple[int, int]:
        """Where the first table to be read lies, and its level."""
        if mode is not PagingMode.PAE:
            wide = mode is not PagingMode.BITS_32
            return self.state.cr3 & ADDRESS & (ADDRESS if wide else 0xFFFF_FFFF), mode.levels
        if self.state.pdptes is None:
            raise CannotTell("the PDPTEs are not known")
        pdpte = self.state.pdptes[linear >> 30]
        if not pdpte & PageFlags.PRESENT:
            self._page_fault(paging.NOT_PRESENT, access, present=False)
        return pdpte & ADDRESS, mode.levels - 1

    def _read_entry(self, gpa: int, size: int) -> _Used:
        kind = AccessKind.READ
        if ept.has_flags(self.state):
            self._rule(ept.PAGING_ACCESS_IS_A_WRITE)
            kind = AccessKind.READ_MODIFY_WRITE
        path = self._judge(gpa, Access(kind), None)
        if path is not None:
            self._touch(path, write=bool(kind & AccessKind.WRITE))
        hpa = gpa if path is None else path.hpa
        value = self.memory.read(hpa, size)
        if value is None:
            raise CannotTell(f"L2's paging-structure entry at {gpa:#x} is not known")
        return _Used(gpa, hpa, size, value, path)

    def read_pdpte(self, gpa: int) -> int:
        """One PDPTE of those that MOV to CR loads."""
        path = self._judge(gpa, Access(AccessKind.READ), None)
        if path is not None:
            self._touch(path, write=False)
        value = self.memory.read(gpa if path is None else path.hpa, 8)
        if value is None:
            raise CannotTell(f"the PDPTE at {gpa:#x} is not known")
        return value

    # --- EPT ---------------------------------------------------------------------------------------------

    def _judge(self, gpa: int, access: Access, linear_rights: Rights | None) -> ept.EptPath | None:
        """The way by EPT to `gpa`, if the access may go it; nothing is set yet. None without EPT."""
        state = self.state
        if state.eptp is None:
            return None
        self._rule(ept.EPT)
        path = ept.walk(state, gpa, self.memory.read)
        if path.is_complete and ept.allows(state, path, access, linear_rights):
            return path
        final = access if linear_rights is not None else None
        self._refuse_pending_updates(final)
        if path.misconfigured:
            last = path.last
            rules = [ept.MISCONFIGURED, ept.ENTRY_BY_ENTRY]
            if ept.has_nothing_wrong_but_bit_12(state, last):
                rules.append(ept.BIT_12_IS_RESERVED)
            effects = self._effects_of_failure(final, path, *rules)
            raise Ended(EptMisconfiguration(gpa=gpa, level=last.level, entry=last.value, **effects))
        linear = self.linear is not None
        value = ept.qualification(state, path, access, linear=linear, linear_rights=linear_rights)
        return self._violation(path, value, final, ept.RIGHTS if path.is_complete else ept.NOT_PRESENT)

    def _violation(self, path: ept.EptPath, value: Bits, final: Access | None, rule: Rule) -> NoReturn:
        rules = (rule, ept.ENTRY_BY_ENTRY, ept.QUALIFICATION)
        raise Ended(
            EptViolation(
                linear=self.linear,
                gpa=path.gpa,
                qualification=value,
                convertible=ept.is_convertible(self.state, path),
                **self._effects_of_failure(final, path, *rules),
            )
        )

    def _touch(self, path: ept.EptPath, *, write: bool, access: Access | None = None) -> None:
        """Set the flags for EPT that an access by this path sets, and log it."""
        changed = ept.flags_to_set(path, write=write) if ept.has_flags(self.state) else []
        if not changed:
            return
        self._rule(ept.FLAGS)
        if self.state.secondary & SecondaryControls.ENABLE_PML:
            self._log(path, access, dirty=ept.sets_dirty(path, write=write))
        self.memory.writes += [(entry.address, 8, entry.value) for entry in changed]

    def _log(self, path: ept.EptPath, access: Access | None, *, dirty: bool) -> None:
        if self.pml_index is None:
            raise CannotTell("the PML index is not known")
        if self.pml_index >= ept.PML_ENTRIES:
            raise Ended(PmlFull(gpa=path.gpa, **self._effects_of_failure(access, None, ept.LOG_FULL)))
        if dirty:
            self._rule(ept.LOG)
            self.logged.append(path.gpa & -PAGE_SIZE)
            self.pml_index = self.pml_index - 1 & 0xFFFF

    # --- flags of L2's own paging ------------------------------------------------------------------------

    def _guest_flags(self, access: Access) -> list[tuple[_Used, int]]:
        """The flags that an access sets which nothing else stops: (entry, bits). A violation if EPT does."""
        updates = list(self._updates(access))
        denied = [entry for entry, _ in updates if self._is_denied(entry)]
        if len(denied) > 1:
            raise CannotTell("several entries of L2 can't have their flags set: which is first is not said")
        if denied:
            path = denied[0].path
            assert path is not None
            value = ept.qualification(self.state, path, Access(AccessKind.WRITE), flag_update=True)
            self._violation(path, value, access, ept.FLAG_UPDATE_IS_A_WRITE)
        if updates:
            self._rule(paging.FLAGS)
        return updates

    def _updates(self, access: Access | None) -> Iterator[tuple[_Used, int]]:
        """The entries used so far that lack flags; the dirty flag only where the access is given."""
        for entry in self.used:
            flags = PageFlags.ACCESSED
            if access is not None and access.writes and entry is self.used[-1]:
                flags |= PageFlags.DIRTY
            if flags & ~entry.value:
                yield entry, int(flags)

    def _is_denied(self, entry: _Used) -> bool:
        """Whether EPT does not let a flag of this entry be set."""
        if entry.path is None:
            return False
        return not ept.allows(self.state, entry.path, Access(AccessKind.WRITE), None)

    def _refuse_pending_updates(self, access: Access | None) -> None:
        """CannotTell where a flag of an entry used before can't be set: it may have been found first."""
        if any(self._is_denied(entry) for entry, _ in self._updates(access)):
            raise CannotTell(
                "EPT guards a flag of L2's paging, and something else fails: which is first is open"
            )

    # --- endings -----------------------------------------------------------------------------------------

    def _page_fault(
        self,
        rule: Rule,
        access: Access,
        *,
        present: bool = True,
        reserved: bool = False,
        key: bool = False,
    ) -> NoReturn:
        self._refuse_pending_updates(None)
        assert self.linear is not None
        code = paging.error_code(self.state, access, present=present, reserved=reserved, key=key)
        effects = self._effects_of_failure(None, None, rule)
        raise Ended(PageFault(linear=self.linear, error_code=code, **effects))

    def _rule(self, rule: Rule) -> None:
        if rule not in self.rules:
            self.rules.append(rule)

    def effects(self, *rules: Rule) -> dict[str, Any]:
        """What has been done so far, and why: the fields that every ending has."""
        for rule in rules:
            self._rule(rule)
        return {
            "writes": tuple(self.memory.writes),
            "logged": tuple(self.logged),
            "rules": tuple(self.rules),
        }

    def _effects_of_failure(
        self, final: Access | None, path: ept.EptPath | None, *rules: Rule
    ) -> dict[str, Any]:
        """The same, and the flags that may have been set besides.

        `final`: the access, if it is its own translation that fails. `path`: the one that fails by EPT.
        """
        possible: list[Flags] = []
        for entry, flags in self._updates(final):
            if not self._is_denied(entry):
                possible.append((entry.hpa, entry.size, flags))
        if path is not None and ept.has_flags(self.state):
            above = path.entries if path.is_complete else path.entries[:-1]
            possible += [(entry.address, 8, ACCESSED) for entry in above if not entry.value & ACCESSED]
        return {**self.effects(*rules), "possible_flags": tuple(possible)}
