"""What a sweep must see: its digests, and each exit of it (SDM Vol. 3C, 26.1.3).

The rules are those of `vmxlab.oracle.io` and `vmxlab.oracle.msr`, asked of whole bitmaps at once: a sweep has
exits by the hundred thousand.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray

from vmxlab.cases.controls import compute_controls
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.sweep import VMCALL, Question
from vmxlab.oracle.io import PORTS, io_qualification
from vmxlab.oracle.msr import HIGH, LOW, MSR_QUALIFICATION
from vmxlab.sdm.controls import ControlSet, PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.structures import Capabilities


@dataclass(frozen=True, slots=True)
class Digest:
    """Of the values from the `at`-th on: the number of exits, and their CRC-32."""

    at: int
    exits: int
    crc: int


@dataclass(frozen=True, slots=True)
class SweptExit:
    """One exit of a sweep: what the register held, and what the exit records."""

    value: int
    full_reason: int
    rip: int
    qualification: int
    instruction_length: int


# guest/monitor/sweep.c folds these of an exit: value, reason, RIP, then Sweep.fields in their own widths.
_FOLDED = struct.Struct("<QIQQI")


def predict_sweep(question: Question, capabilities: Capabilities) -> list[Digest]:
    """The digests of a question, block by block, as the monitor must report them."""
    exits = _packed_exits(question, capabilities)
    per_value = len(question.offsets)
    size = _FOLDED.size
    digests = []
    for at in range(0, question.count, question.block):
        end = min(at + question.block, question.count)
        piece = exits[at * per_value * size : end * per_value * size]
        digests.append(Digest(at, (end - at) * per_value, zlib.crc32(piece)))
    return digests


def predict_exits(question: Question, capabilities: Capabilities) -> Iterator[SweptExit]:
    """Each exit of a question, in order."""
    for fields in _FOLDED.iter_unpack(_packed_exits(question, capabilities)):
        yield SweptExit(*fields)


def _packed_exits(question: Question, capabilities: Capabilities) -> bytes:
    """All exits as the monitor folds them."""
    instruction = question.instruction
    length, behind = len(instruction.code), PROGRAM + len(instruction.code)
    reason, low, shift = _exit_of(question)
    mask = question.operand_mask if shift else 0
    # An access that does not exit is followed by VMCALL, which always does (26.1.2); its qualification is
    # cleared (28.2.1).
    vmcall, vmcall_length = int(ExitReason.VMCALL), len(VMCALL)
    pack = _FOLDED.pack
    intercepted = _intercepted(question, capabilities)
    return b"".join(
        [
            pack(value, reason, PROGRAM, (value & mask) << shift | low, length)
            if exits
            else pack(value, vmcall, behind, 0, vmcall_length)
            for value, exits in zip(question.sweep().values(), intercepted, strict=True)
        ]
    )


def _exit_of(question: Question) -> tuple[int, int, int]:
    """Of an access that exits: reason, qualification less the port, and the port's place in it (0: none)."""
    instruction = question.instruction
    if instruction.is_io:
        qualification = io_qualification(0, instruction.size, is_in=instruction.is_in)
        return int(ExitReason.IO_INSTRUCTION), qualification, 16
    return int(ExitReason.WRMSR if question.is_write else ExitReason.RDMSR), MSR_QUALIFICATION, 0


def _intercepted(question: Question, capabilities: Capabilities) -> Sequence[int]:
    """Whether each access exits, in the order in which they are made."""
    controls = compute_controls(question.case(), capabilities)
    primary = int(controls[ControlSet.PRIMARY])
    if question.instruction.is_io:
        return _intercepted_io(question, primary)
    return _intercepted_msrs(question, primary)


def _operands(question: Question) -> list[int]:
    """Port or MSR of each access."""
    mask = question.operand_mask
    return [value & mask for value in question.sweep().values()]


def _walked(question: Question) -> list[int]:
    """The port or MSR whose bit is changed, for each access."""
    last = question.first + question.count * question.stride
    return [at for at in range(question.first, last, question.stride) for _ in question.offsets]


def _intercepted_io(question: Question, primary: int) -> Sequence[int]:
    """SDM Vol. 3C, 26.1.3, for all accesses of a question; `vmxlab.oracle.io.io_exits` for one."""
    if not primary & PrimaryControls.USE_IO_BITMAPS or question.io_bitmap is None:
        return [int(bool(primary & PrimaryControls.UNCONDITIONAL_IO_EXITING))] * question.exits
    bits = bitarray(endian="little")
    bits.frombytes(question.io_bitmap.to_bytes())
    size = question.instruction.size
    # bits[port + PORTS] stands for what lies past port FFFFH: an access that runs into it exits.
    bits.extend([1] * size)
    ports = _operands(question)
    if question.walk is None:
        covered = bits[:PORTS]
        for n in range(1, size):
            covered |= bits[n : n + PORTS]
        by_port = covered.tolist()
        return [by_port[port] for port in ports]
    # How many of the bits that an access covers are 1, before one of them is changed.
    flags = bits.tolist()
    ones = [sum(flags[port : port + size]) for port in range(PORTS)]
    if question.walk:
        return [
            ones[port] > 0 or port <= changed < port + size
            for port, changed in zip(ports, _walked(question), strict=True)
        ]
    return [
        ones[port] > (flags[changed] if port <= changed < port + size else 0)
        for port, changed in zip(ports, _walked(question), strict=True)
    ]


def _intercepted_msrs(question: Question, primary: int) -> Sequence[int]:
    """SDM Vol. 3C, 26.1.3, for all accesses of a question; `vmxlab.oracle.msr.msr_exits` for one."""
    bitmap = question.msr_bitmap
    if not primary & PrimaryControls.USE_MSR_BITMAPS or bitmap is None:
        return [1] * question.exits
    low, high = (
        (bitmap.write_low, bitmap.write_high) if question.is_write else (bitmap.read_low, bitmap.read_high)
    )
    flags = bitarray(endian="little")
    flags.frombytes(low + high)
    bits = flags.tolist()
    high_at = len(LOW) - HIGH.start

    def bit(msr: int) -> int:
        if msr in LOW:
            return bits[msr]
        return bits[msr + high_at] if msr in HIGH else 1

    msrs = _operands(question)
    if question.walk is None:
        return [bit(msr) for msr in msrs]
    changed_to = int(question.walk)
    return [
        changed_to if msr == changed else bit(msr)
        for msr, changed in zip(msrs, _walked(question), strict=True)
    ]
