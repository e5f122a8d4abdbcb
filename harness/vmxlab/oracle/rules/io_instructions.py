"""IN, OUT, INS, OUTS in L2 (SDM Vol. 3C, 26.1.1 and 26.1.3; Vol. 1, 18.5; Vol. 2)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import instruction_exit
from vmxlab.oracle.io import IO_EXIT_SECTION, IO_QUALIFICATION_SECTION, io_exits, io_qualification
from vmxlab.oracle.processor import access, operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.data import advance, string_address_size
from vmxlab.oracle.processor.state import Mode, Processor, general_protection
from vmxlab.oracle.values import NOTHING_KNOWN, UNDEFINED, CannotTell, Rule, Value
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import RFLAGS
from vmxlab.structures import IOBitmap

_EXIT = Rule("I/O instructions exit by the I/O bitmaps, or by unconditional I/O exiting", IO_EXIT_SECTION)
_QUALIFICATION = Rule("exit qualification of I/O instructions", IO_QUALIFICATION_SECTION)
_M = Mnemonic
_TSS_IO_MAP_BASE = 0x66
_RCX, _RDX, _RSI, _RDI = 1, 2, 6, 7


def _io_bitmap(processor: Processor) -> IOBitmap | None:
    """Both bitmaps as they are in memory now."""
    if not processor.on(PrimaryControls.USE_IO_BITMAPS):
        return None
    halves = [
        processor.memory.read_bytes(processor.vmcs.get(which), 4096)
        for which in (Field.IO_BITMAP_A, Field.IO_BITMAP_B)
    ]
    if halves[0] is None or halves[1] is None:
        raise CannotTell("the I/O bitmaps")
    return IOBitmap.from_bytes(halves[0] + halves[1])


def _exits(processor: Processor, port: int, size: int) -> bool:
    return io_exits(processor.primary, _io_bitmap(processor), port, size)


def _require_permission(processor: Processor, port: int, size: int) -> None:
    """#GP(0) by IOPL and the I/O permission bitmap of the TSS (Vol. 1, 18.5.2): before any exit."""
    if processor.mode is Mode.REAL:
        return
    iopl = processor.flag(RFLAGS.IOPL1) * 2 + processor.flag(RFLAGS.IOPL0)
    if processor.cpl <= iopl:
        return
    tss = processor.segments["tr"]
    if tss.limit < _TSS_IO_MAP_BASE + 1:
        raise general_protection("the TSS has no I/O map base")
    where = access.read_linear(processor, tss.base + _TSS_IO_MAP_BASE, 2, implicit=True)
    if not where.knows(0xFFFF):
        raise CannotTell("the I/O map base")
    first = where.value + port // 8
    if first + 1 > tss.limit:
        raise general_protection("the port lies beyond the TSS's I/O permission bitmap")
    bits = access.read_linear(processor, tss.base + first, 2, implicit=True)
    mask = (1 << size) - 1 << port % 8
    if not bits.knows(mask):
        raise CannotTell("the I/O permission bitmap")
    if bits.value & mask:
        raise general_protection("the TSS's I/O permission bitmap")


def _port(processor: Processor, instruction: Instruction, operand: int) -> tuple[int, bool]:
    """(port, whether it is an immediate)."""
    if operands.is_immediate(instruction, operand):
        return int(instruction.immediate(operand)) & 0xFF, True
    return processor.number(_RDX, 2), False


def _io(processor: Processor, instruction: Instruction) -> None:
    """IN and OUT."""
    is_in = instruction.mnemonic == _M.IN
    port, immediate = _port(processor, instruction, 1 if is_in else 0)
    size = operands.operand_size(instruction, 0 if is_in else 1)
    _require_permission(processor, port, size)
    if _exits(processor, port, size):
        qualification = io_qualification(port, size, is_in=is_in, immediate=immediate)
        raise instruction_exit(
            ExitReason.IO_INSTRUCTION, instruction.len, _EXIT, _QUALIFICATION, qualification=qualification
        )
    if is_in:
        processor.note(f"IN: what the device at port {port:#x} answers")
        processor.set(0, NOTHING_KNOWN, size)


_SIZES = {_M.INSB: 1, _M.INSW: 2, _M.INSD: 4, _M.OUTSB: 1, _M.OUTSW: 2, _M.OUTSD: 4}
_INS = frozenset({_M.INSB, _M.INSW, _M.INSD})


def _string_io(processor: Processor, instruction: Instruction) -> None:
    """INS and OUTS. The exit goes before all faults of the memory operand, after #GP(0) by IOPL (26.1.1)."""
    from vmxlab.oracle.rules.information import string_io

    is_in = instruction.mnemonic in _INS
    size = _SIZES[instruction.mnemonic]
    rep = bool(instruction.has_rep_prefix or instruction.has_repne_prefix)
    port = processor.number(_RDX, 2)
    width = string_address_size(processor, instruction)
    _require_permission(processor, port, size)
    segment = "es" if is_in else operands.segment_of(instruction)
    offset = processor.number(_RDI if is_in else _RSI, width)
    nothing = rep and not processor.number(_RCX, width)
    if _exits(processor, port, size):
        if nothing:
            raise CannotTell("whether REP INS or OUTS exits where the count is 0")
        linear: Value = access.linear_address(processor, segment, offset, size, check=False)
        if processor.mode is not Mode.LONG and not processor.segments[segment].usable:
            linear = UNDEFINED
        raise instruction_exit(
            ExitReason.IO_INSTRUCTION,
            instruction.len,
            _EXIT,
            _QUALIFICATION,
            qualification=io_qualification(port, size, is_in=is_in, string=True, rep=rep),
            information=string_io(processor, instruction, is_in=is_in),
            linear=linear,
        )
    if nothing:
        return
    at = access.linear_address(processor, segment, offset, size, write=is_in)
    access.check_alignment(processor, at, size)
    _execute(processor, segment, offset, size, width, is_in=is_in, rep=rep)


def _execute(
    processor: Processor, segment: str, offset: int, size: int, width: int, *, is_in: bool, rep: bool
) -> None:
    """String I/O that does not exit: the data moved are the device's."""
    index = _RDI if is_in else _RSI
    step = -size if processor.flag(RFLAGS.DF) else size
    while True:
        if is_in:
            processor.note("INS: what the device answers")
            access.write(processor, segment, offset, size, NOTHING_KNOWN)
        else:
            access.read(processor, segment, offset, size)
        advance(processor, index, step, width)
        if not rep:
            return
        advance(processor, _RCX, -1, width)
        processor.spend()
        processor.keep_progress()
        if not processor.number(_RCX, width):
            return
        offset = processor.number(index, width)


HANDLERS: dict[int, Handler] = {
    _M.IN: _io,
    _M.OUT: _io,
    **dict.fromkeys(_SIZES, _string_io),
}
