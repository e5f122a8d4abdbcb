"""A sweep: one question, asked for each value of a register.

`Sweep` is a step of a case: the monitor enters L2 once for each value, and folds what it saw of the exit into
a CRC-32. One record comes back for each block of values (`vmxlab.oracle.sweep` computes the same digests).

`Question` is what people ask: an instruction, the values of the register it takes its port or MSR from, and
the bitmaps. It makes the case. The program is that instruction with VMCALL behind it, so that "it does not
exit" is an exit too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import Enum

from vmxlab.cases.case import Case, Limits
from vmxlab.cases.memory import IDT, PROGRAM, STACK_TOP
from vmxlab.cases.steps import Step, Vmclear, Vmptrld, Vmxon, WriteVmcs
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector
from vmxlab.structures import Capabilities, IOBitmap, MsrBitmap

U64_MASK = (1 << 64) - 1
MAX_OFFSETS = 16
MAX_FIELDS = 8
REASONS = 128
"""A sweep's exit reasons are 0 to 127."""

DEADLY = frozenset(
    {
        ExitReason.TRIPLE_FAULT,
        ExitReason.INIT_SIGNAL,
        ExitReason.SIPI,
        ExitReason.ENTRY_FAILURE_GUEST_STATE,
        ExitReason.ENTRY_FAILURE_MSR_LOADING,
        ExitReason.ENTRY_FAILURE_MACHINE_CHECK,
        ExitReason.PREEMPTION_TIMER,
    }
)
"""L2 is dead after these, or hangs: a sweep ends there, with the exit's full record."""


class Swept(Enum):
    """The bitmap that a walk changes."""

    IO = "io"
    MSR = "msr"


@dataclass(frozen=True, slots=True)
class Walk:
    """Bit `first` + n * `stride` of a bitmap is `value` while the n-th value is asked; then it is put back.

    Bits are counted from the bitmap's first byte; both I/O bitmaps are one of 65,536 bits.
    """

    bitmap: Swept
    first: int
    value: bool
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("first", "stride"):
            if not 0 <= getattr(self, name) < 1 << 32:
                raise OutOfRange(f"Walk.{name}", getattr(self, name), "32 bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Step):
    """Enter L2 for each value of a register: `first` + n * `stride`, n from 0 to `count` - 1.

    register   takes the value; all others, and RIP, are put back for each entry
    offsets    each value is asked with these added to it, one after the other
    mask       ANDed to what goes into the register
    rip        where L2 starts each time
    block      values in one digest
    walk       the bit that is changed for each value
    fields     what the digest holds of an exit besides the register's value, the exit reason and RIP
    exception_fields
               the same of an exit by an exception, for which other fields are defined (SDM Vol. 3C, 28.2.2)
    stop       the exit reasons that end the sweep; a failed VM entry always does
    report_all every exit is reported in full as well
    resume     the VMCS has been launched already
    """

    register: str
    first: int
    count: int
    stride: int = 1
    offsets: tuple[int, ...] = (0,)
    mask: int = U64_MASK
    rip: int = PROGRAM
    block: int = 4096
    walk: Walk | None = None
    fields: tuple[Field, ...] = (Field.EXIT_QUALIFICATION, Field.EXIT_INSTRUCTION_LENGTH)
    exception_fields: tuple[Field, ...] = (
        Field.EXIT_QUALIFICATION,
        Field.EXIT_INTERRUPTION_INFORMATION,
        Field.EXIT_INTERRUPTION_ERROR_CODE,
    )
    stop: frozenset[ExitReason] = DEADLY
    report_all: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        """Raise CaseError or OutOfRange for what the monitor could not do."""
        if self.register not in GENERAL_REGISTERS or self.register == "rsp":
            raise CaseError(
                f"a sweep can't run over register {self.register!r}",
                advice="a general register other than rsp, which the VMCS holds",
            )
        for name, bits in (("first", 64), ("stride", 64), ("mask", 64), ("rip", 64)):
            if not 0 <= getattr(self, name) < 1 << bits:
                raise OutOfRange(f"Sweep.{name}", getattr(self, name), f"{bits} bits")
        for name in ("count", "block"):
            if not 1 <= getattr(self, name) < 1 << 32:
                raise OutOfRange(f"Sweep.{name}", getattr(self, name), "1 to 2^32-1")
        if not 1 <= len(self.offsets) <= MAX_OFFSETS:
            raise OutOfRange("number of offsets of a sweep", len(self.offsets), f"1 to {MAX_OFFSETS}")
        for fields in (self.fields, self.exception_fields):
            if len(fields) > MAX_FIELDS:
                raise OutOfRange("number of fields in a sweep's digest", len(fields), f"at most {MAX_FIELDS}")

    @property
    def exits(self) -> int:
        """How many exits it makes."""
        return self.count * len(self.offsets)

    def values(self) -> list[int]:
        """What goes into the register, in order."""
        mask = self.mask
        starts = range(self.first, self.first + self.count * self.stride, self.stride or 1)
        if self.stride == 0:
            return [self.first + offset & mask for _ in range(self.count) for offset in self.offsets]
        if self.offsets == (0,):
            return [start & mask for start in starts]
        return [start + offset & mask for start in starts for offset in self.offsets]


class Instruction(Enum):
    """An instruction that a question is about, with the port in DX or the MSR in ECX."""

    IN_AL = ("IN AL, DX", "ec", 1)
    IN_AX = ("IN AX, DX", "66ed", 2)
    IN_EAX = ("IN EAX, DX", "ed", 4)
    OUT_AL = ("OUT DX, AL", "ee", 1)
    OUT_AX = ("OUT DX, AX", "66ef", 2)
    OUT_EAX = ("OUT DX, EAX", "ef", 4)
    RDMSR = ("RDMSR", "0f32", 0)
    WRMSR = ("WRMSR", "0f30", 0)

    def __init__(self, text: str, code: str, size: int) -> None:
        self.text = text
        self.code = bytes.fromhex(code)
        self.size = size
        """Bytes that an I/O instruction moves; 0 of the others."""

    @property
    def is_io(self) -> bool:
        """IN or OUT."""
        return self.size > 0

    @property
    def is_in(self) -> bool:
        """IN."""
        return self.text.startswith("IN")

    @property
    def register(self) -> str:
        """The register with the port or the MSR."""
        return "rdx" if self.is_io else "rcx"


VMCALL = bytes.fromhex("0f01c1")
DEADLINE_S = 60.0
EXITS_PER_SECOND_AT_LEAST = 200
"""For deadlines: no engine is slower than that, though the host may do other work besides."""

CHEAPER_EXITS = (SecondaryControls.UNRESTRICTED_GUEST,)
"""Controls that have no say in what a question asks (SDM Vol. 3C, 26.1.3), and make its exits cheaper.

Measured on kvm-in-bochs: KVM does not look at the segments of L2 at each entry then, which takes 4,000 of
some 15,000 instructions between two exits. (A VPID makes no difference there.)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """An instruction, the values of its register, and what is intercepted.

    io_bitmap, msr_bitmap   as in a case: without one every access exits
    walk                    True: each value has its own bit set while it is asked; False: cleared
    offsets                 the values asked for each value: its neighbours
    high                    bits above the port or MSR in the register, which the instruction does not look at
    """

    name: str
    instruction: Instruction
    first: int
    count: int
    stride: int = 1
    offsets: tuple[int, ...] = (0,)
    high: int = 0
    io_bitmap: IOBitmap | None = None
    msr_bitmap: MsrBitmap | None = None
    walk: bool | None = None
    enable: tuple[BitFlags, ...] = ()
    block: int = 4096
    report_all: bool = False

    def __post_init__(self) -> None:
        """Raise CaseError for a walk over bits that are not there, OutOfRange for values out of range."""
        for name in ("count", "stride"):
            if not 1 <= getattr(self, name) < 1 << 32:
                raise OutOfRange(f"Question.{name}", getattr(self, name), "1 to 2^32-1")
        last = self.first + (self.count - 1) * self.stride
        if not 0 <= self.first <= last <= self.operand_mask:
            raise OutOfRange(
                f"last value of the sweep {self.name!r}", last, f"{self.instruction.text} has fewer"
            )
        if self.high & self.operand_mask:
            raise CaseError(
                f"upper bits {self.high:#x} of the sweep {self.name!r}: they belong to the operand"
            )
        if self.walk is not None:
            if (self.io_bitmap if self.instruction.is_io else self.msr_bitmap) is None:
                raise CaseError(f"the sweep {self.name!r} walks over a bitmap that it does not use")
            self.bit_of(self.first)
            if self.bit_of(last) - self.bit_of(self.first) != last - self.first:
                raise CaseError(f"the sweep {self.name!r} walks over MSRs that have no bit")

    @property
    def is_write(self) -> bool:
        """OUT or WRMSR."""
        return self.instruction is Instruction.WRMSR or (
            self.instruction.is_io and not self.instruction.is_in
        )

    @property
    def operand_mask(self) -> int:
        """The bits of the register that the instruction looks at: DX, or ECX."""
        return 0xFFFF if self.instruction.is_io else 0xFFFF_FFFF

    @property
    def exits(self) -> int:
        """How many exits it makes."""
        return self.count * len(self.offsets)

    def bit_of(self, value: int) -> int:
        """The number of a port's or MSR's bit in its bitmap (SDM Vol. 3C, 25.6.4 and 25.6.9)."""
        if self.instruction.is_io:
            return value
        start = 0x4000 if self.instruction is Instruction.WRMSR else 0
        if value < 0x2000:
            return start + value
        if 0xC000_0000 <= value < 0xC000_2000:
            return start + 0x2000 + value - 0xC000_0000
        raise CaseError(f"MSR {value:#x} has no bit in the MSR bitmap")

    def part(self, at: int, count: int, *, block: int | None = None, report_all: bool = False) -> Question:
        """The same, for `count` values from the `at`-th on."""
        return replace(
            self,
            first=self.first + at * self.stride,
            count=count,
            block=block or self.block,
            report_all=report_all,
        )

    def suited_to(self, capabilities: Capabilities) -> Question:
        """The same, with those of CHEAPER_EXITS that this processor has."""
        wanted = [flag for flag in CHEAPER_EXITS if capabilities.supports(flag)]
        return replace(self, enable=tuple(dict.fromkeys((*self.enable, *wanted))))

    def sweep(self) -> Sweep:
        """The step."""
        walk = None
        if self.walk is not None:
            which = Swept.IO if self.instruction.is_io else Swept.MSR
            walk = Walk(which, self.bit_of(self.first), self.walk, self.stride)
        return Sweep(
            register=self.instruction.register,
            first=self.first | self.high,
            count=self.count,
            stride=self.stride,
            offsets=self.offsets,
            mask=self.operand_mask | self.high,
            walk=walk,
            block=self.block,
            report_all=self.report_all,
        )

    def program(self) -> bytes:
        """The instruction, VMCALL; and behind them what a #GP comes to: VMCALL as well.

        Whether an MSR exists is not a question about VMX: RDMSR that does not exit ends at the same VMCALL,
        with a value or with #GP(0).
        """
        code = self.instruction.code + VMCALL
        if self.instruction.is_io:
            return code
        handler = b"\xbc" + struct.pack("<I", STACK_TOP)  # MOV ESP, STACK_TOP
        back = len(self.instruction.code) - (len(code) + len(handler) + 2)
        return code + handler + b"\xeb" + struct.pack("<b", back)  # JMP to the VMCALL

    def case(self) -> Case:
        """The case that asks it."""
        data: dict[int, bytes] = {}
        fields: dict[Field, int] = {}
        if not self.instruction.is_io:
            handler = PROGRAM + len(self.instruction.code) + len(VMCALL)
            data[IDT + 16 * Vector.GP] = _interrupt_gate(handler)
            fields[Field.GUEST_IDTR_LIMIT] = 16 * (Vector.GP + 1) - 1
            fields[Field.EXCEPTION_BITMAP] = 0xFFFF_FFFF & ~(1 << Vector.GP)
        return Case(
            name=self.name,
            program=self.program(),
            io_bitmap=self.io_bitmap,
            msr_bitmap=self.msr_bitmap,
            enable=self.enable,
            data=data,
            fields=fields,
            steps=(Vmxon(), Vmclear(), Vmptrld(), WriteVmcs(), self.sweep()),
            limits=Limits(seconds=DEADLINE_S + self.exits / EXITS_PER_SECOND_AT_LEAST),
        )


def _interrupt_gate(handler: int) -> bytes:
    """A 64-bit interrupt gate to the code segment of L2 (SDM Vol. 3A, 6.14.1)."""
    return struct.pack("<HHBBHII", handler & 0xFFFF, 0x08, 0, 0x8E, handler >> 16 & 0xFFFF, 0, 0)
