"""Writing the VM-exit instruction-information field (SDM Vol. 3C, 28.2.5, Tables 28-8 to 28-15).

Bits that a table calls undefined are not known here; `vmxlab.sdm.instruction_information` reads the field.
"""

from __future__ import annotations

from iced_x86 import Instruction, Register

from vmxlab.oracle.processor import operands
from vmxlab.oracle.processor.data import string_address_size
from vmxlab.oracle.processor.state import Processor
from vmxlab.oracle.values import UNDEFINED, Bits, Value

_SIZES = {16: 0, 32: 1, 64: 2}
_SCALES = {1: 0, 2: 1, 4: 2, 8: 3}


class _Field:
    """A field under construction: bits that are said, one part after the other."""

    def __init__(self) -> None:
        self.value = 0
        self.known = 0

    def put(self, high: int, low: int, value: int) -> None:
        mask = (1 << high - low + 1) - 1
        self.value |= (value & mask) << low
        self.known |= mask << low

    def bits(self) -> Bits:
        return Bits(self.value, self.known)


def _put_memory(field: _Field, processor: Processor, instruction: Instruction) -> None:
    """The bits that describe a memory operand: scale, address size, segment, index, base."""
    index, base = instruction.memory_index, instruction.memory_base
    field.put(9, 7, _SIZES[operands.address_size(instruction, processor.bitness)])
    field.put(17, 15, operands.SEGMENT_NUMBERS[operands.segment_of(instruction)])
    has_index = index != Register.NONE
    field.put(22, 22, not has_index)
    if has_index:
        field.put(1, 0, _SCALES[instruction.memory_index_scale])
        field.put(21, 18, operands.register_index(index))
    has_base = base not in (Register.NONE, Register.RIP, Register.EIP)
    field.put(27, 27, not has_base)
    if has_base:
        field.put(26, 23, operands.register_index(base))


def memory_operand(processor: Processor, instruction: Instruction) -> Bits:
    """VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS, XSAVES (Table 28-14)."""
    field = _Field()
    _put_memory(field, processor, instruction)
    field.put(10, 10, 0)
    return field.bits()


def invalidation(processor: Processor, instruction: Instruction) -> Bits:
    """INVEPT, INVPCID, INVVPID (Table 28-9)."""
    field = _Field()
    _put_memory(field, processor, instruction)
    field.put(10, 10, 0)
    field.put(31, 28, operands.register_index(instruction.op_register(0)))
    return field.bits()


def descriptor_table(processor: Processor, instruction: Instruction, identity: int) -> Bits:
    """SGDT (0), SIDT (1), LGDT (2), LIDT (3) (Table 28-10); the operand size is undefined in 64-bit mode."""
    field = _Field()
    _put_memory(field, processor, instruction)
    field.put(10, 10, 0)
    if not processor.is_long:
        field.put(11, 11, instruction.op_code().operand_size != 16)
    field.put(29, 28, identity)
    return field.bits()


def system_segment(processor: Processor, instruction: Instruction, identity: int) -> Bits:
    """SLDT (0), STR (1), LLDT (2), LTR (3) (Table 28-11)."""
    field = _Field()
    _put_either(field, processor, instruction, 0)
    field.put(29, 28, identity)
    return field.bits()


def field_access(processor: Processor, instruction: Instruction, data: int, encoding: int) -> Bits:
    """VMREAD and VMWRITE (Table 28-15); `data` and `encoding` are the numbers of the operands."""
    field = _Field()
    _put_either(field, processor, instruction, data)
    field.put(31, 28, operands.register_index(instruction.op_register(encoding)))
    return field.bits()


def _put_either(field: _Field, processor: Processor, instruction: Instruction, operand: int) -> None:
    is_register = operands.is_register(instruction, operand)
    field.put(10, 10, is_register)
    if is_register:
        field.put(6, 3, operands.register_index(instruction.op_register(operand)))
    else:
        _put_memory(field, processor, instruction)


def random_number(processor: Processor, instruction: Instruction) -> Bits:
    """RDRAND and RDSEED (Table 28-12)."""
    field = _Field()
    field.put(6, 3, operands.register_index(instruction.op_register(0)))
    field.put(12, 11, _SIZES[8 * operands.operand_size(instruction, 0)])
    return field.bits()


def source_register(processor: Processor, instruction: Instruction) -> Bits:
    """TPAUSE and UMWAIT (Table 28-13)."""
    field = _Field()
    field.put(6, 3, operands.register_index(instruction.op_register(0)))
    return field.bits()


def string_io(processor: Processor, instruction: Instruction, *, is_in: bool) -> Value:
    """INS and OUTS (Table 28-8); undefined where IA32_VMX_BASIC[54] is 0 (A.1)."""
    if not processor.capabilities.basic.io_exit_info:
        return UNDEFINED
    field = _Field()
    field.put(9, 7, _SIZES[8 * string_address_size(processor, instruction)])
    if not is_in:
        field.put(17, 15, operands.SEGMENT_NUMBERS[operands.segment_of(instruction)])
    return field.bits()
