"""LGDT and its relatives in L2 (SDM Vol. 3C, 26.1.3; 28.2.1; 28.2.5, tables 28-10 and 28-11)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import VmExit, instruction_exit
from vmxlab.oracle.processor import access, operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import (
    Fault,
    Mode,
    Processor,
    canonical,
    general_protection,
    need,
    undefined_opcode,
)
from vmxlab.oracle.rules import information
from vmxlab.oracle.values import Bits, CannotTell, Rule, Unknown
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.registers import CR4

_M = Mnemonic
_EXIT = Rule('descriptor-table instructions exit by "descriptor-table exiting"', "Vol. 3C, 26.1.3, LGDT")
OPERAND = Rule(
    "a violation by the operand of a descriptor-table instruction has the addresses of that access",
    "Vol. 3C, 28.2.1",
)
_TABLES = {_M.SGDT: 0, _M.SIDT: 1, _M.LGDT: 2, _M.LIDT: 3}
_SEGMENTS = {_M.SLDT: 0, _M.STR: 1, _M.LLDT: 2, _M.LTR: 3}
_PARTS = "whether limit or base of a pseudo-descriptor is accessed first"
_LOADS = frozenset({_M.LGDT, _M.LIDT, _M.LLDT, _M.LTR})


def _refuse_privilege(processor: Processor, instruction: Instruction) -> None:
    """Loads need CPL 0, and stores too where CR4.UMIP is 1: before the exit (26.1.1)."""
    if instruction.mnemonic in _LOADS:
        processor.require_cpl0()
    elif processor.cr4 & CR4.UMIP and processor.cpl:
        raise general_protection("CR4.UMIP is 1 and CPL is above 0")


def _table(processor: Processor, instruction: Instruction) -> None:
    """SGDT, SIDT, LGDT, LIDT."""
    _refuse_privilege(processor, instruction)
    name = instruction.mnemonic
    if processor.on(SecondaryControls.DESCRIPTOR_TABLE_EXITING):
        raise instruction_exit(
            ExitReason.GDTR_IDTR_ACCESS,
            instruction.len,
            _EXIT,
            operands.displacement_rule(instruction),
            qualification=operands.displacement(processor, instruction),
            information=information.descriptor_table(processor, instruction, _TABLES[name]),
        )
    size = 10 if processor.is_long else 6
    offset = operands.effective_address(processor, instruction)
    segment = operands.segment_of(instruction)
    if name in (_M.SGDT, _M.SIDT):
        base, limit = processor.gdtr if name == _M.SGDT else processor.idtr
        value = limit & 0xFFFF | base << 16
        try:
            access.write(processor, segment, offset, size, Bits(value & (1 << 8 * size) - 1, (1 << 80) - 1))
        except VmExit as exit_:
            exit_.linear = exit_.physical = Unknown(_PARTS)
            raise
        return
    linear = access.linear_address(processor, segment, offset, size)
    try:
        content = access.read_linear(processor, linear, size)
    except VmExit as exit_:
        exit_.linear = exit_.physical = Unknown(_PARTS)
        raise
    except Fault as fault:
        raise CannotTell(_PARTS) from fault
    if not content.knows((1 << 8 * size) - 1):
        raise CannotTell("the operand of LGDT or LIDT")
    base = content.value >> 16
    if processor.is_long and not canonical(base, processor.cr4):
        raise general_protection("a non-canonical base (Vol. 2A, LGDT)")
    if not processor.is_long and instruction.op_code().operand_size == 16:
        base &= 0xFF_FFFF
    new = (base, content.value & 0xFFFF)
    if name == _M.LGDT:
        processor.gdtr = new
    else:
        processor.idtr = new


def _segment(processor: Processor, instruction: Instruction) -> None:
    """SLDT, STR, LLDT, LTR."""
    if processor.mode is Mode.REAL:
        raise undefined_opcode("not in real-address mode")
    _refuse_privilege(processor, instruction)
    name = instruction.mnemonic
    if processor.on(SecondaryControls.DESCRIPTOR_TABLE_EXITING):
        raise instruction_exit(
            ExitReason.LDTR_TR_ACCESS,
            instruction.len,
            _EXIT,
            operands.displacement_rule(instruction),
            qualification=operands.displacement(processor, instruction),
            information=information.system_segment(processor, instruction, _SEGMENTS[name]),
        )
    if name in _LOADS:
        selector = need(operands.read(processor, instruction, 0), 2, "a selector")
        if name == _M.LTR and not selector & ~3:
            raise general_protection("LTR of a null selector")
        raise CannotTell("LLDT or LTR that is executed")
    selector = processor.segments["ldtr" if name == _M.SLDT else "tr"].selector
    operands.write(processor, instruction, 0, Bits(selector))


def _naming_its_operand(handler: Handler) -> Handler:
    """The handler, whose EPT violations say that they are by the instruction's operand."""

    def handle(processor: Processor, instruction: Instruction) -> None:
        try:
            handler(processor, instruction)
        except VmExit as exit_:
            if exit_.reason == ExitReason.EPT_VIOLATION:
                exit_.rules = (*exit_.rules, OPERAND)
            raise

    return handle


HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_TABLES, _naming_its_operand(_table)),
    **dict.fromkeys(_SEGMENTS, _naming_its_operand(_segment)),
}
