"""Event injection by VM entry (SDM Vol. 3C, 27.6): the event goes through the IDT of L2.

The exception bitmap is not asked about the event itself, but about what its delivery meets.
"""

from __future__ import annotations

from vmxlab.oracle.exits import VmExit
from vmxlab.oracle.processor.state import Fault, Processor
from vmxlab.oracle.rules import exceptions
from vmxlab.oracle.values import CannotTell
from vmxlab.sdm.fields import Field
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.registers import InterruptibilityState

_SOFTWARE = (
    InterruptionType.SOFTWARE_INTERRUPT,
    InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
    InterruptionType.SOFTWARE_EXCEPTION,
)


def inject_event(processor: Processor) -> VmExit | None:
    """Deliver the event that VM entry injects; the exit that its delivery causes. Raises CannotTell."""
    raw = processor.vmcs.get(Field.ENTRY_INTERRUPTION_INFORMATION)
    event = InterruptionInformation.from_bits(raw)
    if not event.valid:
        return None
    if event.type is InterruptionType.OTHER_EVENT:
        raise CannotTell("injection of a pending MTF exit")
    is_software = event.type in _SOFTWARE
    length = processor.vmcs.get(Field.ENTRY_INSTRUCTION_LENGTH) if is_software else 0
    code = processor.vmcs.get(Field.ENTRY_EXCEPTION_ERROR_CODE) if event.error_code_valid else None
    fault = Fault(
        event.vector, code, software=int(event.type) if is_software else 0, injected=int(event.type)
    )
    processor.halted = False  # 27.7.2: an event that is injected wakes it
    processor.keep_progress()
    processor.next_rip = processor.rip + length
    processor.interruptibility &= ~int(
        InterruptibilityState.BLOCKING_BY_STI | InterruptibilityState.BLOCKING_BY_MOV_SS
    )
    if event.type is InterruptionType.NMI:  # of NMIs, or with "virtual NMIs" of virtual ones (27.6.1.2)
        processor.interruptibility |= int(InterruptibilityState.BLOCKING_BY_NMI)
    try:
        exceptions.deliver_event(processor, fault, length)
    except VmExit as exit_:
        return exit_
    processor.rip = processor.next_rip
    return None
