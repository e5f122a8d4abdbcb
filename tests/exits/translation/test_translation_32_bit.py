"""The oracle's translation agrees with the processor outside 64-bit mode: 32-bit and PAE paging.

One guest program makes many accesses; each has a page-directory entry and a page-table entry of its own. All
of them lead to the same page.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import product

import pytest

from vmxlab import Case, EntryControls, EPTPointer, ExitReason, Field, Mode, SecondaryControls, guest_ept, on
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import EPT_TABLES
from vmxlab.oracle.accesses import AccessKind, PagingState
from vmxlab.oracle.memory import MachineMemory
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT, EntryControls.LOAD_IA32_EFER)

P, W, U, A, D, PS, XD = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ALL = P | W | U | A | D
KINDS = [AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.READ_MODIFY_WRITE]

ACCESS_TABLE, ROOT, DIRECTORY, TABLE, PAGE = (DATA + 0x1000 * n for n in range(5))
LARGE_PAGE = 4 << 20
"""Guest-physical: where pages of 2 and 4 MiB begin. EPT maps what is accessed of them to PAGE."""
FIRST = 64
"""The first page-directory entry that is a probe's."""

BACK = struct.pack("<BI", 0xB8, PROGRAM) + b"\xff\xe0"  # mov eax, PROGRAM; jmp eax
PROGRAM_TEXT = """
next: inc esi
    cmp esi, ebp
    jae end
    mov edi, [esi*8 + DATA]
    mov ecx, [esi*8 + DATA + 4]
    cmp ecx, 2
    je write
    cmp ecx, 3
    je change
    cmp ecx, 4
    je fetch
    mov eax, [edi]
    jmp next
write: mov [edi], ebx
    jmp next
change: lock or [edi], edx
    jmp next
fetch: jmp edi
end: cpuid
"""


@dataclass(frozen=True)
class Probe:
    kind: AccessKind
    pde: int
    pte: int = ALL


class Machine32:
    """All the probes of a case, as `agreement` wants them."""

    counter = "rsi"

    def __init__(self, setting, probes: list[Probe], *, pae: bool) -> None:
        self.setting, self.probes, self.pae = setting, probes, pae
        self.entry_bytes = 8 if pae else 4
        self.ept = guest_ept()
        self.entries: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        for number, probe in enumerate(probes):
            self.ept.map(LARGE_PAGE + 0x1000 * number, machine_address(PAGE))
            pde = probe.pde | (LARGE_PAGE if probe.pde & PS else TABLE)
            for table, index, value in (
                (DIRECTORY, FIRST + number, pde),
                (TABLE, number, probe.pte | PAGE),
            ):
                at = machine_address(table) + index * self.entry_bytes
                self.entries[at], self.owner[at] = value, number

    def linear(self, number: int) -> int:
        if self.pae:
            return 1 << 30 | (FIRST + number) << 21 | number << 12
        return (FIRST + number) << 22 | number << 12

    @property
    def data(self) -> dict[int, bytes]:
        own = P | W | A | D | PS | (U if self.setting.user else 0)
        accesses = [struct.pack("<II", self.linear(n), probe.kind) for n, probe in enumerate(self.probes)]
        form = "Q" if self.pae else "I"

        def packed(table: int, first: int) -> bytes:
            at = machine_address(table) + first * self.entry_bytes
            values = [self.entries[at + n * self.entry_bytes] for n in range(len(self.probes))]
            return struct.pack(f"<{len(values)}{form}", *values)

        identity = {ROOT if self.pae else DIRECTORY: struct.pack(f"<{form}", own)}
        return {
            ACCESS_TABLE: b"".join(accesses),
            **identity,
            DIRECTORY + FIRST * self.entry_bytes: packed(DIRECTORY, FIRST),
            TABLE: packed(TABLE, 0),
            PAGE: BACK.ljust(8, b"\x90") * (4096 // 8),
        }

    def case(self, capabilities, *, flags: bool) -> Case:
        reasons = (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION, ExitReason.EXCEPTION_OR_NMI)
        again = [on(reason).vmwrite(Field.GUEST_RIP, PROGRAM).resume() for reason in reasons]
        size = self.entry_bytes * len(self.probes)
        reports = [
            ReportMemory(machine_address(DIRECTORY) + FIRST * self.entry_bytes, size),
            ReportMemory(machine_address(TABLE), size),
        ]
        return Case(
            program=PROGRAM_TEXT,
            mode=Mode.PROTECTED,
            registers={
                "rsi": 0xFFFF_FFFF,
                "rbp": len(self.probes),
                "rbx": int.from_bytes(BACK[:4], "little"),
            },
            ept=self.ept,
            eptp=EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=False),
            fields=self.fields(capabilities),
            enable=EntryControls.LOAD_IA32_EFER,
            data=self.data,
            reactions=[*again, on(ExitReason.CPUID).stop()],
            steps=[*STANDARD, *reports],
        )

    def fields(self, capabilities) -> dict[Field, int]:
        cr4 = CR4.PAE if self.pae else CR4.PSE
        fields = {
            Field.GUEST_CR0: int(CR0.PG | CR0.PE | CR0.NE | CR0.ET | self.setting.cr0)
            | capabilities.cr0_fixed0,
            Field.GUEST_CR3: ROOT if self.pae else DIRECTORY,
            Field.GUEST_CR4: int(cr4 | self.setting.cr4) | capabilities.cr4_fixed0,
            Field.GUEST_IA32_EFER: int(self.setting.efer),
            Field.GUEST_RFLAGS: int(RFLAGS.FIXED1 | self.setting.rflags),
        }
        if self.pae:
            pdptes = [ROOT | 1, DIRECTORY | 1, 0, 0]
            fields |= {Field[f"GUEST_PDPTE{n}"]: value for n, value in enumerate(pdptes)}
        if self.setting.user:
            fields[Field.GUEST_CS_SELECTOR], fields[Field.GUEST_CS_ACCESS_RIGHTS] = 0x08 | 3, 0xC0FB
            fields[Field.GUEST_SS_SELECTOR], fields[Field.GUEST_SS_ACCESS_RIGHTS] = 0x10 | 3, 0xC0F3
            for name in ("DS", "ES", "FS", "GS"):
                fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
        return fields

    def state(self, vmxlab, page_1g: bool) -> PagingState:
        fields = self.fields(vmxlab.capabilities)
        return PagingState(
            cr0=fields[Field.GUEST_CR0],
            cr3=fields[Field.GUEST_CR3],
            cr4=fields[Field.GUEST_CR4],
            efer=fields[Field.GUEST_IA32_EFER],
            rflags=fields[Field.GUEST_RFLAGS],
            pdptes=(ROOT | 1, DIRECTORY | 1, 0, 0) if self.pae else None,
            maxphyaddr=vmxlab.physical_address_width,
            pse36=True,  # as on each processor with 64-bit mode
            page_1g=page_1g,
            eptp=EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=False).bits,
            ept_features=vmxlab.capabilities.ept_vpid,
        )

    def known_memory(self) -> MachineMemory:
        known = MachineMemory(self.ept.tables(EPT_TABLES))
        for gpa, content in self.data.items():
            known.write(machine_address(gpa), content)
        return known


SETTINGS = {
    "user": {"user": True},
    "supervisor": {},
    "supervisor-without-wp": {"cr0": 0},
    "smep-smap": {"cr4": CR4.SMEP | CR4.SMAP},
    "smap-with-ac": {"cr4": CR4.SMAP, "rflags": RFLAGS.AC},
}
WITH_NXE = pytest.mark.parametrize("efer", [0, EFER.NXE], ids=["no-nxe", "nxe"])
BY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@BY_SETTING
def test_32_bit_paging(agreement, setting):
    """Vol. 3A, 4.3, 4.6.1, 4.7, 4.8: rights, page sizes, reserved bits, flags; no bit disables execution."""
    rights = (0, W, U, W | U)
    pairs = [(P | above, P | below) for above, below in product(rights, rights)]
    pairs += [(P | PS | bits | flags, 0) for bits in rights for flags in (0, A, D, A | D)]
    pairs += [(0, ALL), (W | U | A | PS, ALL), (ALL, 0), (ALL, W | U), (ALL, ALL | PS)]
    pairs += [(ALL | PS | 1 << bit, 0) for bit in (8, 12, 21)]
    probes = [Probe(kind, *pair) for kind in KINDS for pair in pairs]
    made = agreement.Setting(**{"efer": 0, **setting})
    for start in range(0, len(probes), 60):
        agreement.of_machine(Machine32(made, probes[start : start + 60], pae=False))


@WITH_NXE
@BY_SETTING
def test_pae_paging(agreement, setting, efer):
    """Vol. 3A, 4.4.2, 4.6.1, 4.7, 4.8: the same, with XD, and wide addresses."""
    rights = (W, W | U, U, W | U | XD)
    pairs = [(P | above, P | below) for above, below in product(rights, rights)]
    pairs += [(P | PS | bits | flags, 0) for bits in rights for flags in (0, A | D)]
    pairs += [(0, ALL), (ALL, 0), (ALL, W | U | XD), (ALL, ALL | PS)]
    pairs += [(ALL | PS | 1 << bit, 0) for bit in (8, 12, 13, 20, 52, 62)]
    pairs += [(ALL | 1 << bit, ALL) for bit in (9, 52, 62)] + [(ALL, ALL | 1 << bit) for bit in (9, 52, 62)]
    probes = [Probe(kind, *pair) for kind in KINDS for pair in pairs]
    made = agreement.Setting(**{**setting, "efer": efer})
    for start in range(0, len(probes), 60):
        agreement.of_machine(Machine32(made, probes[start : start + 60], pae=True))
