"""Accesses of L2 to ports and MSRs that did not exit, as far as the program tells.

An access that passes leaves no record. What the program alone shows for certain: in the straight line from
its first instruction to the last exit, with nothing in between that could lead elsewhere, everything was
executed. There the port or MSR is known if it is an immediate, or was loaded into DX or ECX by a MOV since,
with no exit in between whose reaction could have changed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import lru_cache

from iced_x86 import Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind
from iced_x86 import Register as Reg

from vmxlab.cases.memory import PROGRAM
from vmxlab.reports.disassembly import Code

_DX = frozenset({Reg.RDX, Reg.EDX, Reg.DX, Reg.DL, Reg.DH})
_CX = frozenset({Reg.RCX, Reg.ECX, Reg.CX, Reg.CL, Reg.CH})
_WRITES = frozenset({OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE})
_IMMEDIATES = frozenset(
    {OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE64, OpKind.IMMEDIATE32TO64}
)
_WIDE_ENOUGH = {"dx": frozenset({Reg.RDX, Reg.EDX, Reg.DX}), "cx": frozenset({Reg.RCX, Reg.ECX})}


@dataclass(slots=True)
class Passed:
    """Ports, MSRs that were read, and MSRs that were written, without an exit."""

    ports: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)


def passed_accesses(code: Code, exits_at: Set[int]) -> Passed:
    """What passed, of a run with exits at these RIPs (after failed VM entries L2 ran nothing: not those)."""
    found = Passed()
    if not exits_at or code.cs_base:
        return found
    known: dict[str, int | None] = {"dx": None, "cx": None}
    last = max(exits_at)
    for instruction in _straight_line(code):
        if instruction.ip >= last:
            break
        if instruction.ip in exits_at:  # it did not pass, and its reaction may have changed any register
            known = {"dx": None, "cx": None}
            continue
        _take(found, instruction, known)
        _follow(instruction, known)
    return found


def _straight_line(code: Code) -> Iterator[Instruction]:
    """The instructions from the program's start until one that may go elsewhere."""
    for instruction in Decoder(code.mode.bits, code.chunks.get(PROGRAM, b""), ip=PROGRAM):
        if instruction.is_invalid or instruction.flow_control not in (
            FlowControl.NEXT,
            FlowControl.EXCEPTION,
        ):
            return
        yield instruction


def _take(found: Passed, instruction: Instruction, known: dict[str, int | None]) -> None:
    match instruction.mnemonic:
        case Mnemonic.IN:
            _take_ports(found, instruction, 1, 0, known["dx"])
        case Mnemonic.OUT:
            _take_ports(found, instruction, 0, 1, known["dx"])
        case Mnemonic.RDMSR if known["cx"] is not None:
            found.reads.add(known["cx"])
        case Mnemonic.WRMSR if known["cx"] is not None:
            found.writes.add(known["cx"])


def _take_ports(
    found: Passed, instruction: Instruction, port_operand: int, data_operand: int, dx: int | None
) -> None:
    port = dx
    if instruction.op_kind(port_operand) in _IMMEDIATES:
        port = int(instruction.immediate(port_operand)) & 0xFF
    if port is not None:
        size = {Reg.AL: 1, Reg.AX: 2, Reg.EAX: 4}[instruction.op_register(data_operand)]
        found.ports |= {
            (port & 0xFFFF) + offset for offset in range(size) if (port & 0xFFFF) + offset < 0x1_0000
        }


def _follow(instruction: Instruction, known: dict[str, int | None]) -> None:
    """What DX and ECX hold after an instruction."""
    written = {
        used.register for used in _factory().info(instruction).used_registers() if used.access in _WRITES
    }
    for name, registers in (("dx", _DX), ("cx", _CX)):
        if not written & registers:
            continue
        is_load = (
            instruction.mnemonic == Mnemonic.MOV
            and instruction.op_register(0) in _WIDE_ENOUGH[name]
            and instruction.op_kind(1) in _IMMEDIATES
        )
        known[name] = int(instruction.immediate(1)) & 0xFFFF_FFFF if is_load else None


@lru_cache(maxsize=1)
def _factory() -> InstructionInfoFactory:
    return InstructionInfoFactory()
