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
    from vmxlab.cases.reactions import on, port_is
    from vmxlab.console.lab import Lab
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
    from vmxlab.sdm.registers import MemoryType
    from vmxlab.structures import (
        Capabilities,
        Ept,
        EPTPointer,
        FeatureControl,
        IOBitmap,
        MsrBitmap,
        PageSize,
        VmxBasic,
        VmxRegion,
    )

_HOMES = {
    "Capabilities": "structures",
    "Case": "cases.case",
    "ControlSet": "sdm.controls",
    "EPTPointer": "structures",
    "End": "console.run",
    "EntryControls": "sdm.controls",
    "Ept": "structures",
    "Exit": "console.run",
    "ExitControls": "sdm.controls",
    "ExitReason": "sdm.exit_reasons",
    "FeatureControl": "structures",
    "Field": "sdm.fields",
    "IOBitmap": "structures",
    "InstructionError": "sdm.instruction_errors",
    "Lab": "console.lab",
    "Limits": "cases.case",
    "MemoryType": "sdm.registers",
    "Mode": "cases.program",
    "Msr": "sdm.msrs",
    "MsrBitmap": "structures",
    "Outcome": "console.run",
    "OutcomeKind": "console.run",
    "PageSize": "structures",
    "PinControls": "sdm.controls",
    "PrimaryControls": "sdm.controls",
    "Run": "console.run",
    "SecondaryControls": "sdm.controls",
    "Verdict": "console.run",
    "VmxBasic": "structures",
    "VmxRegion": "structures",
    "guest_ept": "cases.memory",
    "on": "cases.reactions",
    "port_is": "cases.reactions",
}

__all__ = [
    "Capabilities",
    "Case",
    "ControlSet",
    "EPTPointer",
    "End",
    "EntryControls",
    "Ept",
    "Exit",
    "ExitControls",
    "ExitReason",
    "FeatureControl",
    "Field",
    "IOBitmap",
    "InstructionError",
    "Lab",
    "Limits",
    "MemoryType",
    "Mode",
    "Msr",
    "MsrBitmap",
    "Outcome",
    "OutcomeKind",
    "PageSize",
    "PinControls",
    "PrimaryControls",
    "Run",
    "SecondaryControls",
    "Verdict",
    "VmxBasic",
    "VmxRegion",
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
