"""Exit qualifications: what the processor adds to the reason of an exit (SDM Vol. 3C, 28.2.1 and 27.8).

`decode_qualification` gives the right type for any basic reason, and never fails on what a processor may
return: an exit that has no qualification, or isn't known here, gives a `PlainQualification`. All types can be
imported from here; they are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmxlab.errors import OutOfRange

if TYPE_CHECKING:
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
    "decode_qualification",
]


def decode_qualification(reason: int, raw: int, vector: int | None = None) -> Qualification:
    """The exit qualification `raw` (64 bits, unsigned) of an exit for `reason`, as its type.

    `reason` is a basic reason or a whole exit-reason field. For an exception or NMI, `vector` (of the VM-exit
    interruption information) decides: a debug exception and a page fault have a qualification. Any reason and
    any 64-bit value decode; only a `raw` that isn't 64 bits raises OutOfRange.
    """
    if raw < 0 or raw >> 64:
        raise OutOfRange("exit qualification", raw, "64 bits, unsigned")
    from vmxlab.sdm.qualifications.dispatch import decode

    return decode(reason, raw, vector)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vmxlab.sdm.qualifications import dispatch

    value = getattr(dispatch, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
