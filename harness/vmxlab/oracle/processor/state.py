"""The state of L2: registers, segments, control and debug registers, and the mode that they make.

A general register, a flag or a debug register may be unknown in part. Where the processor is (RIP, mode,
paging) is always known, or nothing could be predicted any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from vmxlab.oracle.cached import Cached
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell, Unknown
from vmxlab.oracle.vmcs import ModelVmcs
from vmxlab.sdm.controls import ExitControls, PinControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, EFER, GENERAL_REGISTERS, RFLAGS, Vector
from vmxlab.structures import Capabilities

RSP = 4
if TYPE_CHECKING:
    from iced_x86 import Instruction

# Plain numbers: these are looked at with every instruction, and an IntFlag takes ten times as long.
_PE, _LMA, _VM = int(CR0.PE), int(EFER.LMA), int(RFLAGS.VM)
_FLAGS = {flag.name.lower(): int(flag) for flag in RFLAGS if flag.name}
_ARITHMETIC = sum(_FLAGS[name] for name in ("cf", "pf", "af", "zf", "sf", "of"))

UNUSABLE = 1 << 16
"""Of a segment's access rights (SDM Vol. 3C, table 25-2)."""
LONG_CODE = 1 << 13
BIG = 1 << 14


class Mode(Enum):
    """How L2 addresses and decodes."""

    REAL = 16
    PROTECTED = 32
    COMPATIBILITY = 33
    LONG = 64


class Fault(Exception):
    """An exception that an instruction of L2 raises.

    `error_code` None: the exception has none. `linear`: of a page fault. `software`: INT3, INTO (6), INT1 (5)
    or INT n (4), by the type it has in interruption information. `injected`: that type,
    of an event that VM entry injects. `debug`: causes of a #DB, as DR6 has them.
    `trap`: RIP is already behind the instruction.
    """

    def __init__(
        self,
        vector: int,
        error_code: int | None = None,
        *,
        linear: int | None = None,
        software: int = 0,
        debug: int = 0,
        trap: bool = False,
        injected: int | None = None,
        why: str = "",
    ) -> None:
        super().__init__(vector)
        self.vector = vector
        self.error_code = error_code
        self.linear = linear
        self.software = software
        self.debug = debug
        self.trap = trap
        self.injected = injected
        self.why = why


def general_protection(why: str = "") -> Fault:
    """#GP(0)."""
    return Fault(Vector.GP, 0, why=why)


def undefined_opcode(why: str = "") -> Fault:
    """#UD."""
    return Fault(Vector.UD, why=why)


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part; access rights as in the VMCS."""

    selector: int
    base: int
    limit: int
    rights: int

    @property
    def usable(self) -> bool:
        """Whether it is."""
        return not self.rights & UNUSABLE

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return self.rights >> 5 & 3


@dataclass(slots=True)
class Carried:
    """What VM entries and exits leave as it is: state of the processor that no VMCS field holds."""

    cr2: Bits = NOTHING_KNOWN
    debug: dict[int, Bits] = field(default_factory=dict)
    msrs: dict[int, Bits] = field(default_factory=dict)


@dataclass(slots=True)
class Processor:
    """L2 between a VM entry and the exit that ends it."""

    vmcs: ModelVmcs
    capabilities: Capabilities
    width: int
    """MAXPHYADDR."""
    memory: MachineMemory
    carried: Carried
    pin: int
    primary: int
    secondary: int
    exit_controls: int
    registers: list[Bits]
    rip: int
    rflags: Bits
    cr0: int
    cr3: int
    cr4: int
    efer: int
    dr7: Bits
    debugctl: Bits
    segments: dict[str, Segment]
    gdtr: tuple[int, int]
    idtr: tuple[int, int]
    """(base, limit)"""
    sysenter: dict[int, Bits]
    interruptibility: int = 0
    activity: int = 0
    pending_debug: int = 0
    notes: list[Unknown] = field(default_factory=list)
    pdptes: tuple[int, ...] | None = None
    next_rip: int = 0
    cached: Cached = field(default_factory=Cached)
    delivering: bool = False
    """An event is being delivered through the IDT."""
    halted: bool = False
    """HLT has been executed (activity state HLT)."""
    blocks_next: bool = False
    """The instruction at hand makes the blocking by STI or MOV SS that holds for the next one."""
    keeps_rf: bool = False
    """The instruction at hand has loaded RFLAGS.RF (IRET), which others clear (Vol. 3B, 18.3.1.1)."""
    budget: int = 20_000
    """Instructions, and repetitions of string instructions, that are still followed."""
    fetched: dict[tuple[int, ...], Instruction] = field(default_factory=dict)
    """Instructions by where, in which state, and in which version of memory they were fetched."""
    translated: dict[tuple[int | bool, ...], int] = field(default_factory=dict)
    """Where a page lies, by the access and the state that it was translated in."""
    _before: tuple[list[Bits], Bits] | None = None

    # --- controls --------------------------------------------------------------------------------------

    def on(self, flag: PinControls | PrimaryControls | SecondaryControls | ExitControls) -> bool:
        """Whether a control is 1 and in effect."""
        match flag:
            case PinControls():
                return bool(self.pin & flag)
            case PrimaryControls():
                return bool(self.primary & flag)
            case SecondaryControls():
                return bool(self.secondary & flag)
            case _:
                return bool(self.exit_controls & flag)

    # --- instruction by instruction --------------------------------------------------------------------

    def keep_progress(self) -> None:
        """What a fault from now on goes back to."""
        self._before = (list(self.registers), self.rflags)

    def undo(self) -> None:
        """A fault: registers and flags as they were before the instruction."""
        if self._before is not None:
            self.registers, self.rflags = list(self._before[0]), self._before[1]

    def spend(self) -> None:
        """One step further. Raises CannotTell where the program may never end."""
        self.budget -= 1
        if self.budget <= 0:
            raise CannotTell("a program that runs long, or for ever")

    # --- mode ------------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """By CR0.PE, IA32_EFER.LMA and CS.L; virtual-8086 mode is not known here."""
        if not self.cr0 & _PE:
            return Mode.REAL
        if self.rflags.bit(_VM) is not False:
            raise CannotTell("virtual-8086 mode")
        if self.efer & _LMA:
            return Mode.LONG if self.segments["cs"].rights & LONG_CODE else Mode.COMPATIBILITY
        return Mode.PROTECTED

    @property
    def is_long(self) -> bool:
        """64-bit mode."""
        return self.mode is Mode.LONG

    @property
    def bitness(self) -> int:
        """64, 32 or 16: what the decoder has to know."""
        if self.is_long:
            return 64
        return 32 if self.segments["cs"].rights & BIG else 16

    @property
    def cpl(self) -> int:
        """DPL of SS (SDM Vol. 3C, 25.4.1); 0 in real mode."""
        return self.segments["ss"].dpl if self.cr0 & _PE else 0

    def require_cpl0(self) -> None:
        """#GP(0) for CPL above 0."""
        if self.cpl:
            raise general_protection("CPL is above 0")

    # --- general registers -----------------------------------------------------------------------------

    def get(self, index: int, size: int = 8, *, high: bool = False) -> Bits:
        """The lower `size` bytes of a general register; `high`: AH, CH, DH or BH."""
        bits = self.registers[index]
        shift = 8 if high else 0
        mask = (1 << 8 * size) - 1
        return Bits(bits.value >> shift & mask, bits.known >> shift & mask)

    def set(self, index: int, value: Bits | int, size: int = 8, *, high: bool = False) -> None:
        """Write a general register: 4 bytes clear the upper half, 1 and 2 leave it (Vol. 1, 3.4.1.1)."""
        new = Bits(value) if isinstance(value, int) else value
        if size >= 4:
            # Outside 64-bit mode the upper halves can't be seen until a switch to it, and are undefined then.
            mask = (1 << 8 * size) - 1
            upper = self.upper_half_known() if size == 4 else 0
            self.registers[index] = Bits(new.value & mask, new.known & mask | upper)
            return
        shift = 8 if high else 0
        mask = (1 << 8 * size) - 1 << shift
        self.registers[index] = self.registers[index].with_bits(
            mask, Bits(new.value << shift & mask, new.known << shift & mask)
        )

    def upper_half_known(self) -> int:
        """Mask of the bits that writing a 32-bit register clears: known in 64-bit mode alone."""
        return 0xFFFF_FFFF_0000_0000 if self.is_long else 0

    def number(self, index: int, size: int = 8) -> int:
        """A register as a number. Raises CannotTell where it is not known."""
        bits = self.get(index, size)
        return need(bits, size, f"the value of {GENERAL_REGISTERS[index].upper()}")

    # --- flags -----------------------------------------------------------------------------------------

    def flag(self, mask: int) -> bool:
        """One flag. Raises CannotTell where it is not known."""
        value = self.rflags.bit(mask)
        if value is None:
            raise CannotTell(f"RFLAGS.{RFLAGS(mask).name}")
        return value

    def set_flags(self, **flags: bool | None) -> None:
        """Set flags by name (cf, zf, ...); None is not known, or undefined."""
        for name, value in flags.items():
            mask = _FLAGS[name]
            new = Bits(0, 0) if value is None else Bits(mask if value else 0, mask)
            self.rflags = self.rflags.with_bits(mask, new)

    def forget_arithmetic_flags(self) -> None:
        """Nothing is known of CF, PF, AF, ZF, SF, OF any more."""
        self.rflags = self.rflags.with_bits(_ARITHMETIC, NOTHING_KNOWN)

    def note(self, why: str) -> None:
        """Something is unknown from now on, which does not end the prediction."""
        if not any(unknown.why == why for unknown in self.notes):
            self.notes.append(Unknown(why))


def need(bits: Bits, size: int, what: str) -> int:
    """A value of `size` bytes as a number. Raises CannotTell where it is not known."""
    if not bits.knows((1 << 8 * size) - 1):
        raise CannotTell(what)
    return bits.value & (1 << 8 * size) - 1


def sign_extended(value: int, size: int) -> int:
    """A number of `size` bytes in 64 bits."""
    top = 1 << 8 * size - 1
    return ((value & (top << 1) - 1) ^ top) - top & (1 << 64) - 1


def canonical(address: int, cr4: int) -> bool:
    """Whether a linear address is canonical in 48 bits, or 57 with CR4.LA57 (Vol. 1, 3.3.7.1)."""
    bits = 57 if cr4 & 1 << 12 else 48
    return address >> bits - 1 in (0, (1 << 65 - bits) - 1)


GUEST_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")


def segment_fields(name: str) -> tuple[Field, Field, Field, Field]:
    """Selector, base, limit, access rights in the guest-state area."""
    upper = name.upper()
    return (
        Field[f"GUEST_{upper}_SELECTOR"],
        Field[f"GUEST_{upper}_BASE"],
        Field[f"GUEST_{upper}_LIMIT"],
        Field[f"GUEST_{upper}_ACCESS_RIGHTS"],
    )
