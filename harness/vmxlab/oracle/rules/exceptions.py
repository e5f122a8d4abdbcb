"""Exceptions of L2: by the exception bitmap an exit, else delivered by the IDT (SDM Vol. 3C, 26.2; 28.2.2).

What happens where delivery itself faults stands in Vol. 3A, 6.15 (double fault), and Vol. 3C, 28.2.4 (what
IDT-vectoring information holds).
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import SAVED_RF, VmExit
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import Fault, Mode, Processor
from vmxlab.oracle.values import UNDEFINED, Bits, CannotTell, Rule, Undefined, Value
from vmxlab.sdm.controls import PinControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import CR0, RFLAGS, Vector

_BITMAP = Rule("exceptions exit by the exception bitmap", "Vol. 3C, 26.2, Exceptions")
_PAGE_FAULT = Rule("page faults exit by error-code mask and match", "Vol. 3C, 26.2, Exceptions; 25.6.3")
_INFORMATION = Rule("VM-exit interruption information", "Vol. 3C, 28.2.2")
_VECTORING = Rule("IDT-vectoring information", "Vol. 3C, 28.2.4")
_TRIPLE = Rule("a fault while delivering a double fault is a triple fault", "Vol. 3C, 26.2, Triple fault")
_NMI_BIT = 1 << 12
_U64 = (1 << 64) - 1

_CONTRIBUTORY = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP})


def exits(processor: Processor, fault: Fault) -> bool:
    """Whether an exception causes a VM exit. INT n never does by itself (26.2)."""
    if fault.software == InterruptionType.SOFTWARE_INTERRUPT:
        return False
    bit = bool(processor.vmcs.get(Field.EXCEPTION_BITMAP) >> fault.vector & 1)
    if fault.vector != Vector.PF:
        return bit
    mask = processor.vmcs.get(Field.PAGE_FAULT_ERROR_CODE_MASK)
    match = processor.vmcs.get(Field.PAGE_FAULT_ERROR_CODE_MATCH)
    return bit == ((fault.error_code or 0) & mask == match)


def raise_event(processor: Processor, fault: Fault, instruction_length: int) -> None:
    """An exception or software interrupt: deliver it, or raise the VmExit that it or its delivery causes."""
    if exits(processor, fault):
        raise _exception_exit(processor, fault, instruction_length, None)
    deliver_event(processor, fault, instruction_length)


def _information(processor: Processor, fault: Fault) -> int:
    """Vector, type, error code valid, valid (tables 25-19 and 25-20)."""
    kind = fault.injected if fault.injected is not None else fault.software
    if fault.injected is None and not fault.software:
        kind = InterruptionType.HARDWARE_EXCEPTION
    has_code = fault.error_code is not None and bool(processor.cr0 & CR0.PE)
    return fault.vector | kind << 8 | has_code << 11 | 1 << 31


def _exception_exit(
    processor: Processor, fault: Fault, instruction_length: int, original: Fault | None
) -> VmExit:
    """An exit for an exception; `original`: the event whose delivery met it."""
    information = _information(processor, fault)
    undefined = (
        (processor.on(PinControls.NMI_EXITING) and not processor.on(PinControls.VIRTUAL_NMIS))
        or original is not None
        or fault.vector == Vector.DF
    )
    qualification: Value = 0
    if fault.vector == Vector.PF:
        qualification = fault.linear if fault.linear is not None else UNDEFINED
    elif fault.vector == Vector.DB:
        qualification = fault.debug
    is_software = bool((original or fault).software)
    has_code = bool(information >> 11 & 1)
    rules = (_BITMAP, _PAGE_FAULT) if fault.vector == Vector.PF else (_BITMAP,)
    exit_ = VmExit(
        ExitReason.EXCEPTION_OR_NMI,
        (*rules, _INFORMATION),
        qualification=qualification,
        length=instruction_length if is_software else UNDEFINED,
        interruption=Bits(information, _U64 & ~_NMI_BIT if undefined else _U64),
        error_code=fault.error_code if has_code and fault.error_code is not None else UNDEFINED,
        rf=_saved_rf(original or fault),
        rip=processor.next_rip if fault.trap and original is None else None,
        field_rules={"rflags": (SAVED_RF,)},
    )
    if original is not None:
        _set_vectoring(processor, exit_, original)
    return exit_


def _saved_rf(event: Fault) -> bool | Undefined | None:
    """RF as delivery would have pushed it: 1 for faults, else unchanged (Vol. 3B, 18.3.1.1)."""
    if event.injected is not None:
        return UNDEFINED  # which image delivery of an injected event pushes is not said for each type
    return None if event.software or event.trap else True


def _set_vectoring(processor: Processor, exit_: VmExit, original: Fault) -> None:
    """IDT-vectoring information of an exit that an event's delivery met (28.2.4)."""
    information = _information(processor, original)
    exit_.idt_vectoring = Bits(information, _U64 & ~_NMI_BIT)
    if information >> 11 & 1 and original.error_code is not None:
        exit_.idt_vectoring_error_code = original.error_code
    exit_.field_rules |= {
        "raw_idt_vectoring_information": (_VECTORING,),
        "idt_vectoring_error_code": (_VECTORING,),
    }


# --- delivery ----------------------------------------------------------------------------------------------


def deliver_event(processor: Processor, event: Fault, length: int) -> None:
    """Deliver through the IDT. Faults of the delivery become exits, other events, or the triple fault."""
    from vmxlab.oracle.processor import delivery

    processor.delivering = True
    try:
        delivery.deliver(processor, event)
    except VmExit as exit_:  # EPT: met in event delivery
        _set_vectoring(processor, exit_, event)
        exit_.rf = _saved_rf(event)
        exit_.length = length if event.software else UNDEFINED
        raise
    except Fault as fault:
        _second(processor, event, fault, length)
    finally:
        processor.delivering = False


def _second(processor: Processor, first: Fault, second: Fault, length: int) -> None:
    """A fault while delivering an event (Vol. 3A, table 6-5)."""
    if exits(processor, second):
        raise _exception_exit(processor, second, length, first)
    if first.vector == Vector.DF and not first.software:
        raise VmExit(ExitReason.TRIPLE_FAULT, (_TRIPLE,), rf=UNDEFINED, field_rules={"rflags": (SAVED_RF,)})
    if _makes_double_fault(first, second):
        double = Fault(Vector.DF, 0)
        if exits(processor, double):
            # 28.2.4: an exit caused directly by the double fault is not one during event delivery.
            raise _exception_exit(processor, double, length, None)
        deliver_event(processor, double, length)
        return
    deliver_event(processor, second, length)


def _makes_double_fault(first: Fault, second: Fault) -> bool:
    if first.software or first.injected in (InterruptionType.EXTERNAL_INTERRUPT, InterruptionType.NMI):
        return False  # INT n, INT3, INTO, interrupts: benign
    if first.vector in (Vector.PF, Vector.VE):
        return second.vector == Vector.PF or second.vector in _CONTRIBUTORY
    return first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY


# --- the instructions --------------------------------------------------------------------------------------


def _breakpoint(processor: Processor, instruction: Instruction) -> None:
    raise Fault(Vector.BP, software=InterruptionType.SOFTWARE_EXCEPTION)


def _into(processor: Processor, instruction: Instruction) -> None:
    if processor.flag(RFLAGS.OF):
        raise Fault(Vector.OF, software=InterruptionType.SOFTWARE_EXCEPTION)


def _int1(processor: Processor, instruction: Instruction) -> None:
    raise CannotTell("INT1: what the exit qualification of its #DB is")


def _interrupt(processor: Processor, instruction: Instruction) -> None:
    if processor.mode is not Mode.LONG:
        raise CannotTell("INT n outside 64-bit mode")
    raise Fault(int(instruction.immediate(0)) & 0xFF, software=InterruptionType.SOFTWARE_INTERRUPT)


def _interrupt_return(processor: Processor, instruction: Instruction) -> None:
    from vmxlab.oracle.processor import delivery

    if instruction.mnemonic != Mnemonic.IRETQ:
        raise CannotTell("IRET of 16 or 32 bits")
    delivery.return_from_event(processor)


HANDLERS: dict[int, Handler] = {
    Mnemonic.INT3: _breakpoint,
    Mnemonic.INTO: _into,
    Mnemonic.INT1: _int1,
    Mnemonic.INT: _interrupt,
    **dict.fromkeys((Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ), _interrupt_return),
}
