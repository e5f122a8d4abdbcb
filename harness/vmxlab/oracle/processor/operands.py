"""Operands of instructions: effective addresses, and reading and writing registers and memory.

Instructions are iced-x86's; its register numbers become the project's (GENERAL_REGISTERS) here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from iced_x86 import CodeSize, Instruction, MemorySizeExt, OpKind, Register, RegisterExt

from vmxlab.oracle.processor import access
from vmxlab.oracle.processor.state import Processor, need, sign_extended
from vmxlab.oracle.values import Bits, CannotTell, Rule
from vmxlab.sdm.registers import GENERAL_REGISTERS

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterNumber

_SEGMENTS = {
    Register.ES: "es",
    Register.CS: "cs",
    Register.SS: "ss",
    Register.DS: "ds",
    Register.FS: "fs",
    Register.GS: "gs",
}
_IGNORED_PREFIXES = frozenset({Register.ES, Register.CS, Register.SS, Register.DS})
_STACK_BASES = frozenset({Register.RSP, Register.ESP, Register.RBP, Register.EBP})
SEGMENT_NUMBERS = {"es": 0, "cs": 1, "ss": 2, "ds": 3, "fs": 4, "gs": 5}
_HIGH_BYTES = {Register.AH: 0, Register.CH: 1, Register.DH: 2, Register.BH: 3}
_IMMEDIATES = frozenset(
    {
        OpKind.IMMEDIATE8,
        OpKind.IMMEDIATE8_2ND,
        OpKind.IMMEDIATE16,
        OpKind.IMMEDIATE32,
        OpKind.IMMEDIATE64,
        OpKind.IMMEDIATE8TO16,
        OpKind.IMMEDIATE8TO32,
        OpKind.IMMEDIATE8TO64,
        OpKind.IMMEDIATE32TO64,
    }
)


@dataclass(frozen=True, slots=True)
class GeneralRegister:
    """A general register as an operand."""

    index: int
    size: int
    high: bool = False


@lru_cache(maxsize=128)
def general_register(register: RegisterNumber) -> GeneralRegister | None:
    """The general register that iced-x86 means; None for any other register."""
    if register in _HIGH_BYTES:
        return GeneralRegister(_HIGH_BYTES[register], 1, True)
    if not RegisterExt.is_gpr(register):
        return None
    full = RegisterExt.full_register(register)
    index = GENERAL_REGISTERS.index(_name(full))
    return GeneralRegister(index, RegisterExt.size(register))


def _name(register: RegisterNumber) -> str:
    return _REGISTER_NAMES[register]


_REGISTER_NAMES = {getattr(Register, name.upper()): name for name in GENERAL_REGISTERS}


def register_index(register: RegisterNumber) -> int:
    """The index of a general register of any size."""
    found = general_register(register)
    if found is None:
        raise CannotTell(f"an operand in register {register}")
    return found.index


def is_memory(instruction: Instruction, operand: int) -> bool:
    """Whether an operand is in memory, by ModRM."""
    return bool(instruction.op_kind(operand) == OpKind.MEMORY)


def is_register(instruction: Instruction, operand: int) -> bool:
    """Whether an operand is a register."""
    return bool(instruction.op_kind(operand) == OpKind.REGISTER)


def is_immediate(instruction: Instruction, operand: int) -> bool:
    """Whether an operand is in the instruction."""
    return instruction.op_kind(operand) in _IMMEDIATES


def operand_size(instruction: Instruction, operand: int) -> int:
    """Bytes of an operand."""
    if is_register(instruction, operand):
        return int(RegisterExt.size(instruction.op_register(operand)))
    if is_memory(instruction, operand):
        return int(MemorySizeExt.size(instruction.memory_size))
    raise CannotTell("the size of an operand")


# --- effective addresses -----------------------------------------------------------------------------------


def segment_of(instruction: Instruction) -> str:
    """The segment register of the memory operand; 64-bit mode ignores prefixes for CS, DS, ES, SS."""
    if instruction.code_size == CodeSize.CODE64 and instruction.segment_prefix in _IGNORED_PREFIXES:
        return "ss" if instruction.memory_base in _STACK_BASES else "ds"
    return _SEGMENTS[instruction.memory_segment]


def address_size(instruction: Instruction, bitness: int) -> int:
    """Bits of the address of the memory operand (ModRM): 16, 32 or 64."""
    for register in (instruction.memory_base, instruction.memory_index):
        if register == Register.RIP:
            return 64
        if register == Register.EIP:
            return 32
        if register != Register.NONE:
            return 8 * int(RegisterExt.size(register))
    return {2: 16, 4: 32, 8: 64}.get(instruction.memory_displ_size, bitness)


def effective_address(processor: Processor, instruction: Instruction) -> int:
    """The offset of the memory operand in its segment. Raises CannotTell."""
    size = address_size(instruction, processor.bitness)
    base, index = instruction.memory_base, instruction.memory_index
    total = instruction.memory_displacement
    if base not in (Register.NONE, Register.RIP, Register.EIP):
        total += processor.number(register_index(base), size // 8)
    if index != Register.NONE:
        if general_register(index) is None:
            raise CannotTell("an address with a vector of indices")
        total += processor.number(register_index(index), size // 8) * instruction.memory_index_scale
    return int(total) & (1 << size) - 1


def operand_linear(
    processor: Processor, instruction: Instruction, size: int, *, write: bool = False, check: bool = True
) -> int:
    """The linear address of the memory operand."""
    return access.linear_address(
        processor,
        segment_of(instruction),
        effective_address(processor, instruction),
        size,
        write=write,
        check=check,
    )


# --- reading and writing -----------------------------------------------------------------------------------


def read(processor: Processor, instruction: Instruction, operand: int) -> Bits:
    """The value of an operand; an immediate in 64 bits, sign-extended."""
    if is_immediate(instruction, operand):
        return Bits(instruction.immediate(operand))
    if is_memory(instruction, operand):
        size = operand_size(instruction, operand)
        offset = effective_address(processor, instruction)
        return access.read(processor, segment_of(instruction), offset, size)
    return _read_register(processor, instruction.op_register(operand))


def _read_register(processor: Processor, register: RegisterNumber) -> Bits:
    found = general_register(register)
    if found is not None:
        return processor.get(found.index, found.size, high=found.high)
    if register in _SEGMENTS:
        return Bits(processor.segments[_SEGMENTS[register]].selector)
    raise CannotTell("an operand that is no general register")


def read_number(processor: Processor, instruction: Instruction, operand: int, size: int) -> int:
    """An operand as a number of `size` bytes. Raises CannotTell where it is not known."""
    return need(read(processor, instruction, operand), size, "the value of an operand")


def read_for_update(processor: Processor, instruction: Instruction, operand: int) -> Bits:
    """The value of an operand that will be written: memory is checked for the write at once."""
    if is_memory(instruction, operand):
        size = operand_size(instruction, operand)
        offset = effective_address(processor, instruction)
        access.check_writable(processor, segment_of(instruction), offset, size)
    return read(processor, instruction, operand)


def write(processor: Processor, instruction: Instruction, operand: int, value: Bits) -> None:
    """Write an operand."""
    if is_memory(instruction, operand):
        size = operand_size(instruction, operand)
        offset = effective_address(processor, instruction)
        access.write(processor, segment_of(instruction), offset, size, value)
        return
    found = general_register(instruction.op_register(operand))
    if found is None:
        raise CannotTell("a write to a register that is no general register")
    processor.set(found.index, value, found.size, high=found.high)


def segment_operand(instruction: Instruction, operand: int) -> str | None:
    """The name of a segment register that is an operand."""
    if not is_register(instruction, operand):
        return None
    return _SEGMENTS.get(instruction.op_register(operand))


NO_DISPLACEMENT = Rule("the exit qualification is 0 without a memory operand", "Vol. 3C, 28.2.1")
_DISPLACEMENT = Rule("the exit qualification is the displacement", "Vol. 3C, 28.2.1")


def displacement_rule(instruction: Instruction) -> Rule:
    """What the exit qualification of an instruction rests on that may have a memory operand."""
    return _DISPLACEMENT if _has_memory_operand(instruction) else NO_DISPLACEMENT


def _has_memory_operand(instruction: Instruction) -> bool:
    return any(is_memory(instruction, i) for i in range(instruction.op_count))


def displacement(processor: Processor, instruction: Instruction) -> Bits:
    """The displacement as exit qualifications hold it (SDM Vol. 3C, 28.2.1): sign-extended, for RIP-relative
    operands added to the RIP that follows; undefined beyond the address size; 0 where there is none."""
    if not _has_memory_operand(instruction):
        return Bits(0)
    bits = address_size(instruction, processor.bitness)
    value = instruction.memory_displacement
    if instruction.memory_base not in (Register.RIP, Register.EIP) and instruction.memory_displ_size:
        value = sign_extended(value, bits // 8)
    return Bits(value & (1 << 64) - 1, (1 << bits) - 1)
