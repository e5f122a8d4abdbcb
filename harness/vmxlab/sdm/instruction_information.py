"""The VM-exit instruction-information field: operands of the instruction that caused an exit.

SDM Vol. 3C, 28.2.5, Tables 28-8 to 28-16. Nearly all formats describe a memory operand in the same bits
(`MemoryOperand`); the displacement is in the exit qualification. Registers are indices into
GENERAL_REGISTERS. As with exit qualifications, any reason and any 32-bit value decode, undefined bits
included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.sdm.exit_reasons import ExitReason, basic_reason
from vmxlab.sdm.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS


def _bit(raw: int, number: int) -> bool:
    return bool(raw >> number & 1)


def _bits(raw: int, high: int, low: int) -> int:
    return raw >> low & (1 << high - low + 1) - 1


def segment_name(index: int) -> str:
    """The segment register of a 3-bit index; 6 and 7 are not used."""
    return SEGMENT_REGISTERS[index] if index < len(SEGMENT_REGISTERS) else f"segment {index}"


@dataclass(frozen=True, slots=True)
class MemoryOperand:
    """Segment, base, index and scale of a memory operand.

    `address_size` is in bits: 16 << the field's code, so that codes the manual doesn't use (3 and up) give
    sizes that don't exist. `index` and `base` are None where the operand has none; `scale` is 1, 2, 4 or 8
    and means nothing without an index.
    """

    address_size: int
    segment: int
    base: int | None
    index: int | None
    scale: int

    @classmethod
    def decode(cls, raw: int) -> MemoryOperand:
        """From the bits that Tables 28-9, 28-10, 28-11, 28-14 and 28-15 share."""
        return cls(
            address_size=16 << _bits(raw, 9, 7),
            segment=_bits(raw, 17, 15),
            base=None if _bit(raw, 27) else _bits(raw, 26, 23),
            index=None if _bit(raw, 22) else _bits(raw, 21, 18),
            scale=1 << _bits(raw, 1, 0),
        )

    def describe(self) -> str:
        """Such as "ds:[rax+rcx*4+disp], 64-bit address"."""
        parts = [] if self.base is None else [GENERAL_REGISTERS[self.base]]
        if self.index is not None:
            parts.append(GENERAL_REGISTERS[self.index] + (f"*{self.scale}" if self.scale > 1 else ""))
        inner = "+".join([*parts, "disp"])
        return f"{segment_name(self.segment)}:[{inner}], {self.address_size}-bit address"


@dataclass(frozen=True, slots=True)
class InstructionInformation:
    """What is known of an exiting instruction; by itself: of one the manual gives no format for."""

    raw: int

    def describe(self) -> str:
        """The raw value, or "-" where it is 0."""
        return f"{self.raw:#x}" if self.raw else "-"


@dataclass(frozen=True, slots=True)
class StringIoInformation(InstructionInformation):
    """INS and OUTS (Table 28-8), where IA32_VMX_BASIC[54] is 1. The segment is undefined for INS."""

    address_size: int
    segment: int

    @classmethod
    def decode(cls, raw: int) -> StringIoInformation:
        """From the field."""
        return cls(raw, 16 << _bits(raw, 9, 7), _bits(raw, 17, 15))

    def describe(self) -> str:
        """Such as "segment ds, 64-bit address"."""
        return f"{segment_name(self.segment)}, {self.address_size}-bit address"


@dataclass(frozen=True, slots=True)
class InvalidationInformation(InstructionInformation):
    """INVEPT, INVPCID, INVVPID (Table 28-9): the descriptor in memory and the register with the type."""

    memory: MemoryOperand
    register2: int

    @classmethod
    def decode(cls, raw: int) -> InvalidationInformation:
        """From the field."""
        return cls(raw, MemoryOperand.decode(raw), _bits(raw, 31, 28))

    def describe(self) -> str:
        """Such as "type in rax, ds:[rbx+disp], 64-bit address"."""
        return f"type in {GENERAL_REGISTERS[self.register2]}, {self.memory.describe()}"


_DESCRIPTOR_TABLE_INSTRUCTIONS = ("SGDT", "SIDT", "LGDT", "LIDT")
_SYSTEM_SEGMENT_INSTRUCTIONS = ("SLDT", "STR", "LLDT", "LTR")


@dataclass(frozen=True, slots=True)
class DescriptorTableInformation(InstructionInformation):
    """SGDT, SIDT, LGDT, LIDT (Table 28-10). `operand_size` is 16 or 32, undefined from 64-bit mode."""

    instruction: str
    memory: MemoryOperand
    operand_size: int

    @classmethod
    def decode(cls, raw: int) -> DescriptorTableInformation:
        """From the field."""
        name = _DESCRIPTOR_TABLE_INSTRUCTIONS[_bits(raw, 29, 28)]
        return cls(raw, name, MemoryOperand.decode(raw), 32 if _bit(raw, 11) else 16)

    def describe(self) -> str:
        """Such as "LGDT ds:[rax+disp], 64-bit address"."""
        return f"{self.instruction} {self.memory.describe()}"


@dataclass(frozen=True, slots=True)
class SystemSegmentInformation(InstructionInformation):
    """SLDT, STR, LLDT, LTR (Table 28-11): either `register` or `memory` is None."""

    instruction: str
    register: int | None
    memory: MemoryOperand | None

    @classmethod
    def decode(cls, raw: int) -> SystemSegmentInformation:
        """From the field."""
        name = _SYSTEM_SEGMENT_INSTRUCTIONS[_bits(raw, 29, 28)]
        return cls(raw, name, *_register_or_memory(raw))

    def describe(self) -> str:
        """Such as "STR rax" or "LTR ds:[rax+disp], 64-bit address"."""
        return f"{self.instruction} {_describe_either(self.register, self.memory)}"


@dataclass(frozen=True, slots=True)
class RandomInformation(InstructionInformation):
    """RDRAND and RDSEED (Table 28-12): destination, and its size in bits (16 << the code; 3 isn't used)."""

    register: int
    operand_size: int

    @classmethod
    def decode(cls, raw: int) -> RandomInformation:
        """From the field."""
        return cls(raw, _bits(raw, 6, 3), 16 << _bits(raw, 12, 11))

    def describe(self) -> str:
        """Such as "to rax, 64 bits"."""
        return f"to {GENERAL_REGISTERS[self.register]}, {self.operand_size} bits"


@dataclass(frozen=True, slots=True)
class RegisterInformation(InstructionInformation):
    """TPAUSE and UMWAIT (Table 28-13): the source register. URDMSR and UWRMSR use the same bits (later)."""

    register: int

    @classmethod
    def decode(cls, raw: int) -> RegisterInformation:
        """From the field."""
        return cls(raw, _bits(raw, 6, 3))

    def describe(self) -> str:
        """Such as "rax"."""
        return GENERAL_REGISTERS[self.register]


@dataclass(frozen=True, slots=True)
class MemoryInformation(InstructionInformation):
    """VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS, XSAVES (Table 28-14)."""

    memory: MemoryOperand

    @classmethod
    def decode(cls, raw: int) -> MemoryInformation:
        """From the field."""
        return cls(raw, MemoryOperand.decode(raw))

    def describe(self) -> str:
        """Such as "ds:[rax+disp], 64-bit address"."""
        return self.memory.describe()


@dataclass(frozen=True, slots=True)
class FieldAccessInformation(InstructionInformation):
    """VMREAD and VMWRITE (Table 28-15): the data in a register or in memory, the encoding in `register2`."""

    register: int | None
    memory: MemoryOperand | None
    register2: int

    @classmethod
    def decode(cls, raw: int) -> FieldAccessInformation:
        """From the field."""
        return cls(raw, *_register_or_memory(raw), _bits(raw, 31, 28))

    def describe(self) -> str:
        """Such as "field in rcx, data rax"."""
        data = _describe_either(self.register, self.memory)
        return f"field in {GENERAL_REGISTERS[self.register2]}, data {data}"


@dataclass(frozen=True, slots=True)
class LoadiwkeyInformation(InstructionInformation):
    """LOADIWKEY (Table 28-16): the numbers of its two XMM registers."""

    xmm1: int
    xmm2: int

    @classmethod
    def decode(cls, raw: int) -> LoadiwkeyInformation:
        """From the field."""
        return cls(raw, _bits(raw, 6, 3), _bits(raw, 31, 28))

    def describe(self) -> str:
        """Such as "xmm1, xmm2"."""
        return f"xmm{self.xmm1}, xmm{self.xmm2}"


def _register_or_memory(raw: int) -> tuple[int | None, MemoryOperand | None]:
    return (_bits(raw, 6, 3), None) if _bit(raw, 10) else (None, MemoryOperand.decode(raw))


def _describe_either(register: int | None, memory: MemoryOperand | None) -> str:
    if register is not None:
        return GENERAL_REGISTERS[register]
    return memory.describe() if memory is not None else "?"


_DECODERS: dict[int, Callable[[int], InstructionInformation]] = {
    ExitReason.IO_INSTRUCTION: StringIoInformation.decode,
    ExitReason.INVEPT: InvalidationInformation.decode,
    ExitReason.INVPCID: InvalidationInformation.decode,
    ExitReason.INVVPID: InvalidationInformation.decode,
    ExitReason.GDTR_IDTR_ACCESS: DescriptorTableInformation.decode,
    ExitReason.LDTR_TR_ACCESS: SystemSegmentInformation.decode,
    ExitReason.RDRAND: RandomInformation.decode,
    ExitReason.RDSEED: RandomInformation.decode,
    ExitReason.TPAUSE: RegisterInformation.decode,
    ExitReason.UMWAIT: RegisterInformation.decode,
    ExitReason.URDMSR: RegisterInformation.decode,
    ExitReason.UWRMSR: RegisterInformation.decode,
    ExitReason.VMCLEAR: MemoryInformation.decode,
    ExitReason.VMPTRLD: MemoryInformation.decode,
    ExitReason.VMPTRST: MemoryInformation.decode,
    ExitReason.VMXON: MemoryInformation.decode,
    ExitReason.XSAVES: MemoryInformation.decode,
    ExitReason.XRSTORS: MemoryInformation.decode,
    ExitReason.VMREAD: FieldAccessInformation.decode,
    ExitReason.VMWRITE: FieldAccessInformation.decode,
    ExitReason.LOADIWKEY: LoadiwkeyInformation.decode,
}


def decode_instruction_information(reason: int, raw: int) -> InstructionInformation:
    """The instruction-information field `raw` (32 bits) of an exit for `reason` (basic, or the whole field).

    Of I/O instructions only INS and OUTS have any; for IN and OUT the field is undefined, and it is for the
    caller, who has the qualification, to know which it was. OutOfRange for a `raw` that isn't 32 bits.
    """
    if raw < 0 or raw >> 32:
        raise OutOfRange("VM-exit instruction information", raw, "32 bits, unsigned")
    return _DECODERS.get(basic_reason(reason), InstructionInformation)(raw)
