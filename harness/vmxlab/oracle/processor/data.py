"""Moving data: MOV, stack, strings, flags (SDM Vol. 1, 7.3; Vol. 2, the instructions)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.processor import access, operands
from vmxlab.oracle.processor.arithmetic import Handler, subtract_flags
from vmxlab.oracle.processor.state import (
    BIG,
    RSP,
    Mode,
    Processor,
    Segment,
    general_protection,
    sign_extended,
)
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell
from vmxlab.sdm.registers import RFLAGS

_RCX, _RSI, _RDI = 1, 6, 7


def _move(processor: Processor, instruction: Instruction) -> None:
    """MOV between general registers, memory and immediates; segment registers in real mode."""
    target = operands.segment_operand(instruction, 0)
    if target is not None:
        load_segment(processor, target, operands.read_number(processor, instruction, 1, 2))
        return
    value = operands.read(processor, instruction, 1)
    if operands.segment_operand(instruction, 1) is not None and operands.is_register(instruction, 0):
        if operands.operand_size(instruction, 0) != 2 and processor.mode is Mode.REAL:
            value = Bits(value.value, 0xFFFF)  # Vol. 2B, MOV: the upper half may be undefined
        value = Bits(value.value, value.known)
    operands.write(processor, instruction, 0, value)


def load_segment(processor: Processor, name: str, selector: int) -> None:
    """A segment register in real mode; elsewhere descriptors are not followed."""
    if processor.mode is not Mode.REAL:
        raise CannotTell("loading a segment register from a descriptor")
    old = processor.segments[name]
    processor.segments[name] = Segment(selector, selector << 4, old.limit, old.rights)
    if name == "ss":
        processor.interruptibility |= 2  # blocking by MOV SS (Vol. 3A, 6.8.3)
        processor.blocks_next = True


def _move_extended(processor: Processor, instruction: Instruction) -> None:
    """MOVZX, MOVSX, MOVSXD."""
    size = operands.operand_size(instruction, 1)
    value = operands.read(processor, instruction, 1)
    if instruction.mnemonic == Mnemonic.MOVZX:
        operands.write(processor, instruction, 0, Bits(value.value, value.known | ~((1 << 8 * size) - 1)))
        return
    known = value.knows((1 << 8 * size) - 1)
    operands.write(
        processor, instruction, 0, Bits(sign_extended(value.value, size)) if known else NOTHING_KNOWN
    )


def _load_address(processor: Processor, instruction: Instruction) -> None:
    """LEA."""
    try:
        value = Bits(operands.effective_address(processor, instruction))
    except CannotTell:
        value = NOTHING_KNOWN
    operands.write(processor, instruction, 0, value)


def _exchange(processor: Processor, instruction: Instruction) -> None:
    """XCHG."""
    for one in (0, 1):
        if operands.is_memory(instruction, one):
            operands.read_for_update(processor, instruction, one)
    a = operands.read(processor, instruction, 0)
    b = operands.read(processor, instruction, 1)
    if operands.is_memory(instruction, 1):
        operands.write(processor, instruction, 1, a)
        operands.write(processor, instruction, 0, b)
    else:
        operands.write(processor, instruction, 0, b)
        operands.write(processor, instruction, 1, a)


def _convert(processor: Processor, instruction: Instruction) -> None:
    """CBW, CWDE, CDQE, CWD, CDQ, CQO."""
    to_a = {Mnemonic.CBW: 1, Mnemonic.CWDE: 2, Mnemonic.CDQE: 4}
    if instruction.mnemonic in to_a:
        size = to_a[instruction.mnemonic]
        source = processor.get(0, size)
        known = source.knows((1 << 8 * size) - 1)
        processor.set(0, Bits(sign_extended(source.value, size)) if known else NOTHING_KNOWN, 2 * size)
        return
    size = {Mnemonic.CWD: 2, Mnemonic.CDQ: 4, Mnemonic.CQO: 8}[instruction.mnemonic]
    sign = processor.get(0, size).bit(1 << 8 * size - 1)
    processor.set(2, NOTHING_KNOWN if sign is None else Bits(-sign & (1 << 64) - 1), size)


def _swap_bytes(processor: Processor, instruction: Instruction) -> None:
    """BSWAP."""
    size = operands.operand_size(instruction, 0)
    a = operands.read(processor, instruction, 0)
    if size == 2 or not a.knows((1 << 8 * size) - 1):
        operands.write(processor, instruction, 0, NOTHING_KNOWN)  # 16 bits: undefined (Vol. 2A, BSWAP)
        return
    swapped = int.from_bytes((a.value & (1 << 8 * size) - 1).to_bytes(size, "little"), "big")
    operands.write(processor, instruction, 0, Bits(swapped))


def _nop(processor: Processor, instruction: Instruction) -> None:
    """NOP, the fences, and the hints that do nothing a program can see."""


# --- stack -------------------------------------------------------------------------------------------------


def stack_size(processor: Processor) -> int:
    """Bytes of the stack pointer."""
    if processor.is_long:
        return 8
    return 4 if processor.segments["ss"].rights & BIG else 2


def push(processor: Processor, value: Bits, size: int) -> None:
    """Push; nothing is changed where that faults."""
    width = stack_size(processor)
    top = processor.number(RSP, width) - size & (1 << 8 * width) - 1
    access.write(processor, "ss", top, size, value)
    _set_stack_pointer(processor, top, width)


def pop(processor: Processor, size: int) -> Bits:
    """Pop; nothing is changed where that faults."""
    width = stack_size(processor)
    top = processor.number(RSP, width)
    value = access.read(processor, "ss", top, size)
    _set_stack_pointer(processor, top + size & (1 << 8 * width) - 1, width)
    return value


def _set_stack_pointer(processor: Processor, top: int, width: int) -> None:
    processor.set(RSP, top, width)


def _push(processor: Processor, instruction: Instruction) -> None:
    """PUSH."""
    if operands.segment_operand(instruction, 0) is not None:
        raise CannotTell("PUSH of a segment register")
    size = -instruction.stack_pointer_increment
    push(processor, operands.read(processor, instruction, 0), size)


def _pop(processor: Processor, instruction: Instruction) -> None:
    """POP of a general register or memory."""
    if operands.segment_operand(instruction, 0) is not None:
        raise CannotTell("POP of a segment register")
    if operands.is_memory(instruction, 0):
        raise CannotTell("POP to memory")
    value = pop(processor, instruction.stack_pointer_increment)
    operands.write(processor, instruction, 0, value)


_PUSHED_FLAGS = (1 << 64) - 1 & ~int(RFLAGS.RF | RFLAGS.VM)
_SYSTEM_FLAGS = int(RFLAGS.IF | RFLAGS.IOPL0 | RFLAGS.IOPL1)


def _push_flags(processor: Processor, instruction: Instruction) -> None:
    """PUSHF, PUSHFD, PUSHFQ: RF and VM are pushed as 0."""
    size = -instruction.stack_pointer_increment
    flags = processor.rflags
    push(processor, Bits(flags.value & _PUSHED_FLAGS, flags.known | ~_PUSHED_FLAGS), size)


def _pop_flags(processor: Processor, instruction: Instruction) -> None:
    """POPF, POPFD, POPFQ with CPL 0."""
    if processor.cpl:
        raise CannotTell("POPF with CPL above 0")
    size = instruction.stack_pointer_increment
    value = pop(processor, size)
    changes = int(
        RFLAGS.CF | RFLAGS.PF | RFLAGS.AF | RFLAGS.ZF | RFLAGS.SF | RFLAGS.TF | RFLAGS.IF
        | RFLAGS.DF | RFLAGS.OF | RFLAGS.IOPL0 | RFLAGS.IOPL1 | RFLAGS.NT
    )  # fmt: skip
    if size > 2:
        changes |= int(RFLAGS.AC | RFLAGS.ID)
        if processor.rflags.value & int(RFLAGS.VIP | RFLAGS.VIF):
            raise CannotTell("POPF with RFLAGS.VIP or VIF set")
    processor.rflags = processor.rflags.with_bits(changes, value)
    if processor.rflags.bit(RFLAGS.TF) is not False:
        raise CannotTell("single-stepping by RFLAGS.TF")


# --- flags -------------------------------------------------------------------------------------------------


def _set_flag(processor: Processor, instruction: Instruction) -> None:
    """CLC, STC, CMC, CLD, STD."""
    match instruction.mnemonic:
        case Mnemonic.CLC:
            processor.set_flags(cf=False)
        case Mnemonic.STC:
            processor.set_flags(cf=True)
        case Mnemonic.CMC:
            carry = processor.rflags.bit(RFLAGS.CF)
            processor.set_flags(cf=None if carry is None else not carry)
        case Mnemonic.CLD:
            processor.set_flags(df=False)
        case Mnemonic.STD:
            processor.set_flags(df=True)


def _set_interrupt_flag(processor: Processor, instruction: Instruction) -> None:
    """CLI, STI: IOPL against CPL; STI blocks for one instruction where IF was 0 (Vol. 2B, STI)."""
    if processor.mode is not Mode.REAL:
        iopl = processor.flag(RFLAGS.IOPL1) * 2 + processor.flag(RFLAGS.IOPL0)
        if processor.cpl > iopl:
            raise general_protection("CPL is above IOPL")
    if instruction.mnemonic == Mnemonic.STI and not processor.flag(RFLAGS.IF):
        processor.interruptibility |= 1
        processor.blocks_next = True
    processor.set_flags(**{"if": instruction.mnemonic == Mnemonic.STI})


def _load_ah(processor: Processor, instruction: Instruction) -> None:
    """LAHF."""
    processor.set(0, Bits(processor.rflags.value & 0xFF, processor.rflags.known & 0xFF), 1, high=True)


# --- strings -----------------------------------------------------------------------------------------------


def _string(processor: Processor, instruction: Instruction) -> None:
    """MOVS, STOS, LODS, one element after the other; the order of faults is theirs."""
    name = instruction.mnemonic
    size = _STRING_SIZES[name]
    repeats = bool(instruction.has_rep_prefix or instruction.has_repne_prefix)
    width = string_address_size(processor, instruction)
    step = -size if processor.flag(RFLAGS.DF) else size
    while True:
        if repeats and not processor.number(_RCX, width):
            return
        if name in _READS_MEMORY:
            segment = operands.segment_of(instruction)
            value = access.read(processor, segment, processor.number(_RSI, width), size)
        else:
            value = processor.get(0, size)
        if name in _WRITES_MEMORY:
            access.write(processor, "es", processor.number(_RDI, width), size, value)
            advance(processor, _RDI, step, width)
        else:
            processor.set(0, value, size)
        if name in _READS_MEMORY:
            advance(processor, _RSI, step, width)
        if not repeats:
            return
        advance(processor, _RCX, -1, width)
        processor.spend()
        processor.keep_progress()


def _scan(processor: Processor, instruction: Instruction) -> None:
    """SCAS, once."""
    if instruction.has_rep_prefix or instruction.has_repne_prefix:
        raise CannotTell("a repeated comparison of strings")
    size = _STRING_SIZES[instruction.mnemonic]
    width = string_address_size(processor, instruction)
    b = access.read(processor, "es", processor.number(_RDI, width), size)
    a = processor.get(0, size)
    mask = (1 << 8 * size) - 1
    if a.knows(mask) and b.knows(mask):
        subtract_flags(processor, a.value, b.value, 0, size)
    else:
        processor.forget_arithmetic_flags()
    advance(processor, _RDI, -size if processor.flag(RFLAGS.DF) else size, width)


def advance(processor: Processor, index: int, step: int, width: int) -> None:
    """Add to a register in an address size of `width` bytes."""
    value = processor.number(index, width) + step & (1 << 8 * width) - 1
    processor.set(index, value, width)


def string_address_size(processor: Processor, instruction: Instruction) -> int:
    """Bytes of the address size of a string instruction: that of its implied operands."""
    from iced_x86 import OpKind

    sizes = {
        OpKind.MEMORY_SEG_SI: 2, OpKind.MEMORY_SEG_ESI: 4, OpKind.MEMORY_SEG_RSI: 8,
        OpKind.MEMORY_SEG_DI: 2, OpKind.MEMORY_SEG_EDI: 4, OpKind.MEMORY_SEG_RDI: 8,
        OpKind.MEMORY_ESDI: 2, OpKind.MEMORY_ESEDI: 4, OpKind.MEMORY_ESRDI: 8,
    }  # fmt: skip
    for operand in range(instruction.op_count):
        if instruction.op_kind(operand) in sizes:
            return sizes[instruction.op_kind(operand)]
    raise CannotTell("the address size of a string instruction")


_M = Mnemonic
_STRING_SIZES: dict[int, int] = {
    _M.MOVSB: 1, _M.MOVSW: 2, _M.MOVSD: 4, _M.MOVSQ: 8,
    _M.STOSB: 1, _M.STOSW: 2, _M.STOSD: 4, _M.STOSQ: 8,
    _M.LODSB: 1, _M.LODSW: 2, _M.LODSD: 4, _M.LODSQ: 8,
    _M.SCASB: 1, _M.SCASW: 2, _M.SCASD: 4, _M.SCASQ: 8,
}  # fmt: skip
_MOVS = frozenset({_M.MOVSB, _M.MOVSW, _M.MOVSD, _M.MOVSQ})
_STOS = frozenset({_M.STOSB, _M.STOSW, _M.STOSD, _M.STOSQ})
_LODS = frozenset({_M.LODSB, _M.LODSW, _M.LODSD, _M.LODSQ})
_SCAS = frozenset({_M.SCASB, _M.SCASW, _M.SCASD, _M.SCASQ})
_READS_MEMORY = _MOVS | _LODS
_WRITES_MEMORY = _MOVS | _STOS


def _string_move(processor: Processor, instruction: Instruction) -> None:
    """MOVSD and STOSD share a name with SSE2's MOVSD, which is not known here."""
    if not instruction.is_string_instruction:
        raise CannotTell("an SSE2 instruction")
    _string(processor, instruction)


HANDLERS: dict[int, Handler] = {
    _M.MOV: _move,
    **dict.fromkeys((_M.MOVZX, _M.MOVSX, _M.MOVSXD), _move_extended),
    _M.LEA: _load_address,
    _M.XCHG: _exchange,
    **dict.fromkeys((_M.CBW, _M.CWDE, _M.CDQE, _M.CWD, _M.CDQ, _M.CQO), _convert),
    _M.BSWAP: _swap_bytes,
    **dict.fromkeys((_M.NOP, _M.MFENCE, _M.LFENCE, _M.SFENCE, _M.ENDBR64, _M.ENDBR32), _nop),
    _M.PUSH: _push,
    _M.POP: _pop,
    **dict.fromkeys((_M.PUSHF, _M.PUSHFD, _M.PUSHFQ), _push_flags),
    **dict.fromkeys((_M.POPF, _M.POPFD, _M.POPFQ), _pop_flags),
    **dict.fromkeys((_M.CLC, _M.STC, _M.CMC, _M.CLD, _M.STD), _set_flag),
    **dict.fromkeys((_M.CLI, _M.STI), _set_interrupt_flag),
    _M.LAHF: _load_ah,
    **dict.fromkeys(_MOVS | _STOS | _LODS, _string_move),
    **dict.fromkeys(_SCAS, _scan),
}
