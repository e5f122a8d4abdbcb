"""Which type decodes the qualification of which basic exit reason (SDM Vol. 3C, 28.2.1).

Apart from the package itself, so that loading some thirty classes waits for the first qualification.
"""

from __future__ import annotations

from collections.abc import Callable

from vmxlab.sdm.exit_reasons import ExitReason, basic_reason
from vmxlab.sdm.qualifications.base import PlainQualification, Qualification
from vmxlab.sdm.qualifications.events import (
    DebugExceptionQualification,
    EntryFailureCause,
    EntryFailureQualification,
    InstructionTimeoutQualification,
    MsrLoadFailureQualification,
    PageFaultQualification,
    SipiQualification,
    TaskSwitchQualification,
    TaskSwitchSource,
    VirtualizedEoiQualification,
)
from vmxlab.sdm.qualifications.instructions import (
    ControlRegisterQualification,
    CrAccessType,
    DebugRegisterQualification,
    DisplacementQualification,
    InvalidationQualification,
    InvlpgQualification,
    IoQualification,
    MsrQualification,
    MwaitQualification,
    PasidQualification,
    WbinvdQualification,
    WrmsrQualification,
)
from vmxlab.sdm.qualifications.memory import (
    ApicAccessQualification,
    ApicAccessType,
    ApicWriteQualification,
    EptViolationQualification,
    PmlFullQualification,
    SppQualification,
)
from vmxlab.sdm.registers import Vector

__all__ = [
    "ApicAccessQualification",
    "ApicAccessType",
    "ApicWriteQualification",
    "ControlRegisterQualification",
    "CrAccessType",
    "DebugExceptionQualification",
    "DebugRegisterQualification",
    "DisplacementQualification",
    "EntryFailureCause",
    "EntryFailureQualification",
    "EptViolationQualification",
    "InstructionTimeoutQualification",
    "InvalidationQualification",
    "InvlpgQualification",
    "IoQualification",
    "MsrLoadFailureQualification",
    "MsrQualification",
    "MwaitQualification",
    "PageFaultQualification",
    "PasidQualification",
    "PlainQualification",
    "PmlFullQualification",
    "Qualification",
    "SipiQualification",
    "SppQualification",
    "TaskSwitchQualification",
    "TaskSwitchSource",
    "VirtualizedEoiQualification",
    "WbinvdQualification",
    "WrmsrQualification",
    "decode",
]

_DISPLACEMENT_REASONS = (
    ExitReason.GDTR_IDTR_ACCESS,
    ExitReason.LDTR_TR_ACCESS,
    ExitReason.VMCLEAR,
    ExitReason.VMPTRLD,
    ExitReason.VMPTRST,
    ExitReason.VMREAD,
    ExitReason.VMWRITE,
    ExitReason.VMXON,
    ExitReason.XSAVES,
    ExitReason.XRSTORS,
)
_INVALIDATION_REASONS = (ExitReason.INVEPT, ExitReason.INVPCID, ExitReason.INVVPID)
_MSR_REASONS = (
    ExitReason.RDMSRLIST,
    ExitReason.WRMSRLIST,
    ExitReason.URDMSR,
    ExitReason.UWRMSR,
    ExitReason.RDMSR_IMMEDIATE,
    ExitReason.WRMSRNS_IMMEDIATE,
)
_PASID_REASONS = (
    ExitReason.ENQCMD_PASID_TRANSLATION_FAILURE,
    ExitReason.ENQCMDS_PASID_TRANSLATION_FAILURE,
)

DECODERS: dict[int, Callable[[int], Qualification]] = {
    ExitReason.SIPI: SipiQualification.decode,
    ExitReason.TASK_SWITCH: TaskSwitchQualification.decode,
    ExitReason.INVLPG: InvlpgQualification.decode,
    ExitReason.CONTROL_REGISTER_ACCESS: ControlRegisterQualification.decode,
    ExitReason.MOV_DR: DebugRegisterQualification.decode,
    ExitReason.IO_INSTRUCTION: IoQualification.decode,
    ExitReason.WRMSR: WrmsrQualification.decode,
    ExitReason.ENTRY_FAILURE_GUEST_STATE: EntryFailureQualification.decode,
    ExitReason.ENTRY_FAILURE_MSR_LOADING: MsrLoadFailureQualification.decode,
    ExitReason.MWAIT: MwaitQualification.decode,
    ExitReason.APIC_ACCESS: ApicAccessQualification.decode,
    ExitReason.VIRTUALIZED_EOI: VirtualizedEoiQualification.decode,
    ExitReason.EPT_VIOLATION: EptViolationQualification.decode,
    ExitReason.WBINVD: WbinvdQualification.decode,
    ExitReason.APIC_WRITE: ApicWriteQualification.decode,
    ExitReason.PML_FULL: PmlFullQualification.decode,
    ExitReason.SPP: SppQualification.decode,
    ExitReason.INSTRUCTION_TIMEOUT: InstructionTimeoutQualification.decode,
    **dict.fromkeys(_DISPLACEMENT_REASONS, DisplacementQualification.decode),
    **dict.fromkeys(_INVALIDATION_REASONS, InvalidationQualification.decode),
    **dict.fromkeys(_MSR_REASONS, MsrQualification.decode),
    **dict.fromkeys(_PASID_REASONS, PasidQualification.decode),
}


def decode(reason: int, raw: int, vector: int | None) -> Qualification:
    """The qualification as its type; `raw` has been checked."""
    basic = basic_reason(reason)
    if basic is ExitReason.EXCEPTION_OR_NMI:
        if vector == Vector.DB:
            return DebugExceptionQualification.decode(raw)
        if vector == Vector.PF:
            return PageFaultQualification.decode(raw)
        return PlainQualification(raw)
    return DECODERS.get(basic, PlainQualification)(raw)
