"""Checks on VM-entry control fields, with event injection (SDM Vol. 3C, 27.2.1.3)."""

from __future__ import annotations

from vmxlab.oracle.entry.addresses import msr_area
from vmxlab.oracle.entry.reserved import reserved_controls
from vmxlab.oracle.entry.rule import Area, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import ControlSet, EntryControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import Vector

TABLE = RuleTable(Area.CONTROLS, "27.2.1.3")
rule = TABLE.rule

_INFORMATION = Field.ENTRY_INTERRUPTION_INFORMATION
_NESTED_EXCEPTION = 1 << 13
_SOFTWARE = (
    InterruptionType.SOFTWARE_INTERRUPT,
    InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
    InterruptionType.SOFTWARE_EXCEPTION,
)
# #CP (21) is not among them: a processor that has it says so by IA32_VMX_BASIC[56] for all vectors.
_DELIVER_ERROR_CODE = frozenset(v for v in Vector if v.has_error_code and v is not Vector.CP)

reserved_controls(TABLE, ControlSet.ENTRY)


@rule(_INFORMATION)
def injected_type(vmcs: Vmcs) -> bool:
    """An injected event's type is not 1; and 7 (other event) only where "monitor trap flag" may be 1."""
    event = vmcs.injects
    if not event.valid:
        return True
    if event.type is InterruptionType.OTHER_EVENT:
        return vmcs.capabilities.supports(PrimaryControls.MONITOR_TRAP_FLAG)
    return event.type is not InterruptionType.RESERVED


@rule(_INFORMATION)
def injected_nmi_vector(vmcs: Vmcs) -> bool:
    """An injected NMI has vector 2."""
    return not vmcs.injects_type(InterruptionType.NMI) or vmcs.injects.vector == Vector.NMI


@rule(_INFORMATION)
def injected_exception_vector(vmcs: Vmcs) -> bool:
    """An injected hardware exception has a vector of at most 31."""
    return not vmcs.injects_type(InterruptionType.HARDWARE_EXCEPTION) or vmcs.injects.vector <= 31


@rule(_INFORMATION)
def injected_other_event_vector(vmcs: Vmcs) -> bool:
    """An injected "other event" has vector 0: a pending MTF VM exit."""
    return not vmcs.injects_type(InterruptionType.OTHER_EVENT) or vmcs.injects.vector == 0


@rule(_INFORMATION, Field.GUEST_CR0)
def injected_error_code_without_reason(vmcs: Vmcs) -> bool:
    """ "Deliver error code" is 1 only for a hardware exception; not in real mode of an unrestricted guest;
    and, where IA32_VMX_BASIC[56] is 0, only for a vector that has an error code.
    """
    event = vmcs.injects
    if not event.valid or not event.error_code_valid:
        return True
    return _may_have_error_code(vmcs) and (_any_vector(vmcs) or event.vector in _DELIVER_ERROR_CODE)


@rule(_INFORMATION, Field.GUEST_CR0)
def injected_error_code_missing(vmcs: Vmcs) -> bool:
    """Where IA32_VMX_BASIC[56] is 0, a hardware exception that has an error code is injected with it."""
    event = vmcs.injects
    if not event.valid or event.error_code_valid or event.vector not in _DELIVER_ERROR_CODE:
        return True
    return _any_vector(vmcs) or not _may_have_error_code(vmcs)


def _any_vector(vmcs: Vmcs) -> bool:
    return vmcs.capability(lambda: vmcs.capabilities.basic.error_code_any_vector)


def _may_have_error_code(vmcs: Vmcs) -> bool:
    if vmcs.injects.type is not InterruptionType.HARDWARE_EXCEPTION:
        return False
    return not vmcs.on(SecondaryControls.UNRESTRICTED_GUEST) or vmcs.protected


@rule(_INFORMATION)
def injected_reserved(vmcs: Vmcs) -> bool:
    """Bits 30:12 of an injected event's interruption information are 0; with IA32_VMX_BASIC[58] bit 13 of a
    hardware exception may be 1.
    """
    event = vmcs.injects
    if not event.valid:
        return True
    nested = vmcs.capability(lambda: vmcs.capabilities.basic.nested_exception)
    allowed = _NESTED_EXCEPTION if nested and event.type is InterruptionType.HARDWARE_EXCEPTION else 0
    return not event.nmi_unblocking and not event.other_bits & ~allowed


@rule(_INFORMATION, Field.ENTRY_EXCEPTION_ERROR_CODE)
def injected_error_code_reserved(vmcs: Vmcs) -> bool:
    """Bits 31:16 of an injected error code are 0."""
    event = vmcs.injects
    if not event.valid or not event.error_code_valid:
        return True
    return not vmcs[Field.ENTRY_EXCEPTION_ERROR_CODE] >> 16


@rule(_INFORMATION, Field.ENTRY_INSTRUCTION_LENGTH)
def injected_instruction_length(vmcs: Vmcs) -> bool:
    """A software interrupt or exception is injected with an instruction length of 1 to 15 (0 is allowed where
    IA32_VMX_MISC[30] is 1).
    """
    event = vmcs.injects
    if not event.valid or event.type not in _SOFTWARE:
        return True
    length = vmcs[Field.ENTRY_INSTRUCTION_LENGTH]
    if length == 0:
        return vmcs.capability(lambda: vmcs.capabilities.misc.zero_length_injection)
    return length <= 15


msr_area(TABLE, Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT, "VM-entry MSR-load")


@rule()
def entry_to_smm_outside_smm(vmcs: Vmcs) -> bool:
    """Outside of SMM, "entry to SMM" is 0."""
    return vmcs.environment.in_smm or not vmcs.on(EntryControls.ENTRY_TO_SMM)


@rule()
def deactivate_dual_monitor_outside_smm(vmcs: Vmcs) -> bool:
    """Outside of SMM, "deactivate dual-monitor treatment" is 0."""
    return vmcs.environment.in_smm or not vmcs.on(EntryControls.DEACTIVATE_DUAL_MONITOR)


@rule(when=[EntryControls.ENTRY_TO_SMM])
def entry_to_smm_excludes_deactivate_dual_monitor(vmcs: Vmcs) -> bool:
    """ "Entry to SMM" and "deactivate dual-monitor treatment" are not both 1."""
    return not vmcs.on(EntryControls.DEACTIVATE_DUAL_MONITOR)
