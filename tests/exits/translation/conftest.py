"""The oracle's translation of linear addresses held against a processor: many accesses in one case.

One guest program makes many accesses. Each has paging structures of its own on both levels: an entry of each
level of L2's paging, and for each of its four guest-physical pages (three paging structures, and the page) an
entry of three levels of EPT. Exits tell what became of an access, memory which flags were set.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from vmxlab import Case, EntryControls, EPTPointer, ExitReason, Field, SecondaryControls, guest_ept, on
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.oracle.accesses import (
    Access,
    AccessKind,
    EptMisconfiguration,
    EptViolation,
    PageFault,
    PagingState,
    Translated,
    Translation,
)
from vmxlab.oracle.ept import FLAG_UPDATE_IS_A_WRITE
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.translation import translate
from vmxlab.oracle.values import Unknown
from vmxlab.sdm.paging import PageFlags
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS, Vector
from vmxlab.structures.ept_entry import LARGE

P, W, U, A, D, PS, XD = (
    int(flag)
    for flag in (
        PageFlags.PRESENT,
        PageFlags.WRITE,
        PageFlags.USER,
        PageFlags.ACCESSED,
        PageFlags.DIRTY,
        PageFlags.LARGE,
        PageFlags.EXECUTE_DISABLE,
    )
)
RWX, WB = 0b111, 6 << 3
BEYOND_WIDTH = 1 << 50

# Machine memory: EPT's directory and table for all regions, and a page for each region, which a page of 2 MiB
# maps to the same place. L2's memory: its upper paging structures.
EPT_DIRECTORY, EPT_TABLE, PAGES = FREE_PAGES, FREE_PAGES + 0x1000, 32 << 20
ACCESS_TABLE, PML4, PDPT, DIRECTORY = (DATA + 0x1000 * n for n in range(4))

READ, WRITE, FETCH, CHANGE = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.READ_MODIFY_WRITE
KINDS = (READ, WRITE, FETCH, CHANGE)

MOST_ACCESSES = 60
NEXT = PROGRAM + 12
"""Where L2 goes on after whatever became of an access. The bytes before it set PKRU."""
SET_PKRU = "xor ecx, ecx; xor edx, edx; mov eax, {pkru}; wrpkru"
NO_PKRU = "; ".join(["nop"] * 12)
PROGRAM_TEXT = """
{start}
next: inc r12
    cmp r12, r13
    jae end
    mov rax, r12
    shl rax, 4
    mov rdi, [rax + DATA]
    mov rcx, [rax + DATA + 8]
    cmp ecx, 2
    je write
    cmp ecx, 3
    je change
    cmp ecx, 4
    je fetch
    mov rax, [rdi]
    jmp next
write: mov [rdi], r14
    jmp next
change: lock or [rdi], r15
    jmp next
fetch: jmp rdi
end: cpuid
"""
BACK = struct.pack("<BI", 0xB8, NEXT) + b"\xff\xe0\x90"  # mov eax, NEXT; jmp rax; nop


def gpa_of(region: int) -> int:
    """A page whose EPT entries of levels 3 to 1 translate nothing else."""
    return region << 30 | region << 21 | region << 12


@dataclass(frozen=True)
class Probe:
    """One access, and what its own entries hold besides addresses, from the top down.

    `guest`: PML4E, PDPTE, PDE, PTE. `ept`: PDPTE, PDE, PTE for each of L2's three lower paging structures,
    and for the page.
    """

    kind: AccessKind = READ
    guest: tuple[int, int, int, int] = (P | W | U | A,) * 3 + (P | W | U | A | D,)
    ept: tuple[tuple[int, int, int], ...] = ((RWX, RWX, RWX | WB),) * 4

    def with_guest(self, level: int, bits: int) -> Probe:
        entries = list(self.guest)
        entries[4 - level] = bits
        return Probe(self.kind, tuple(entries), self.ept)

    def with_ept(self, page: int, level: int, bits: int) -> Probe:
        """`page`: 3 to 1: the paging structure of that level; 0: the page itself."""
        pages = [list(entries) for entries in self.ept]
        pages[3 - page][3 - level] = bits
        return Probe(self.kind, self.guest, tuple(tuple(entries) for entries in pages))


@dataclass(frozen=True)
class Setting:
    """The registers and the EPTP of a case."""

    user: bool = False
    cr0: int = CR0.WP
    cr4: int = 0
    efer: int = EFER.NXE
    rflags: int = 0
    ept_flags: bool = False
    pkru: int = 0


@dataclass
class Machine:
    """All the probes of a case, with their entries by machine address."""

    entry_bytes: ClassVar[int] = 8
    counter: ClassVar[str] = "r12"
    """The register that says which probe L2 is at."""
    setting: Setting
    probes: list[Probe]
    entries: dict[int, int] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ept = guest_ept()
        for number, probe in enumerate(self.probes):
            for page, (pdpte, pde, pte) in enumerate(probe.ept):
                region = 4 * number + 1 + page
                self.ept.set_raw_entry(region << 30, 3, pdpte | EPT_DIRECTORY if pdpte else 0)
                self._own(number, EPT_DIRECTORY + 8 * region, pde | (PAGES if pde & LARGE else EPT_TABLE))
                self._own(number, EPT_TABLE + 8 * region, pte | PAGES + 0x1000 * region)
            self._add_guest_entries(number, probe)
        for number, probe in enumerate(self.probes):
            for page, (pdpte, _, _) in enumerate(probe.ept):
                region = 4 * number + 1 + page
                if pdpte:
                    self._own(number, self._pdpte_address(region), pdpte | EPT_DIRECTORY)

    def _pdpte_address(self, region: int) -> int:
        return self.ept.entry_address(EPT_TABLES, region << 30, 3)

    def _own(self, number: int, address: int, value: int) -> None:
        self.entries[address], self.owner[address] = value, number

    def _add_guest_entries(self, number: int, probe: Probe) -> None:
        first, last = 4 * number + 1, 4 * number + 4
        pml4e, pdpte, pde, pte = probe.guest
        page = gpa_of(last)
        self._own(number, machine_address(PML4) + 8 * (number + 1), pml4e | gpa_of(first))
        to_page = page & -(1 << 30)
        self._own(
            number,
            PAGES + 0x1000 * first + 8 * number,
            pdpte | (to_page if pdpte & PS else gpa_of(first + 1)),
        )
        to_page = page & -(1 << 21)
        self._own(
            number,
            PAGES + 0x1000 * (first + 1) + 8 * last,
            pde | (to_page if pde & PS else gpa_of(first + 2)),
        )
        self._own(number, PAGES + 0x1000 * (first + 2) + 8 * last, pte | page)

    def linear(self, number: int) -> int:
        last = 4 * number + 4
        return (number + 1) << 39 | number << 30 | last << 21 | last << 12

    @property
    def data(self) -> dict[int, bytes]:
        upper = int(P | W | A | (U if self.setting.user else 0))
        table = (struct.pack("<QQ", self.linear(n), probe.kind) for n, probe in enumerate(self.probes))
        pml4 = machine_address(PML4)
        entries = (self.entries[pml4 + 8 * (n + 1)] for n in range(len(self.probes)))
        return {
            ACCESS_TABLE: b"".join(table),
            PML4: struct.pack(f"<{len(self.probes) + 1}Q", PDPT | upper, *entries),
            PDPT: struct.pack("<Q", DIRECTORY | upper),
            DIRECTORY: struct.pack("<Q", upper | PS | D),
        }

    @property
    def memory(self) -> dict[int, bytes]:
        last = 4 * len(self.probes)
        tables = {
            base + 8: b"".join(struct.pack("<Q", self.entries[base + 8 * (n + 1)]) for n in range(last))
            for base in (EPT_DIRECTORY, EPT_TABLE)
        }
        pages = {at: struct.pack("<Q", value) for at, value in self.entries.items() if at >= PAGES}
        code = {PAGES + 0x1000 * (4 * n + 4): BACK for n in range(len(self.probes))}
        return {**tables, **pages, **code}

    def case(self, capabilities, *, flags: bool = False) -> Case:
        """`flags`: have all entries reported afterwards, which takes longer than the accesses."""
        setting, program = self.setting, NO_PKRU
        if setting.cr4 & CR4.PKE:
            program = SET_PKRU.format(pkru=setting.pkru)
        again = [
            on(reason).vmwrite(Field.GUEST_RIP, NEXT).resume()
            for reason in (
                ExitReason.EPT_VIOLATION,
                ExitReason.EPT_MISCONFIGURATION,
                ExitReason.EXCEPTION_OR_NMI,
            )
        ]
        return Case(
            program=PROGRAM_TEXT.format(start=program),
            registers={"r12": (1 << 64) - 1, "r13": len(self.probes), "r14": int.from_bytes(BACK, "little")},
            ept=self.ept,
            eptp=EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=setting.ept_flags),
            fields=self.fields(capabilities),
            enable=EntryControls.LOAD_IA32_EFER,
            data=self.data,
            memory=self.memory,
            reactions=[*again, on(ExitReason.CPUID).stop()],
            steps=[*STANDARD, *(ReportMemory(at, size) for at, size in self.reported() if flags)],
        )

    def reported(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of all entries that belong to a probe, neighbours together."""
        start = end = 0
        for address in sorted(self.entries):
            if address != end:
                if end:
                    yield start, end - start
                start = address
            end = address + 8
        yield start, end - start

    def fields(self, capabilities) -> dict[Field, int]:
        setting = self.setting
        fields = {
            Field.GUEST_CR0: int(CR0.PG | CR0.PE | CR0.NE | CR0.ET | setting.cr0) | capabilities.cr0_fixed0,
            Field.GUEST_CR3: PML4,
            Field.GUEST_CR4: int(CR4.PAE | setting.cr4) | capabilities.cr4_fixed0,
            Field.GUEST_IA32_EFER: int(EFER.LME | EFER.LMA | setting.efer),
            Field.GUEST_RFLAGS: int(RFLAGS.FIXED1 | setting.rflags),
        }
        if setting.user:
            fields[Field.GUEST_CS_SELECTOR], fields[Field.GUEST_CS_ACCESS_RIGHTS] = 0x08 | 3, 0xA0FB
            fields[Field.GUEST_SS_SELECTOR], fields[Field.GUEST_SS_ACCESS_RIGHTS] = 0x10 | 3, 0xC0F3
            for name in ("DS", "ES", "FS", "GS"):
                fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
        return fields

    def state(self, vmxlab, page_1g: bool | None) -> PagingState:
        fields = self.fields(vmxlab.capabilities)
        return PagingState(
            cr0=fields[Field.GUEST_CR0],
            cr3=PML4,
            cr4=fields[Field.GUEST_CR4],
            efer=fields[Field.GUEST_IA32_EFER],
            rflags=fields[Field.GUEST_RFLAGS],
            pkru=self.setting.pkru,
            maxphyaddr=vmxlab.physical_address_width,
            eptp=EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=self.setting.ept_flags).bits,
            ept_features=vmxlab.capabilities.ept_vpid,
            page_1g=page_1g,
        )

    def known_memory(self) -> MachineMemory:
        """What the oracle reads: EPT's tables, L2's paging structures, and nothing else."""
        known = MachineMemory(self.ept.tables(EPT_TABLES))
        for gpa, content in self.data.items():
            known.write(machine_address(gpa), content)
        for address, value in self.entries.items():
            known.write(address, struct.pack("<Q", value))
        return known


# --- the comparison ----------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What the oracle says of each access, one after the other, and in what the processor differs."""

    compared: int = 0
    unknown: int = 0
    excused: int = 0
    differences: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Comparison) -> None:
        self.compared += other.compared
        self.unknown += other.unknown
        self.excused += other.excused
        self.differences += other.differences
        self.kinds += other.kinds


def compare(vmxlab, machine: Machine, page_1g: bool, *, flags: bool) -> Comparison:
    """Run it, and compare exit by exit and entry by entry."""
    run = vmxlab.run(machine.case(vmxlab.capabilities, flags=flags))
    assert run.reasons[-1:] == [ExitReason.CPUID], run.reasons[-5:]
    exits = {exit_.registers[machine.counter]: exit_ for exit_ in run.exits[:-1]}
    known, state, result = machine.known_memory(), machine.state(vmxlab, page_1g), Comparison()
    possible: dict[int, int] = {}
    skipped: set[int] = set()
    for number, probe in enumerate(machine.probes):
        access = Access(probe.kind, user=machine.setting.user)
        ending = translate(state, machine.linear(number), access, known.read)
        if isinstance(ending, Unknown):
            result.unknown += 1
            skipped.add(number)
            continue
        if is_excused(vmxlab, run, ending):
            result.excused += 1
            skipped.add(number)
            continue
        result.compared += 1
        result.kinds[type(ending).__name__] += 1
        for address, size, value in ending.writes:
            known.write(address, value.to_bytes(size, "little"))
        for address, _, flags in ending.possible_flags:
            possible[address] = possible.get(address, 0) | flags
        said, seen = described(ending), seen_as(vmxlab, run, exits.get(number), ending)
        if said != seen:
            result.differences.append(f"{number}: {probe}: said {said}, seen {seen} ({ending})")
    for start, content in run.memory.items():
        for offset in range(0, len(content), machine.entry_bytes):
            at, piece = start + offset, content[offset : offset + machine.entry_bytes]
            value, want = int.from_bytes(piece, "little"), known.read(at, machine.entry_bytes)
            if machine.owner[at] in skipped or want is None:
                continue
            if (value ^ want) & ~possible.get(at, 0):
                result.differences.append(
                    f"{machine.owner[at]}: {machine.probes[machine.owner[at]]}: entry at {at:#x}: "
                    f"said {want:#x} (maybe {possible.get(at, 0):#x}), seen {value:#x}"
                )
    return result


def described(ending: Translation) -> tuple:
    match ending:
        case Translated():
            return ("no exit",)
        case PageFault():
            return "page fault", hex(ending.linear), hex(ending.error_code)
        case EptViolation():
            return "violation", hex(ending.linear or 0), hex(ending.gpa), hex(ending.qualification.value)
        case EptMisconfiguration():
            return "misconfiguration", hex(ending.gpa)
    raise AssertionError(ending)


def seen_as(vmxlab, run, exit_, ending: Translation) -> tuple:
    """An exit in the same words; of the qualification only the bits that the oracle knows."""
    if exit_ is None:
        return ("no exit",)
    if exit_.reason == ExitReason.EPT_MISCONFIGURATION:
        return "misconfiguration", hex(exit_.guest_physical_address)
    if exit_.reason == ExitReason.EPT_VIOLATION:
        qualification = exit_.raw_qualification
        if isinstance(ending, EptViolation):
            qualification &= ending.qualification.known
            walk = ending.qualification.value & 0x101 == 1
            if walk and differs(vmxlab, run, "ept-ad-walk-without-read-bit"):
                qualification |= 1
        linear, gpa = exit_.guest_linear_address, exit_.guest_physical_address
        return "violation", hex(linear), hex(gpa), hex(qualification)
    assert exit_.interruption.vector == Vector.PF, exit_
    return "page fault", hex(exit_.raw_qualification), hex(exit_.interruption_error_code)


def differs(vmxlab, run, key: str) -> bool:
    info = vmxlab.lab.info_of(run)
    return KNOWN_DIFFERENCES[key].applies(info.name, info.version)


def is_excused(vmxlab, run, ending: Translation) -> bool:
    """A known difference: the engine lets the access through."""
    if isinstance(ending, Unknown) or FLAG_UPDATE_IS_A_WRITE not in ending.rules:
        return False
    return differs(vmxlab, run, "ept-guest-flag-update-not-checked")


class Agreement:
    """What the tests of this folder ask with."""

    Probe, Setting = Probe, Setting

    def __init__(self, vmxlab) -> None:
        self.vmxlab = vmxlab
        vmxlab.require(SecondaryControls.ENABLE_EPT, EntryControls.LOAD_IA32_EFER)
        if vmxlab.physical_address_width < 39:
            pytest.skip("the regions of the probes need 39 bits of physical address")
        self._page_1g: dict[str, bool] = {}

    @property
    def page_1g(self) -> bool:
        """Whether the processor of the test at hand has pages of 1 GiB in L2's own tables."""
        model = self.vmxlab.model
        if model not in self._page_1g:
            page = Probe().with_guest(3, P | W | A | D | PS)
            run = self.vmxlab.run(Machine(Setting(), [page]).case(self.vmxlab.capabilities))
            self._page_1g[model] = run.reasons == [ExitReason.CPUID]
        return self._page_1g[model]

    def require(self, setting: Setting) -> None:
        self.vmxlab.require(*(bit for bit in CR4 if setting.cr4 & bit))
        if setting.ept_flags:
            self.vmxlab.require_ept("accessed_dirty")

    def compare(self, setting: Setting, probes: Iterable[Probe], *, flags: bool = False) -> Comparison:
        """All of them, in as few cases as they fit in."""
        self.require(setting)
        probes, total = list(probes), Comparison()
        for start in range(0, len(probes), MOST_ACCESSES):
            machine = Machine(setting, probes[start : start + MOST_ACCESSES])
            total.add(compare(self.vmxlab, machine, self.page_1g, flags=flags))
        return total

    def holds(self, setting: Setting, probes: Iterable[Probe], *, flags: bool = False) -> Comparison:
        """No difference, and every probe compared; `flags`: of memory, too."""
        return self.has_no_difference(self.compare(setting, probes, flags=flags))

    def of_machine(self, machine) -> Comparison:
        """The same for something like a `Machine`, with its memory."""
        self.require(machine.setting)
        return self.has_no_difference(compare(self.vmxlab, machine, self.page_1g, flags=True))

    @staticmethod
    def has_no_difference(result: Comparison) -> Comparison:
        assert not result.differences, "\n".join(result.differences[:20])
        assert not result.unknown
        return result


@pytest.fixture(scope="session")
def agreement(vmxlab) -> Agreement:
    return Agreement(vmxlab)
