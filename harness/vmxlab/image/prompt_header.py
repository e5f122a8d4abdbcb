"""The C header of the monitor's prompt: names for people, made from the facts in this package.

    python -m vmxlab.image.prompt_header > prompt_facts.h

A list of names is a macro that takes one: `VMCS_FIELD_NAMES(X)` is `X(0x0, "VPID") X(0x2, ...`, a value and
its text each. What the prompt says of an exit it says in the words of this package; a test holds them
together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from enum import IntEnum

from vmxlab.image import layout
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import FLAG_TEXTS, ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.qualifications import ApicAccessQualification, ApicAccessType
from vmxlab.sdm.registers import GENERAL_REGISTERS, MemoryType, Vector
from vmxlab.structures import ept_entry
from vmxlab.structures.capability_msrs import EptVpidCap
from vmxlab.structures.register import Bit

_EPT_BITS = (
    "READ",
    "WRITE",
    "EXECUTE",
    "MEMORY_TYPE",
    "MEMORY_TYPE_SHIFT",
    "LARGE",
    "USER_EXECUTE",
    "REFERENCE",
    "ADDRESS",
)
_LAYOUT = ("MONITOR_BASE", "VMXON_REGION", "VMCS_REGION", "EPT_TABLES", "EPT_TABLES_MAX")


def lists() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Each list of the header: its name in C, and its values with their texts."""
    yield "VMCS_FIELD_NAMES", _members(Field)
    yield "MSR_NAMES", _members(Msr)
    yield "EXIT_REASON_NAMES", _members(ExitReason)
    yield "EXIT_REASON_FLAG_TEXTS", list(FLAG_TEXTS.items())
    yield "INSTRUCTION_ERROR_TEXTS", [(int(error), error.description) for error in InstructionError]
    yield "VECTOR_NAMES", [(int(vector), f"#{vector.name}") for vector in Vector]
    yield "INTERRUPTION_TYPE_TEXTS", [(int(kind), kind.words) for kind in InterruptionType]
    yield "APIC_ACCESS_TYPE_TEXTS", [(int(kind), _apic_access_text(kind)) for kind in ApicAccessType]
    yield "MEMORY_TYPE_NAMES", _members(MemoryType)
    yield "REGISTER_NAMES", list(enumerate(GENERAL_REGISTERS))
    for controls in ControlSet:
        bits = [(int(flag).bit_length() - 1, str(flag.name)) for flag in controls.flags]
        yield f"{controls.name}_CONTROL_NAMES", bits
    yield "EPT_LEVEL_NAMES", list(ept_entry.LEVEL_NAMES.items())
    yield "EPT_BIT_TEXTS", [(bit.bit_length() - 1, word) for bit, word in ept_entry.ATTRIBUTE_WORDS]


def numbers() -> Iterator[tuple[str, int]]:
    """Each number of the header by its name in C."""
    for name in _EPT_BITS:
        yield f"EPT_{name}", getattr(ept_entry, name)
    for name, value in vars(EptVpidCap).items():
        if isinstance(value, Bit):
            yield f"EPT_VPID_CAP_{name.upper()}", value.mask
    for name in _LAYOUT:
        yield name, getattr(layout, name)


def c_header() -> str:
    """The text of `prompt_facts.h`."""
    lines = [
        "/* Made by vmxlab.image.prompt_header: do not edit. */",
        "#ifndef PROMPT_FACTS_H",
        "#define PROMPT_FACTS_H",
        "",
        *(f"#define {name} {value:#x}ull" for name, value in numbers()),
        "",
        "/* X(encoding, capability MSR, its TRUE MSR or 0, list of names) for each set of controls */",
        f"#define CONTROL_SETS(X) {' '.join(map(_control_set, ControlSet))}",
    ]
    for name, entries in lists():
        lines += ["", f"#define {name}(X) \\", *_entries(entries)]
    return "\n".join([*lines, "", "#endif", ""])


def _members(members: type[IntEnum]) -> list[tuple[int, str]]:
    return [(int(member), member.name) for member in members]


def _apic_access_text(kind: ApicAccessType) -> str:
    return ApicAccessQualification(0, 0, kind, False).describe().partition(" at offset")[0]


def _control_set(controls: ControlSet) -> str:
    true_msr = int(controls.true_msr or 0)
    return f"X({int(controls.field):#x}, {int(controls.msr):#x}, {true_msr:#x}, {controls.name})"


def _entries(entries: Iterable[tuple[int, str]]) -> Iterator[str]:
    rows = [f'\tX({value:#x}, "{text}")' for value, text in entries]
    yield from (f"{row} \\" for row in rows[:-1])
    yield rows[-1]


if __name__ == "__main__":
    sys.stdout.write(c_header())
