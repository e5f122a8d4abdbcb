"""The C header of the monitor, made from the facts in this package.

    python -m vmxlab.sdm.header > vmx_facts.h

The monitor holds no table of its own; so a number can't be right on one side and wrong on the other. The
header serves C and assembly: constants are unsigned in C (`0x681eu`) and bare numbers where `__ASSEMBLER__`
is defined.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from enum import IntEnum

from vmxlab.sdm import EDITION, apic, exit_reasons, registers
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.msrs import Msr

# What each enumeration's names begin with in C.
_ENUMERATIONS: tuple[tuple[str, str, type[IntEnum] | type[BitFlags]], ...] = (
    ("VMCS fields (Vol. 3D, Appendix B)", "VMCS_", Field),
    ("MSR addresses (Vol. 4, Vol. 3D Appendix A)", "MSR_", Msr),
    ("basic exit reasons (Vol. 3D, Appendix C)", "EXIT_REASON_", ExitReason),
    ("VM-instruction errors (Vol. 3C, 31.4)", "VMX_ERROR_", InstructionError),
    ("control register 0", "CR0_", registers.CR0),
    ("control register 4", "CR4_", registers.CR4),
    ("IA32_EFER", "EFER_", registers.EFER),
    ("RFLAGS", "RFLAGS_", registers.RFLAGS),
    ("debug registers", "DR6_", registers.DR6),
    ("debug registers", "DR7_", registers.DR7),
    ("IA32_FEATURE_CONTROL", "FEATURE_CONTROL_", registers.FeatureControlFlags),
    ("exception vectors", "VECTOR_", registers.Vector),
    ("interruption types", "INTERRUPTION_TYPE_", InterruptionType),
    ("guest activity state", "ACTIVITY_STATE_", registers.ActivityState),
    ("guest interruptibility state", "INTERRUPTIBILITY_", registers.InterruptibilityState),
    ("memory types", "MEMORY_TYPE_", registers.MemoryType),
    ("types of INVEPT", "INVEPT_", registers.InveptType),
    ("types of INVVPID", "INVVPID_", registers.InvvpidType),
    ("local APIC: registers (Vol. 3A, Table 11-1)", "APIC_", apic.ApicRegister),
    ("local APIC: delivery modes", "APIC_DELIVERY_MODE_", apic.ApicDeliveryMode),
    ("local APIC: destination shorthands", "APIC_DESTINATION_", apic.ApicDestinationShorthand),
    ("local APIC: interrupt command register", "ICR_", apic.InterruptCommandFlags),
    ("local APIC: local vector table", "LVT_", apic.LocalVectorFlags),
    ("local APIC: spurious-interrupt vector register", "SVR_", apic.SpuriousVectorFlags),
    ("local APIC: divide configuration", "APIC_DIVIDE_", apic.ApicTimerDivide),
)

_PROLOGUE = f"""\
/*
 * vmx_facts.h: numbers of the manual, for the monitor.
 *
 * Made by `python -m vmxlab.sdm.header`; don't edit. Source:
 * {EDITION}.
 */
#ifndef VMX_FACTS_H
#define VMX_FACTS_H

#ifdef __ASSEMBLER__
#define VMX_U32(number) number
#define VMX_U64(number) number
#else
#define VMX_U32(number) number##u
#define VMX_U64(number) number##ull
#endif
"""

_EPILOGUE = "\n#endif /* VMX_FACTS_H */\n"


def constants() -> Iterator[tuple[str, str, int]]:
    """Every constant of the header, in order: the section's title, the C name, the value."""
    for title, prefix, enumeration in _ENUMERATIONS:
        for member in enumeration:
            yield title, f"{prefix}{member.name}", int(member)
    yield "local APIC: where it is after a reset", "APIC_DEFAULT_BASE", apic.APIC_DEFAULT_BASE
    for name in sorted(vars(exit_reasons)):
        if name.endswith("_BIT"):
            yield "flags of the exit-reason field", f"EXIT_REASON_{name}", getattr(exit_reasons, name)
    for control_set in ControlSet:
        for member in control_set.flags:
            yield control_set.value, f"{control_set.name}_CONTROL_{member.name}", int(member)
    title = "general registers, as numbered in instructions and exit qualifications"
    for index, name in enumerate(registers.GENERAL_REGISTERS):
        yield title, f"GPR_{name.upper()}", index
    yield title, "GPR_COUNT", len(registers.GENERAL_REGISTERS)


def c_header() -> str:
    """The text of `vmx_facts.h`."""
    return "".join([_PROLOGUE, *_lines(constants()), *_field_lists(), _EPILOGUE])


def _field_lists() -> Iterator[str]:
    """Lists for an initializer: the fields whose values are software's own, and those of an exit."""
    for name, what, fields in (
        ("WRITABLE", "that software writes: all but the VM-exit information", _fields(writable=True)),
        ("EXIT_INFORMATION", "of VM-exit information", _fields(writable=False)),
    ):
        yield f"\n/* VMCS fields {what} */\n"
        yield f"#define VMCS_{name}_FIELDS {', '.join(f'{int(field):#x}u' for field in fields)}\n"


def _fields(*, writable: bool) -> list[Field]:
    return [field for field in Field if (field.type is not FieldType.EXIT_INFORMATION) is writable]


def _lines(entries: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    section = None
    for title, name, value in entries:
        if title != section:
            yield f"\n/* {title} */\n"
            section = title
        macro = "VMX_U64" if value >> 32 else "VMX_U32"
        yield f"#define {name} {macro}({value:#x})\n"


if __name__ == "__main__":
    sys.stdout.write(c_header())
