"""Exits that come between instructions: interrupt window, NMI window, monitor trap flag, preemption timer.

SDM Vol. 3C, 26.2 (windows), 26.5.1 (VMX-preemption timer), 26.5.2 (monitor trap flag).
"""

from __future__ import annotations

from vmxlab.oracle.exits import VmExit
from vmxlab.oracle.processor.state import Processor
from vmxlab.oracle.values import CannotTell, Rule
from vmxlab.sdm.controls import PinControls, PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState

_P = PrimaryControls
_BLOCKING = int(InterruptibilityState.BLOCKING_BY_STI | InterruptibilityState.BLOCKING_BY_MOV_SS)
_INTERRUPT_WINDOW = Rule("interrupt-window exiting: RFLAGS.IF is 1, nothing blocks", "Vol. 3C, 26.2")
_NMI_WINDOW = Rule("NMI-window exiting: no virtual-NMI blocking, no blocking by MOV SS", "Vol. 3C, 26.2")


def before_instruction(processor: Processor) -> None:
    """What comes before the next instruction. Raises VmExit, CannotTell."""
    if processor.on(_P.MONITOR_TRAP_FLAG):
        raise CannotTell("the monitor trap flag")
    if processor.rflags.bit(RFLAGS.TF) is not False:
        raise CannotTell("single-stepping by RFLAGS.TF")
    if processor.on(_P.NMI_WINDOW_EXITING):
        _nmi_window(processor)
    if processor.on(_P.INTERRUPT_WINDOW_EXITING):
        enabled = processor.flag(RFLAGS.IF)
        if enabled and not processor.interruptibility & _BLOCKING:
            raise VmExit(ExitReason.INTERRUPT_WINDOW, (_INTERRUPT_WINDOW,))


def _nmi_window(processor: Processor) -> None:
    if processor.interruptibility & InterruptibilityState.BLOCKING_BY_STI:
        raise CannotTell("NMI window with blocking by STI: the SDM leaves it to the processor")
    if not processor.interruptibility & int(
        InterruptibilityState.BLOCKING_BY_NMI | InterruptibilityState.BLOCKING_BY_MOV_SS
    ):
        raise VmExit(ExitReason.NMI_WINDOW, (_NMI_WINDOW,))


def in_halt(processor: Processor) -> None:
    """L2 is halted: nothing but the VMX-preemption timer can end that here."""
    if processor.on(PinControls.ACTIVATE_PREEMPTION_TIMER):
        rule = Rule("the VMX-preemption timer counts in the HLT state", "Vol. 3C, 26.5.1")
        raise VmExit(ExitReason.PREEMPTION_TIMER, (rule,))
    raise CannotTell("L2 is halted, and there is no timer")
