"""The case: one question to a processor.

A case states only what differs from the valid baseline: `Case()` alone enters L2, executes HLT there, exits
and ends, on any processor with VMX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vmxlab.cases.memory import L2_MEMORY_BYTES, PROGRAM, PROGRAM_LIMIT
from vmxlab.cases.needs import checked_needs
from vmxlab.cases.program import Mode
from vmxlab.cases.reactions import Reaction, SetRegister, require_field_value
from vmxlab.cases.steps import STANDARD, Step
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.structures import (
    Ept,
    EPTPointer,
    IOBitmap,
    MsrArea,
    MsrBitmap,
    PostedInterruptDescriptor,
    VirtualApicPage,
    VmxRegion,
)
from vmxlab.structures.capabilities import Need

MAX_NAME = 64
MAX_WATCHED = 64
MAX_REACTIONS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a case ends if nothing else ends it.

    `exits`: so many exits are reported, then the case ends. `l2_tsc`: TSC ticks that L2 may run after each VM
    entry, by the VMX-preemption timer where the processor has one; None takes what suits the engine.
    `seconds`: the host's deadline for the whole case; None takes the engine's.
    """

    exits: int = 1000
    l2_tsc: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.exits <= 0xFFFF_FFFF:
            raise OutOfRange("Limits.exits", self.exits, "1 to 2^32-1")
        if self.l2_tsc is not None and self.l2_tsc < 1:
            raise OutOfRange("Limits.l2_tsc", self.l2_tsc, "at least 1 tick")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise CaseError(f"Limits.seconds is {self.seconds}: a deadline lies in the future, and comes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question: structures, controls, a guest program, reactions to exits, limits.

    program      guest program: assembly (Intel syntax, statements divided by ";" or newlines) or machine code
    name         up to 64 printable characters without space, '=' or '*'; shown in the log
    mode         64-bit, 32-bit protected, or real mode (needs "unrestricted guest")
    io_bitmap    given: "use I/O bitmaps" is set; else "unconditional I/O exiting"
    msr_bitmap   given: "use MSR bitmaps" is set; else every RDMSR and WRMSR exits
    ept          given: it replaces `guest_ept()`; needs EPT
    eptp         an EPTP to use instead of the one that points to the case's EPT (any 64-bit value)
    vmxon_region, vmcs_region
                 given: the region's own first word instead of the processor's revision identifier
    shadow_vmcs  a region for the VMCS link pointer: its revision is the processor's, its shadow bit set
    vmread_bitmap, vmwrite_bitmap
                 4 KiB each, for VMCS shadowing
    virtual_apic_page
                 given: "use TPR shadow" is set; with that control and none given, it is all zeros. For
                 "virtualize APIC accesses" the case's EPT maps vmxlab.image.layout.APIC_ACCESS_PAGE
    entry_msr_load, exit_msr_store, exit_msr_load
                 MSR areas, and with them their counts; else the counts are 0
    posted_interrupts
                 given: "process posted interrupts" is set
    enable, disable
                 controls by name (PrimaryControls.RDTSC_EXITING, ...) to set or clear over the baseline. What
                 the processor can't do raises MissingCapability: the case is skipped
    raw_controls a whole control field as it is, legal or not
    fields       VMCS fields to write over the baseline, legal or not
    registers    L2's general registers at entry (RSP here, too); the rest are 0
    data         bytes in L2's own memory, by L2's addresses
    memory       bytes in the machine's memory, by its addresses
    watch        VMCS fields that each exit shows besides the standard ones
    reactions    see vmxlab.cases.reactions
    steps        the VMX instructions, see vmxlab.cases.steps
    second_program
                 what a second processor does meanwhile: 32-bit assembly or machine code (see
                 vmxlab.cases.second_processor); given: the machine has two processors
    needs        what the processor must have though the case does not enable it: controls, fields of
                 capability MSRs (EptVpidCap.page_1g), bits of CR0 or CR4 (CR4.SMXE)
    expect       the exit reasons that must come, for `vmxlab run`'s verdict; None: any
    """

    program: str | bytes = "hlt"
    name: str = ""
    mode: Mode = Mode.LONG
    io_bitmap: IOBitmap | None = None
    msr_bitmap: MsrBitmap | None = None
    ept: Ept | None = None
    eptp: EPTPointer | int | None = None
    vmxon_region: VmxRegion | None = None
    vmcs_region: VmxRegion | None = None
    shadow_vmcs: bool = False
    vmread_bitmap: bytes | None = None
    vmwrite_bitmap: bytes | None = None
    virtual_apic_page: VirtualApicPage | None = None
    entry_msr_load: MsrArea | None = None
    exit_msr_store: MsrArea | None = None
    exit_msr_load: MsrArea | None = None
    posted_interrupts: PostedInterruptDescriptor | None = None
    enable: BitFlags | Iterable[BitFlags] = ()
    disable: BitFlags | Iterable[BitFlags] = ()
    raw_controls: Mapping[ControlSet, int] = field(default_factory=dict)
    fields: Mapping[Field, int] = field(default_factory=dict)
    registers: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[int, bytes] = field(default_factory=dict)
    memory: Mapping[int, bytes] = field(default_factory=dict)
    watch: Iterable[Field] = ()
    reactions: Iterable[Reaction] = ()
    steps: Iterable[Step] = STANDARD
    needs: BitFlags | Iterable[Need] = ()
    limits: Limits = field(default_factory=Limits)
    second_program: str | bytes | None = None
    expect: Iterable[ExitReason | int] | None = None

    def __post_init__(self) -> None:
        """Check all that can be checked without a processor; keep a copy of all that could change later."""
        set_ = object.__setattr__
        for name in ("enable", "disable"):
            set_(self, name, _controls(name, getattr(self, name)))
        set_(self, "needs", checked_needs(self.needs))
        for name in ("reactions", "steps"):
            set_(self, name, tuple(getattr(self, name)))
        for name in ("raw_controls", "registers", "data", "memory"):
            set_(self, name, dict(getattr(self, name)))
        for name in ("io_bitmap", "msr_bitmap", "ept", "virtual_apic_page"):
            structure = getattr(self, name)
            if structure is not None:
                set_(self, name, structure.copy())
        _refuse_contradiction(self.enable, self.disable)
        set_(self, "fields", _fields(self.fields))
        set_(self, "watch", tuple(as_field(key) for key in self.watch))
        if self.expect is not None:
            set_(self, "expect", tuple(self.expect))
        self._check_name()
        self._check_values()
        self._check_sizes()

    def _check_name(self) -> None:
        bad = [c for c in self.name if not "!" <= c <= "~" or c in "=*"]
        if bad or len(self.name) > MAX_NAME:
            raise CaseError(
                f"case name {self.name!r} can't stand in a record",
                advice=f"up to {MAX_NAME} printable ASCII characters, without space, '=' and '*'",
            )

    def _check_values(self) -> None:
        for key, value in self.fields.items():
            require_field_value(key, value)
        for register, value in self.registers.items():
            SetRegister(register, value)
        for controls, value in self.raw_controls.items():
            require_field_value(controls.field, value)
        if isinstance(self.eptp, int) and not 0 <= self.eptp < 1 << 64:
            raise OutOfRange("EPTP", self.eptp, "64 bits")
        for gpa, data in self.data.items():
            if gpa < 0 or gpa + len(data) > L2_MEMORY_BYTES:
                raise OutOfRange(
                    f"data of {len(data)} bytes at L2 address", gpa, f"L2 has {L2_MEMORY_BYTES:#x} bytes"
                )
        for bitmap in (self.vmread_bitmap, self.vmwrite_bitmap):
            if bitmap is not None and len(bitmap) != 4096:
                raise OutOfRange("size of a VMREAD or VMWRITE bitmap", len(bitmap), "exactly 4096 bytes")

    @property
    def processors(self) -> int:
        """How many logical processors the machine must have."""
        return 1 if self.second_program is None else 2

    def _check_sizes(self) -> None:
        for program in (self.program, self.second_program):
            if isinstance(program, bytes) and len(program) > PROGRAM_LIMIT - PROGRAM:
                raise OutOfRange("size of a program", len(program), f"{PROGRAM_LIMIT - PROGRAM:#x} bytes")
        for what, have, limit in (
            ("watched fields", len(tuple(self.watch)), MAX_WATCHED),
            ("reactions", len(tuple(self.reactions)), MAX_REACTIONS),
        ):
            if have > limit:
                raise OutOfRange(f"number of {what}", have, f"at most {limit}")


def _controls(name: str, flags: BitFlags | Iterable[BitFlags]) -> tuple[BitFlags, ...]:
    try:
        flags = (flags,) if isinstance(flags, BitFlags) else tuple(flags)
        for flag in flags:
            ControlSet.of(flag)
    except TypeError as error:
        raise CaseError(
            f"{name}: {error}", advice="a control is written PrimaryControls.RDTSC_EXITING, for example"
        ) from None
    return flags


def _refuse_contradiction(enable: Iterable[BitFlags], disable: Iterable[BitFlags]) -> None:
    off = tuple(disable)
    for on in enable:
        for flag in off:
            if type(on) is type(flag) and on & flag:
                raise CaseError(f"the case enables and disables {(on & flag).describe()}")


def _fields(values: Mapping[Field, int]) -> dict[Field, int]:
    fields: dict[Field, int] = {}
    for key, value in values.items():
        field_ = as_field(key)
        if field_ in fields:
            raise CaseError(f"the case gives VMCS field {field_.name} twice, under different keys")
        fields[field_] = value
    return fields


def as_field(key: Field | str | int) -> Field:
    """A field by name, encoding or itself; UnknownField where Appendix B has none such."""
    if isinstance(key, Field):
        return key
    if isinstance(key, str):
        return Field.parse(key)
    return Field.parse(f"{key:#x}")
