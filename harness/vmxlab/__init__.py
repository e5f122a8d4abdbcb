"""vmxlab: write a VMX exit test in five lines of Python and run it on any x86-64 machine.

    from vmxlab import Case, ExitReason, IOBitmap, Lab

    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    with Lab() as lab:
        run = lab.run(Case(io_bitmap=bitmap, program="in al, 0x60; in al, 0x61; hlt"))
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]

What is named here is the public surface; names are imported on first use. The layers below, each importing
only from those before it: sdm, structures, cases, image, engines, console, reports, cli and pytest_plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmxlab.cases.case import Case, Limits
    from vmxlab.cases.memory import guest_ept
    from vmxlab.cases.program import Mode
    from vmxlab.cases.reactions import Resume, Skip, Stop, on, port_is
    from vmxlab.console.lab import Lab
    from vmxlab.console.lab_by_need import LabByNeed
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.live.snapshot import Snapshot, diff
    from vmxlab.console.live.stepping import StepBy
    from vmxlab.console.run import End, Exit, Outcome, OutcomeKind, Run, Verdict
    from vmxlab.sdm.controls import (
        ControlSet,
        EntryControls,
        ExitControls,
        PinControls,
        PrimaryControls,
        SecondaryControls,
    )
    from vmxlab.sdm.exit_reasons import ExitReason
    from vmxlab.sdm.fields import Field
    from vmxlab.sdm.instruction_errors import InstructionError
    from vmxlab.sdm.msrs import Msr
    from vmxlab.sdm.registers import CR4, MemoryType
    from vmxlab.structures import (
        Capabilities,
        Ept,
        EptpList,
        EPTPointer,
        EptVpidCap,
        FeatureControl,
        IOBitmap,
        MsrArea,
        MsrBitmap,
        MsrEntry,
        PageModificationLog,
        PageSize,
        PostedInterruptDescriptor,
        SubPagePermissionTable,
        VirtualApicPage,
        VirtualizationExceptionInformation,
        VmxBasic,
        VmxRegion,
    )

_HOMES = {
    "CR4": "sdm.registers",
    "Capabilities": "structures",
    "Case": "cases.case",
    "ControlSet": "sdm.controls",
    "EPTPointer": "structures",
    "End": "console.run",
    "EntryControls": "sdm.controls",
    "Ept": "structures",
    "EptVpidCap": "structures",
    "EptpList": "structures",
    "Exit": "console.run",
    "ExitControls": "sdm.controls",
    "ExitReason": "sdm.exit_reasons",
    "FeatureControl": "structures",
    "Field": "sdm.fields",
    "IOBitmap": "structures",
    "InstructionError": "sdm.instruction_errors",
    "Lab": "console.lab",
    "LabByNeed": "console.lab_by_need",
    "Limits": "cases.case",
    "LiveMachine": "console.live.machine",
    "MemoryType": "sdm.registers",
    "Mode": "cases.program",
    "Msr": "sdm.msrs",
    "MsrArea": "structures",
    "MsrBitmap": "structures",
    "MsrEntry": "structures",
    "Outcome": "console.run",
    "OutcomeKind": "console.run",
    "PageModificationLog": "structures",
    "PageSize": "structures",
    "PinControls": "sdm.controls",
    "PostedInterruptDescriptor": "structures",
    "PrimaryControls": "sdm.controls",
    "Resume": "cases.reactions",
    "Run": "console.run",
    "SecondaryControls": "sdm.controls",
    "Skip": "cases.reactions",
    "Snapshot": "console.live.snapshot",
    "StepBy": "console.live.stepping",
    "Stop": "cases.reactions",
    "SubPagePermissionTable": "structures",
    "Verdict": "console.run",
    "VirtualApicPage": "structures",
    "VirtualizationExceptionInformation": "structures",
    "VmxBasic": "structures",
    "VmxRegion": "structures",
    "diff": "console.live.snapshot",
    "guest_ept": "cases.memory",
    "on": "cases.reactions",
    "port_is": "cases.reactions",
}

__all__ = [
    "CR4",
    "Capabilities",
    "Case",
    "ControlSet",
    "EPTPointer",
    "End",
    "EntryControls",
    "Ept",
    "EptVpidCap",
    "EptpList",
    "Exit",
    "ExitControls",
    "ExitReason",
    "FeatureControl",
    "Field",
    "IOBitmap",
    "InstructionError",
    "Lab",
    "LabByNeed",
    "Limits",
    "LiveMachine",
    "MemoryType",
    "Mode",
    "Msr",
    "MsrArea",
    "MsrBitmap",
    "MsrEntry",
    "Outcome",
    "OutcomeKind",
    "PageModificationLog",
    "PageSize",
    "PinControls",
    "PostedInterruptDescriptor",
    "PrimaryControls",
    "Resume",
    "Run",
    "SecondaryControls",
    "Skip",
    "Snapshot",
    "StepBy",
    "Stop",
    "SubPagePermissionTable",
    "Verdict",
    "VirtualApicPage",
    "VirtualizationExceptionInformation",
    "VmxBasic",
    "VmxRegion",
    "diff",
    "guest_ept",
    "on",
    "port_is",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vmxlab' has no attribute {name!r}")
    value = getattr(import_module(f"vmxlab.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
