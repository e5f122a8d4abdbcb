"""What the manual says: VMCS fields, exit reasons, controls, MSRs, registers, qualifications, error numbers.

Facts only, each with the volume and section it comes from, and nothing here runs anything. Section and table
numbers are those of `EDITION`; what stands only in later editions is marked "later" beside it.

Names are imported on first use, so that a program that needs three enumerations doesn't pay for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmxlab.sdm.apic import (
        APIC_DEFAULT_BASE,
        ApicDeliveryMode,
        ApicDestinationShorthand,
        ApicRegister,
        ApicTimerDivide,
        InterruptCommandFlags,
        LocalVectorFlags,
        SpuriousVectorFlags,
    )
    from vmxlab.sdm.controls import (
        ControlSet,
        EntryControls,
        ExitControls,
        PinControls,
        PrimaryControls,
        SecondaryControls,
        SecondaryExitControls,
        TertiaryControls,
    )
    from vmxlab.sdm.exit_reasons import ExitReason, basic_reason
    from vmxlab.sdm.fields import Field, FieldType, FieldWidth
    from vmxlab.sdm.header import c_header
    from vmxlab.sdm.instruction_errors import InstructionError
    from vmxlab.sdm.instruction_information import InstructionInformation, decode_instruction_information
    from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
    from vmxlab.sdm.msrs import Msr
    from vmxlab.sdm.qualifications import Qualification, decode_qualification
    from vmxlab.sdm.registers import (
        CR0,
        CR4,
        EFER,
        GENERAL_REGISTERS,
        RFLAGS,
        ActivityState,
        InterruptibilityState,
        MemoryType,
        Vector,
    )

EDITION = "Intel 64 and IA-32 Architectures SDM, order number 325462-083US (March 2024)"

__all__ = [
    "APIC_DEFAULT_BASE",
    "CR0",
    "CR4",
    "EDITION",
    "EFER",
    "GENERAL_REGISTERS",
    "RFLAGS",
    "ActivityState",
    "ApicDeliveryMode",
    "ApicDestinationShorthand",
    "ApicRegister",
    "ApicTimerDivide",
    "ControlSet",
    "EntryControls",
    "ExitControls",
    "ExitReason",
    "Field",
    "FieldType",
    "FieldWidth",
    "InstructionError",
    "InstructionInformation",
    "InterruptCommandFlags",
    "InterruptibilityState",
    "InterruptionInformation",
    "InterruptionType",
    "LocalVectorFlags",
    "MemoryType",
    "Msr",
    "PinControls",
    "PrimaryControls",
    "Qualification",
    "SecondaryControls",
    "SecondaryExitControls",
    "SpuriousVectorFlags",
    "TertiaryControls",
    "Vector",
    "basic_reason",
    "c_header",
    "decode_instruction_information",
    "decode_qualification",
]

_MODULES = {
    "apic": (
        "APIC_DEFAULT_BASE",
        "ApicDeliveryMode",
        "ApicDestinationShorthand",
        "ApicRegister",
        "ApicTimerDivide",
        "InterruptCommandFlags",
        "LocalVectorFlags",
        "SpuriousVectorFlags",
    ),
    "controls": (
        "ControlSet",
        "EntryControls",
        "ExitControls",
        "PinControls",
        "PrimaryControls",
        "SecondaryControls",
        "SecondaryExitControls",
        "TertiaryControls",
    ),
    "exit_reasons": ("ExitReason", "basic_reason"),
    "fields": ("Field", "FieldType", "FieldWidth"),
    "header": ("c_header",),
    "instruction_errors": ("InstructionError",),
    "instruction_information": ("InstructionInformation", "decode_instruction_information"),
    "interruption": ("InterruptionInformation", "InterruptionType"),
    "msrs": ("Msr",),
    "qualifications": ("Qualification", "decode_qualification"),
    "registers": (
        "CR0",
        "CR4",
        "EFER",
        "GENERAL_REGISTERS",
        "RFLAGS",
        "ActivityState",
        "InterruptibilityState",
        "MemoryType",
        "Vector",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that has `name`, and keep the name here for next time."""
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
