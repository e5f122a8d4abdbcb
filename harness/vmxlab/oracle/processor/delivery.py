"""Delivering an event through the IDT of 64-bit mode (SDM Vol. 3A, 6.14; Vol. 2A, INT n).

Known are handlers of the same privilege level, without an interrupt stack table. An IDT that is too short for
the vector is a #GP in every mode.
"""

from __future__ import annotations

from vmxlab.oracle.exits import VmExit
from vmxlab.oracle.processor import access
from vmxlab.oracle.processor.state import (
    LONG_CODE,
    RSP,
    Fault,
    Mode,
    Processor,
    Segment,
    canonical,
    general_protection,
)
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell, Unknown
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState, Vector

_GATE_BYTES = {Mode.LONG: 16, Mode.COMPATIBILITY: 16, Mode.PROTECTED: 8, Mode.REAL: 4}
_INTERRUPT_GATE, _TRAP_GATE = 14, 15
_IN_IDT = 2
_U64 = (1 << 64) - 1


def deliver(processor: Processor, event: Fault) -> None:
    """Go on at the event's handler. Raises Fault and VmExit for what the delivery meets."""
    mode = processor.mode
    size = _GATE_BYTES[mode]
    external = 0 if _is_of_the_program(event) else 1
    code = event.vector * 8 + _IN_IDT + external
    base, limit = processor.idtr
    if event.vector * size + size - 1 > limit:
        if mode is Mode.REAL:
            raise CannotTell("an interrupt vector table that is too short")
        raise Fault(Vector.GP, code, why="the vector lies beyond the IDT's limit")
    if mode is not Mode.LONG:
        raise CannotTell("event delivery outside 64-bit mode")
    gate = access.read_linear(processor, base + 16 * event.vector, 16, implicit=True)
    if not gate.knows((1 << 128) - 1):
        raise CannotTell("a gate of the IDT")
    _check_gate(processor, event, gate.value, code)
    code_segment = _code_segment(processor, gate.value >> 16 & 0xFFFF, external)
    target = (
        gate.value & 0xFFFF | gate.value >> 48 - 16 & 0xFFFF_0000 | gate.value >> 64 - 32 & 0xFFFF_FFFF << 32
    )
    _push_frame(processor, event, target)
    processor.segments["cs"] = code_segment
    flags = {"tf": False, "nt": False, "rf": False, "vm": False}
    if gate.value >> 40 & 0xF == _INTERRUPT_GATE:
        flags["if"] = False
    processor.set_flags(**flags)
    if event.vector == Vector.PF and event.linear is not None and not event.software:
        processor.carried.cr2 = Bits(event.linear)
    if event.vector == Vector.DB and not event.software:
        processor.carried.debug.pop(6, None)
    processor.next_rip = target


def _is_of_the_program(event: Fault) -> bool:
    """INT n, INT3, INTO: EXT is 0, and the gate's DPL counts. Not INT1 (Vol. 3A, 6.12.1.2 and 6.13)."""
    return event.software in (InterruptionType.SOFTWARE_INTERRUPT, InterruptionType.SOFTWARE_EXCEPTION)


def _check_gate(processor: Processor, event: Fault, gate: int, code: int) -> None:
    if gate >> 40 & 0x1F not in (_INTERRUPT_GATE, _TRAP_GATE):
        raise Fault(Vector.GP, code, why="no interrupt or trap gate")
    if _is_of_the_program(event) and gate >> 45 & 3 < processor.cpl:
        raise Fault(Vector.GP, code, why="the gate's DPL is below CPL")
    if not gate >> 47 & 1:
        raise Fault(Vector.NP, code, why="the gate is not present")
    if gate >> 32 & 7:
        raise CannotTell("an interrupt stack table")


def return_from_event(processor: Processor) -> None:
    """IRETQ to the same privilege level (Vol. 2A, IRET): RIP, CS, RFLAGS, RSP, SS. Ends blocking by NMI."""
    if processor.mode is not Mode.LONG:
        raise CannotTell("IRET outside 64-bit mode")
    blocked = processor.interruptibility & InterruptibilityState.BLOCKING_BY_NMI
    try:
        _return(processor)
    except (Fault, VmExit) as stopped:
        if blocked:
            raise CannotTell("an IRET that faults while NMIs are blocked") from None
        if isinstance(stopped, VmExit):
            # Which part of the frame is read first the SDM does not say.
            stopped.linear = stopped.physical = Unknown("the order in which IRET reads its frame")
        elif stopped.linear is not None:
            raise CannotTell("the order in which IRET reads its frame") from None
        raise
    processor.interruptibility &= ~int(InterruptibilityState.BLOCKING_BY_NMI)


def _return(processor: Processor) -> None:
    top = processor.number(RSP)
    frame = []
    for i in range(5):
        value = access.read(processor, "ss", top + 8 * i & _U64, 8)
        frame.append(value)
    rip, cs, flags, rsp, ss = frame
    for value in (rip, cs, rsp, ss):
        if not value.knows(_U64):
            raise CannotTell("a frame that IRET takes")
    if processor.rflags.bit(RFLAGS.NT) is not False:
        raise CannotTell("IRET with RFLAGS.NT")
    if cs.value & 3 != processor.cpl or ss.value & 0xFFFF != processor.segments["ss"].selector:
        raise CannotTell("IRET to another privilege level or stack segment")
    segment = _code_segment(processor, cs.value & 0xFFFF, 0)
    _require_same_stack_segment(processor)
    if not canonical(rip.value, processor.cr4):
        raise general_protection("IRET to a non-canonical address")
    if processor.cpl or flags.bit(RFLAGS.TF) is not False:
        raise CannotTell("IRET with CPL above 0, or to single-stepping")
    processor.segments["cs"] = segment
    kept = int(RFLAGS.VM | RFLAGS.VIF | RFLAGS.VIP | RFLAGS.FIXED1) | ~0x3F7FD5 & _U64
    processor.rflags = flags.with_bits(kept, processor.rflags)
    processor.set(RSP, rsp.value)
    processor.next_rip = rip.value
    processor.keeps_rf = True


def _require_same_stack_segment(processor: Processor) -> None:
    """CannotTell where SS would be loaded with something else than it holds."""
    stack = processor.segments["ss"]
    base, _ = processor.gdtr
    raw = access.read_linear(processor, base + stack.selector // 8 * 8, 8, implicit=True)
    rights = raw.value >> 40 & 0xF0FF | 1
    if not raw.knows(_U64) or rights != stack.rights | 1 or _base(raw.value) != stack.base:
        raise CannotTell("IRET that loads another stack segment")


def _code_segment(processor: Processor, selector: int, external: int) -> Segment:
    """The handler's code segment: of the same privilege level, from the GDT."""
    code = selector & ~3 | external
    if not selector & ~3:
        raise Fault(Vector.GP, external, why="a null selector")
    base, limit = processor.gdtr
    if selector & 4 or selector // 8 * 8 + 7 > limit:
        if selector & 4:
            raise CannotTell("a code segment in the LDT")
        raise Fault(Vector.GP, code, why="the selector lies beyond the GDT's limit")
    raw = access.read_linear(processor, base + selector // 8 * 8, 8, implicit=True)
    if not raw.knows(_U64):
        raise CannotTell("a descriptor of the GDT")
    descriptor = raw.value
    rights = descriptor >> 40 & 0xF0FF
    if not rights & 0x18 == 0x18 or not rights & LONG_CODE or rights & BIG_CODE:
        raise Fault(Vector.GP, code, why="no 64-bit code segment")
    if not rights & 0x80:
        raise Fault(Vector.NP, code, why="the code segment is not present")
    if rights >> 5 & 3 != processor.cpl:
        raise CannotTell("a handler of another privilege level")
    limit_field = descriptor & 0xFFFF | descriptor >> 32 & 0xF_0000
    if descriptor >> 55 & 1:
        limit_field = limit_field << 12 | 0xFFF
    return Segment(selector & ~3 | processor.cpl, _base(descriptor), limit_field, rights | 1)


BIG_CODE = 1 << 14


def _base(descriptor: int) -> int:
    return descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000


def _push_frame(processor: Processor, event: Fault, target: int) -> None:
    """SS, RSP, RFLAGS, CS, RIP and the error code, from an aligned stack (Vol. 3A, 6.14.2)."""
    if not canonical(target, processor.cr4):
        raise general_protection("the handler's address is not canonical")
    old = processor.number(RSP)
    flags = processor.rflags
    if event.injected is not None:
        flags = flags.with_bits(int(RFLAGS.RF), NOTHING_KNOWN)
    elif not event.software and not event.trap:
        flags = flags.with_bits(int(RFLAGS.RF), Bits(int(RFLAGS.RF), int(RFLAGS.RF)))
    rip = processor.next_rip if event.software or event.trap else processor.rip
    frame = [
        Bits(processor.segments["ss"].selector),
        Bits(old),
        flags,
        Bits(processor.segments["cs"].selector),
        Bits(rip),
    ]
    if event.error_code is not None:
        frame.append(Bits(event.error_code))
    top = old & ~0xF & _U64
    for value in frame:
        top = top - 8 & _U64
        linear = access.linear_address(processor, "ss", top, 8, write=True)
        access.write_linear(processor, linear, 8, value, implicit=False)
    processor.set(RSP, top)
