"""Arithmetic, logic and flags (SDM Vol. 1, 7.3; Vol. 2, the instructions).

An operand that is not known makes the result and the flags unknown, except where bits can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.processor import operands
from vmxlab.oracle.processor.state import Fault, Processor, need, sign_extended
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell
from vmxlab.sdm.registers import RFLAGS, Vector

Handler = Callable[[Processor, Instruction], None]


def _parity(value: int) -> bool:
    return (value & 0xFF).bit_count() % 2 == 0


def result_flags(processor: Processor, result: int, size: int) -> None:
    """SF, ZF and PF by a result."""
    processor.set_flags(zf=result == 0, sf=bool(result >> 8 * size - 1), pf=_parity(result))


def add_flags(processor: Processor, a: int, b: int, carry: int, size: int) -> int:
    """a + b + carry: the sum, and all arithmetic flags."""
    mask = (1 << 8 * size) - 1
    total = a + b + carry
    result = total & mask
    top = 8 * size - 1
    overflow = bool((a ^ result) & (b ^ result) & 1 << top)
    processor.set_flags(cf=total > mask, af=bool((a ^ b ^ result) & 0x10), of=overflow)
    result_flags(processor, result, size)
    return result


def subtract_flags(processor: Processor, a: int, b: int, borrow: int, size: int) -> int:
    """a - b - borrow: the difference, and all arithmetic flags."""
    mask = (1 << 8 * size) - 1
    result = a - b - borrow & mask
    top = 8 * size - 1
    overflow = bool((a ^ b) & (a ^ result) & 1 << top)
    processor.set_flags(cf=a < b + borrow, af=bool((a ^ b ^ result) & 0x10), of=overflow)
    result_flags(processor, result, size)
    return result


def _binary(processor: Processor, instruction: Instruction) -> None:
    """ADD, ADC, SUB, SBB, CMP."""
    mnemonic = instruction.mnemonic
    stores = mnemonic != Mnemonic.CMP
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    a = (operands.read_for_update if stores else operands.read)(processor, instruction, 0)
    b = operands.read(processor, instruction, 1)
    carry = 0
    if mnemonic in (Mnemonic.ADC, Mnemonic.SBB):
        carry = processor.flag(RFLAGS.CF)
    if not (a.knows(mask) and b.knows(mask)):
        processor.forget_arithmetic_flags()
        result = NOTHING_KNOWN
    elif mnemonic in (Mnemonic.ADD, Mnemonic.ADC):
        result = Bits(add_flags(processor, a.value & mask, b.value & mask, carry, size))
    else:
        result = Bits(subtract_flags(processor, a.value & mask, b.value & mask, carry, size))
    if stores:
        operands.write(processor, instruction, 0, result)


def _logic(processor: Processor, instruction: Instruction) -> None:
    """AND, OR, XOR, TEST: bit by bit, and AF undefined."""
    mnemonic = instruction.mnemonic
    stores = mnemonic != Mnemonic.TEST
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    a = (operands.read_for_update if stores else operands.read)(processor, instruction, 0)
    b = operands.read(processor, instruction, 1)
    result = _bitwise(mnemonic, a, b, _same_register(instruction), mask)
    if result.knows(mask):
        result_flags(processor, result.value, size)
    else:
        processor.set_flags(zf=None, sf=result.bit(1 << 8 * size - 1), pf=None)
    processor.set_flags(cf=False, of=False, af=None)
    if stores:
        operands.write(processor, instruction, 0, result)


def _same_register(instruction: Instruction) -> bool:
    return (
        operands.is_register(instruction, 0)
        and operands.is_register(instruction, 1)
        and instruction.op_register(0) == instruction.op_register(1)
    )


def _bitwise(mnemonic: int, a: Bits, b: Bits, same: bool, mask: int) -> Bits:
    both = a.known & b.known
    match mnemonic:
        case Mnemonic.AND | Mnemonic.TEST:
            # A 0 on one side makes a 0, whatever the other is.
            zero = a.known & ~a.value | b.known & ~b.value
            return Bits(a.value & b.value & mask, (both | zero) & mask)
        case Mnemonic.OR:
            return Bits((a.value | b.value) & mask, (both | a.value | b.value) & mask)
        case _:
            return Bits(0, mask) if same else Bits((a.value ^ b.value) & mask, both & mask)


def _increment(processor: Processor, instruction: Instruction) -> None:
    """INC, DEC: all flags but CF."""
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    a = operands.read_for_update(processor, instruction, 0)
    carry = processor.rflags.bit(RFLAGS.CF)
    if not a.knows(mask):
        processor.forget_arithmetic_flags()
        result = NOTHING_KNOWN
    elif instruction.mnemonic == Mnemonic.INC:
        result = Bits(add_flags(processor, a.value & mask, 1, 0, size))
    else:
        result = Bits(subtract_flags(processor, a.value & mask, 1, 0, size))
    processor.set_flags(cf=carry)
    operands.write(processor, instruction, 0, result)


def _negate(processor: Processor, instruction: Instruction) -> None:
    """NEG (all flags) and NOT (none)."""
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    a = operands.read_for_update(processor, instruction, 0)
    if instruction.mnemonic == Mnemonic.NOT:
        result = Bits(~a.value & mask, a.known & mask)
    elif a.knows(mask):
        result = Bits(subtract_flags(processor, 0, a.value & mask, 0, size))
    else:
        processor.forget_arithmetic_flags()
        result = NOTHING_KNOWN
    operands.write(processor, instruction, 0, result)


def _shift(processor: Processor, instruction: Instruction) -> None:
    """SHL, SAL, SHR, SAR by a count that is known."""
    size = operands.operand_size(instruction, 0)
    width, mask = 8 * size, (1 << 8 * size) - 1
    a = operands.read_for_update(processor, instruction, 0)
    count = operands.read_number(processor, instruction, 1, 1) & (0x3F if size == 8 else 0x1F)
    if count == 0:
        operands.write(processor, instruction, 0, a)
        return
    if not a.knows(mask):
        processor.forget_arithmetic_flags()
        operands.write(processor, instruction, 0, NOTHING_KNOWN)
        return
    value = a.value & mask
    carry: bool | None
    if instruction.mnemonic in (Mnemonic.SHL, Mnemonic.SAL):
        result = value << count & mask
        carry = bool(value << count >> width & 1) if count <= width else None
        overflow = bool(result >> width - 1) != carry
    elif instruction.mnemonic == Mnemonic.SHR:
        result = value >> count
        carry = bool(value >> count - 1 & 1) if count <= width else None
        overflow = bool(value >> width - 1)
    else:
        wide = sign_extended(value, size)
        wide |= ((1 << 64) - 1) << 64 if wide >> 63 else 0
        result = wide >> count & mask
        carry = bool(wide >> count - 1 & 1)
        overflow = False
    result_flags(processor, result, size)
    processor.set_flags(cf=carry, of=overflow if count == 1 else None, af=None)
    operands.write(processor, instruction, 0, Bits(result))


def _multiply(processor: Processor, instruction: Instruction) -> None:
    """IMUL with two or three operands; MUL and IMUL with one."""
    if instruction.op_count == 1:
        _multiply_wide(processor, instruction)
        return
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    first = 0 if instruction.op_count == 2 else 1
    a = operands.read(processor, instruction, first)
    b = operands.read(processor, instruction, first + 1)
    processor.forget_arithmetic_flags()
    result = NOTHING_KNOWN
    if a.knows(mask) and b.knows(mask):
        product = _signed(a.value & mask, size) * _signed(b.value & mask, size)
        result = Bits(product & mask)
        too_wide = _signed(product & mask, size) != product
        processor.set_flags(cf=too_wide, of=too_wide)
    operands.write(processor, instruction, 0, result)


def _multiply_wide(processor: Processor, instruction: Instruction) -> None:
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    a = processor.get(0, size)
    b = operands.read(processor, instruction, 0)
    processor.forget_arithmetic_flags()
    low = high = NOTHING_KNOWN
    if a.knows(mask) and b.knows(mask):
        signed = instruction.mnemonic == Mnemonic.IMUL
        one, other = (
            (_signed(a.value & mask, size), _signed(b.value & mask, size))
            if signed
            else (a.value & mask, b.value & mask)
        )
        product = one * other
        low, high = Bits(product & mask), Bits(product >> 8 * size & mask)
        kept = _signed(product & mask, size) if signed else product & mask
        processor.set_flags(cf=kept != product, of=kept != product)
    _set_pair(processor, low, high, size)


def _set_pair(processor: Processor, low: Bits, high: Bits, size: int) -> None:
    """AX, or the pair DX:AX, EDX:EAX, RDX:RAX."""
    processor.set(0, low, size)
    if size == 1:
        processor.set(0, high, 1, high=True)
    else:
        processor.set(2, high, size)


def _divide(processor: Processor, instruction: Instruction) -> None:
    """DIV and IDIV: #DE for a divisor of 0 and for a quotient that is too large."""
    size = operands.operand_size(instruction, 0)
    mask = (1 << 8 * size) - 1
    divisor = need(operands.read(processor, instruction, 0), size, "a divisor") & mask
    if not divisor:
        raise Fault(Vector.DE, why="division by 0")
    if size == 1:
        dividend = processor.number(0, 2)
    else:
        dividend = processor.number(2, size) << 8 * size | processor.number(0, size)
    if instruction.mnemonic == Mnemonic.IDIV:
        a, b = _signed(dividend, 2 * size), _signed(divisor, size)
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        remainder = a - quotient * b
        fits = -(1 << 8 * size - 1) <= quotient < 1 << 8 * size - 1
    else:
        quotient, remainder = divmod(dividend, divisor)
        fits = quotient <= mask
    if not fits:
        raise Fault(Vector.DE, why="the quotient is too large")
    processor.forget_arithmetic_flags()
    _set_pair(processor, Bits(quotient & mask), Bits(remainder & mask), size)


def _signed(value: int, size: int) -> int:
    top = 1 << 8 * size - 1
    return (value ^ top) - top


def _test_bit(processor: Processor, instruction: Instruction) -> None:
    """BT, BTS, BTR, BTC on a register, or with an immediate."""
    if operands.is_memory(instruction, 0) and not operands.is_immediate(instruction, 1):
        raise CannotTell("a bit string in memory")
    size = operands.operand_size(instruction, 0)
    number = operands.read_number(processor, instruction, 1, 1) % (8 * size)
    stores = instruction.mnemonic != Mnemonic.BT
    a = (operands.read_for_update if stores else operands.read)(processor, instruction, 0)
    carry = a.bit(1 << number)
    # ZF is unaffected, the others are undefined (Vol. 2A, BT).
    processor.set_flags(cf=carry, of=None, sf=None, af=None, pf=None)
    if not stores:
        return
    bit = 1 << number
    new = {
        Mnemonic.BTS: Bits(bit, bit),
        Mnemonic.BTR: Bits(0, bit),
        Mnemonic.BTC: Bits(0 if carry else bit, bit if carry is not None else 0),
    }[instruction.mnemonic]
    operands.write(processor, instruction, 0, a.with_bits(bit, new))


HANDLERS: dict[int, Handler] = {
    **dict.fromkeys((Mnemonic.ADD, Mnemonic.ADC, Mnemonic.SUB, Mnemonic.SBB, Mnemonic.CMP), _binary),
    **dict.fromkeys((Mnemonic.AND, Mnemonic.OR, Mnemonic.XOR, Mnemonic.TEST), _logic),
    **dict.fromkeys((Mnemonic.INC, Mnemonic.DEC), _increment),
    **dict.fromkeys((Mnemonic.NEG, Mnemonic.NOT), _negate),
    **dict.fromkeys((Mnemonic.SHL, Mnemonic.SAL, Mnemonic.SHR, Mnemonic.SAR), _shift),
    **dict.fromkeys((Mnemonic.MUL, Mnemonic.IMUL), _multiply),
    **dict.fromkeys((Mnemonic.DIV, Mnemonic.IDIV), _divide),
    **dict.fromkeys((Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC), _test_bit),
}
