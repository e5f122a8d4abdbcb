"""MOV to and from debug registers in L2 (SDM Vol. 3C, 26.1.3, MOV DR; 28.2.1, table 28-4; Vol. 3B, 18.2)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, Register

from vmxlab.oracle.exits import instruction_exit
from vmxlab.oracle.processor import operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import Fault, Processor, general_protection, undefined_opcode
from vmxlab.oracle.rules import control_registers
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell, Rule
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.registers import CR4, DR6, DR7, Vector

_EXIT = Rule("MOV DR exits by its control, before all but #UD for DR8 and up", "Vol. 3C, 26.1.3, MOV DR")
_TABLE = Rule("exit qualification of MOV DR", "Vol. 3C, 28.2.1, table 28-4")
_NUMBERS = {getattr(Register, f"DR{n}"): n for n in range(16)}
_ENABLES = 0xFF
_DR7_ZERO = 0xD000  # bits 12, 14, 15


def _move(processor: Processor, instruction: Instruction) -> None:
    for operand in (0, 1):
        if operands.is_register(instruction, operand) and instruction.op_register(operand) in _NUMBERS:
            number = _NUMBERS[instruction.op_register(operand)]
            register = operands.register_index(instruction.op_register(1 - operand))
            _move_debug(processor, instruction, number, register, read=operand == 1)
            return
    control_registers.HANDLERS[Mnemonic.MOV](processor, instruction)


def _move_debug(
    processor: Processor, instruction: Instruction, number: int, register: int, *, read: bool
) -> None:
    if number > 7:
        raise undefined_opcode("there is no such debug register")
    if processor.on(PrimaryControls.MOV_DR_EXITING):
        raise instruction_exit(
            ExitReason.MOV_DR,
            instruction.len,
            _EXIT,
            _TABLE,
            qualification=number | read << 4 | register << 8,
        )
    if number in (4, 5):
        if processor.cr4 & CR4.DE:
            raise undefined_opcode("DR4 and DR5 with CR4.DE")
        number += 2
    detect = processor.dr7.bit(DR7.GD)
    if detect is None:
        raise CannotTell("DR7.GD")
    if detect and processor.cpl:
        raise CannotTell("MOV DR with DR7.GD and CPL above 0: the SDM does not order #DB and #GP")
    processor.require_cpl0()
    if detect:
        raise Fault(Vector.DB, debug=int(DR6.BD), why="general detect")
    size = 8 if processor.is_long else 4
    if read:
        _read(processor, number, register, size)
    else:
        _write(processor, number, processor.get(register, size), size)


def _read(processor: Processor, number: int, register: int, size: int) -> None:
    if number == 7:
        processor.set(register, processor.dr7, size)
        return
    value = processor.carried.debug.get(number, NOTHING_KNOWN)
    if not value.known:
        processor.note(f"what DR{number} holds")
    processor.set(register, value, size)


def _write(processor: Processor, number: int, value: Bits, size: int) -> None:
    if number >= 6 and size == 8:
        upper = 0xFFFF_FFFF << 32
        if not value.knows(upper):
            raise CannotTell("the upper half of a debug register's new value")
        if value.value & upper:
            raise general_protection("bits 63:32 of DR6 and DR7")
    if number == 7:
        if not value.knows((1 << 32) - 1):
            raise CannotTell("the new value of DR7")
        if value.value & _ENABLES:
            raise CannotTell("breakpoints")
        rtm = int(DR7.RTM) if value.value & DR7.RTM else 0
        new = value.value & ~_DR7_ZERO & 0xFFFF_FFFF | int(DR7.FIXED1)
        processor.dr7 = Bits(new, (1 << 64) - 1 & ~rtm)
    elif number == 6:
        processor.carried.debug[6] = NOTHING_KNOWN
    else:
        mask = (1 << 8 * size) - 1
        processor.carried.debug[number] = Bits(value.value & mask, value.known | ~mask & (1 << 64) - 1)


HANDLERS: dict[int, Handler] = {Mnemonic.MOV: _move}
