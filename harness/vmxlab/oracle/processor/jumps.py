"""Where L2 goes on: jumps, calls, loops, conditions (SDM Vol. 1, 7.3.8; Vol. 2, the instructions)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import ConditionCode, Instruction, Mnemonic

from vmxlab.oracle.processor import operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.data import advance, pop, push
from vmxlab.oracle.processor.state import Mode, Processor, canonical, general_protection, need
from vmxlab.oracle.values import Bits, CannotTell
from vmxlab.sdm.registers import RFLAGS

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import ConditionCode as Condition

_CODES = {
    ConditionCode.O: (RFLAGS.OF, False),
    ConditionCode.NO: (RFLAGS.OF, True),
    ConditionCode.B: (RFLAGS.CF, False),
    ConditionCode.AE: (RFLAGS.CF, True),
    ConditionCode.E: (RFLAGS.ZF, False),
    ConditionCode.NE: (RFLAGS.ZF, True),
    ConditionCode.S: (RFLAGS.SF, False),
    ConditionCode.NS: (RFLAGS.SF, True),
    ConditionCode.P: (RFLAGS.PF, False),
    ConditionCode.NP: (RFLAGS.PF, True),
}


def condition(processor: Processor, code: Condition) -> bool:
    """Whether a condition holds (Vol. 1, table 7-4). Raises CannotTell."""
    if code in _CODES:
        mask, inverted = _CODES[code]
        return processor.flag(mask) != inverted
    flag = processor.flag
    match code:
        case ConditionCode.BE:
            return flag(RFLAGS.CF) or flag(RFLAGS.ZF)
        case ConditionCode.A:
            return not (flag(RFLAGS.CF) or flag(RFLAGS.ZF))
        case ConditionCode.L:
            return flag(RFLAGS.SF) != flag(RFLAGS.OF)
        case ConditionCode.GE:
            return flag(RFLAGS.SF) == flag(RFLAGS.OF)
        case ConditionCode.LE:
            return flag(RFLAGS.ZF) or flag(RFLAGS.SF) != flag(RFLAGS.OF)
        case ConditionCode.G:
            return not flag(RFLAGS.ZF) and flag(RFLAGS.SF) == flag(RFLAGS.OF)
    raise CannotTell("a condition code")


def go_to(processor: Processor, target: int) -> None:
    """The next instruction; #GP(0) where its address can't be (Vol. 2A, JMP)."""
    if processor.mode is Mode.LONG:
        if not canonical(target, processor.cr4):
            raise general_protection("a jump to a non-canonical address")
    elif target > processor.segments["cs"].limit:
        raise general_protection("a jump beyond the code segment's limit")
    processor.next_rip = target


def _target(processor: Processor, instruction: Instruction) -> int:
    if operands.is_register(instruction, 0) or operands.is_memory(instruction, 0):
        size = operands.operand_size(instruction, 0)
        return need(operands.read(processor, instruction, 0), size, "the target of a jump")
    if instruction.is_jmp_far or instruction.is_call_far:
        raise CannotTell("a far jump or call")
    return int(instruction.near_branch_target)


def _refuse_far(instruction: Instruction) -> None:
    if instruction.is_jmp_far_indirect or instruction.is_call_far_indirect:
        raise CannotTell("a far jump or call")


def _jump(processor: Processor, instruction: Instruction) -> None:
    """JMP, near."""
    _refuse_far(instruction)
    go_to(processor, _target(processor, instruction))


def _jump_if(processor: Processor, instruction: Instruction) -> None:
    """Jcc."""
    if condition(processor, instruction.condition_code):
        go_to(processor, int(instruction.near_branch_target))


def _count_size(instruction: Instruction) -> int:
    names = instruction.op_code().instruction_string
    for name, size in (("RCX", 8), ("ECX", 4), ("CX", 2)):
        if name in names:
            return size
    return {16: 2, 32: 4, 64: 8}.get(instruction.op_code().address_size, 8)


def _loop(processor: Processor, instruction: Instruction) -> None:
    """LOOP, LOOPE, LOOPNE."""
    size = _address_size(processor, instruction)
    advance(processor, 1, -1, size)
    again = bool(processor.number(1, size))
    if instruction.mnemonic == Mnemonic.LOOPE:
        again = again and processor.flag(RFLAGS.ZF)
    elif instruction.mnemonic == Mnemonic.LOOPNE:
        again = again and not processor.flag(RFLAGS.ZF)
    if again:
        go_to(processor, int(instruction.near_branch_target))


def _address_size(processor: Processor, instruction: Instruction) -> int:
    """Bytes of the counter: by the mode, and the address-size prefix."""
    size = instruction.op_code().address_size
    return size // 8 if size else processor.bitness // 8


def _jump_if_zero(processor: Processor, instruction: Instruction) -> None:
    """JCXZ, JECXZ, JRCXZ."""
    size = {Mnemonic.JCXZ: 2, Mnemonic.JECXZ: 4, Mnemonic.JRCXZ: 8}[instruction.mnemonic]
    if not processor.number(1, size):
        go_to(processor, int(instruction.near_branch_target))


def _call(processor: Processor, instruction: Instruction) -> None:
    """CALL, near."""
    _refuse_far(instruction)
    target = _target(processor, instruction)
    after = processor.next_rip
    go_to(processor, target)
    push(processor, Bits(after), -instruction.stack_pointer_increment)


def _return(processor: Processor, instruction: Instruction) -> None:
    """RET, near, without an immediate."""
    if instruction.op_count:
        raise CannotTell("RET with an immediate")
    size = instruction.stack_pointer_increment
    go_to(processor, need(pop(processor, size), size, "a return address"))


def _set_if(processor: Processor, instruction: Instruction) -> None:
    """SETcc."""
    try:
        value = Bits(int(condition(processor, instruction.condition_code)))
    except CannotTell:
        value = Bits(0, 0xFE)
    operands.write(processor, instruction, 0, value)


def _move_if(processor: Processor, instruction: Instruction) -> None:
    """CMOVcc: the source is read in any case, and a 32-bit destination always loses its upper half."""
    source = operands.read(processor, instruction, 1)
    old = operands.read(processor, instruction, 0)
    holds = condition(processor, instruction.condition_code)
    operands.write(processor, instruction, 0, source if holds else old)


def _by_prefix(prefix: str, handler: Handler, but: tuple[str, ...] = ()) -> dict[int, Handler]:
    return {
        value: handler
        for name, value in vars(Mnemonic).items()
        if name.startswith(prefix) and name not in but and isinstance(value, int)
    }


_NOT_CONDITIONS = ("JMP", "JMPE", "JCXZ", "JECXZ", "JRCXZ")
HANDLERS: dict[int, Handler] = {
    **_by_prefix("J", _jump_if, _NOT_CONDITIONS),
    Mnemonic.JMP: _jump,
    **dict.fromkeys((Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ), _jump_if_zero),
    **dict.fromkeys((Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE), _loop),
    Mnemonic.CALL: _call,
    Mnemonic.RET: _return,
    **dict.fromkeys(
        tuple(
            getattr(Mnemonic, f"SET{code}")
            for code in (
                "A",
                "AE",
                "B",
                "BE",
                "E",
                "G",
                "GE",
                "L",
                "LE",
                "NE",
                "NO",
                "NP",
                "NS",
                "O",
                "P",
                "S",
            )
        ),
        _set_if,
    ),
    **_by_prefix("CMOV", _move_if),
}
