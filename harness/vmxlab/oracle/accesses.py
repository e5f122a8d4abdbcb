"""An access to a linear address, the state that decides about it, and everything that may come of it.

The words of `vmxlab.oracle.translation`: what goes in, and what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag

from vmxlab.errors import CaseError, OutOfRange
from vmxlab.oracle.values import Bits, Rule, Unknown
from vmxlab.sdm.controls import SecondaryControls, TertiaryControls
from vmxlab.sdm.paging import PageFaultErrorCode
from vmxlab.sdm.registers import RFLAGS
from vmxlab.structures.capability_msrs import EptVpidCap
from vmxlab.structures.checks import require_width

Read = Callable[[int, int], int | None]
"""`size` bytes of machine memory at an address, as a little-endian number; None where they are not known."""

Write = tuple[int, int, int]
"""(machine address, size in bytes, the value that it has afterwards)."""

Flags = tuple[int, int, int]
"""(machine address, size in bytes, bits that the processor may have set there)."""


class AccessKind(IntFlag):
    """What an access does; the numbers are those of bits 2:0 of Table 28-7 and of an EPT entry."""

    READ = 1 << 0
    WRITE = 1 << 1
    FETCH = 1 << 2
    READ_MODIFY_WRITE = READ | WRITE


_KINDS = (AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.READ_MODIFY_WRITE)


@dataclass(frozen=True, slots=True)
class Access:
    """One access by a linear address (Vol. 3A, 4.6.1).

    `user`: a user-mode access, as at CPL 3. `implicit`: an implicit supervisor-mode access (to GDT, IDT, TSS,
    ... at any CPL), which no RFLAGS.AC exempts from SMAP. `shadow_stack`: one to a shadow stack.
    """

    kind: AccessKind = AccessKind.READ
    user: bool = False
    implicit: bool = False
    shadow_stack: bool = False

    def __post_init__(self) -> None:
        """Refuse what no instruction does."""
        if self.kind not in _KINDS:
            raise CaseError(f"no access is {self.kind!r}: a read, a write, both, or a fetch")
        if self.user and self.implicit:
            raise CaseError("an implicit access is a supervisor-mode access, whatever the CPL")
        if self.shadow_stack and self.kind is AccessKind.FETCH:
            raise CaseError("nothing is fetched from a shadow stack")

    @property
    def writes(self) -> bool:
        """Whether it is a write, or a read-modify-write."""
        return bool(self.kind & AccessKind.WRITE)

    @property
    def fetches(self) -> bool:
        """Whether it is an instruction fetch."""
        return bool(self.kind & AccessKind.FETCH)


_NO_SECONDARY, _NO_TERTIARY = SecondaryControls(0), TertiaryControls(0)

READ = Access(AccessKind.READ)
WRITE = Access(AccessKind.WRITE)
FETCH = Access(AccessKind.FETCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingState:
    """What decides about a translation besides memory: registers, EPTP, controls, and CPUID.

    `pdptes`              the four PDPTE registers, for PAE paging
    `pkru`, `pkrs`        protection keys of user-mode and supervisor-mode addresses; None: not known
    `maxphyaddr`          physical-address width in bits
    `page_1g`, `pse36`    CPUID: pages of 1 GiB, 40-bit addresses of 4-MiB pages; None: not known
    `eptp`                None: "enable EPT" is 0, and guest-physical addresses are the machine's
    `ept_features`        IA32_VMX_EPT_VPID_CAP, needed with an EPTP
    `secondary`, `tertiary`
                          processor-based controls; those about EPT count only with an EPTP
    `pml_index`           the PML index as it is now; None: not known

    Raises OutOfRange or CaseError for a width or a set of PDPTEs that there can't be.
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int = 0
    rflags: int = int(RFLAGS.FIXED1)
    pdptes: tuple[int, int, int, int] | None = None
    pkru: int | None = 0
    pkrs: int | None = 0
    maxphyaddr: int
    page_1g: bool | None = None
    pse36: bool | None = None
    eptp: int | None = None
    ept_features: EptVpidCap | None = None
    secondary: SecondaryControls = _NO_SECONDARY
    tertiary: TertiaryControls = _NO_TERTIARY
    pml_index: int | None = None

    def __post_init__(self) -> None:
        """Check what has only some values."""
        require_width(self.maxphyaddr)
        if self.pdptes is not None and len(self.pdptes) != 4:
            raise OutOfRange("number of PDPTEs", len(self.pdptes), "PAE paging has four")
        if self.eptp is not None and self.ept_features is None:
            raise CaseError("an EPTP needs IA32_VMX_EPT_VPID_CAP beside it: it says which entries are legal")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """What every ending of a translation has.

    `writes`: accessed and dirty flags that have been set on the way, in order. `possible_flags`: flags that
    the SDM lets the processor set, or not, before it found out. `logged`: guest-physical addresses for the
    page-modification log, in order. `rules`: the sentences of the SDM that led here.
    """

    writes: tuple[Write, ...] = ()
    possible_flags: tuple[Flags, ...] = ()
    logged: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated(_Ending):
    """The access takes place, at machine address `hpa`.

    `page_size`: of L2's page in bytes, None without paging. `ept_page_size`: of the EPT's, None without EPT.
    """

    linear: int
    gpa: int
    hpa: int
    page_size: int | None
    ept_page_size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFault(_Ending):
    """#PF, with the linear address for CR2 or the exit qualification."""

    linear: int
    error_code: PageFaultErrorCode


@dataclass(frozen=True, slots=True, kw_only=True)
class EptViolation(_Ending):
    """A violation. `linear` is None for a load of PDPTEs, which has no linear address.

    `qualification`: Table 28-7, of which the bits that the SDM defines are known; bit 12 (NMI unblocking due
    to IRET) and bit 16 (asynchronous) are the caller's, and 0 here. `convertible`: whether it is a #VE
    instead of an exit, if it is not met in event delivery and the information area is free (26.5.7.1).
    """

    linear: int | None
    gpa: int
    qualification: Bits
    convertible: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EptMisconfiguration(_Ending):
    """A misconfigured EPT entry (`entry`, of `level` 4 to 1) on the way to guest-physical `gpa`."""

    gpa: int
    level: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PmlFull(_Ending):
    """Page-modification log full: the flags for the access to `gpa` are not set, and it isn't done."""

    gpa: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PdptesLoaded(_Ending):
    """MOV to CR loads these four PDPTEs."""

    pdptes: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservedPdpte(_Ending):
    """#GP(0): MOV to CR would load a PDPTE that sets reserved bits."""

    number: int


Translation = Translated | PageFault | EptViolation | EptMisconfiguration | PmlFull | Unknown
PdpteLoad = PdptesLoaded | ReservedPdpte | EptViolation | EptMisconfiguration | PmlFull | Unknown
