"""What the value of a VMCS field says, in words: controls by name, access rights, an event, an EPTP.

>>> FieldValue(Field.PIN_BASED_CONTROLS, 0x3F)
0x3f (EXTERNAL_INTERRUPT_EXITING | ... )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmxlab.sdm.access_rights import describe_access_rights
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import describe_reason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.instruction_errors import describe_error
from vmxlab.sdm.interruption import InterruptionInformation
from vmxlab.sdm.registers import (
    CR0,
    CR4,
    DR7,
    EFER,
    RFLAGS,
    ActivityState,
    InterruptibilityState,
    PendingDebugExceptions,
    Vector,
)
from vmxlab.structures.ept_pointer import EPTPointer

FLAGS: Mapping[Field, type[BitFlags]] = {
    **{controls.field: controls.flags for controls in ControlSet},
    **dict.fromkeys((Field.GUEST_CR0, Field.HOST_CR0, Field.CR0_GUEST_HOST_MASK, Field.CR0_READ_SHADOW), CR0),
    **dict.fromkeys((Field.GUEST_CR4, Field.HOST_CR4, Field.CR4_GUEST_HOST_MASK, Field.CR4_READ_SHADOW), CR4),
    **dict.fromkeys((Field.GUEST_IA32_EFER, Field.HOST_IA32_EFER), EFER),
    Field.GUEST_RFLAGS: RFLAGS,
    Field.GUEST_DR7: DR7,
    Field.GUEST_INTERRUPTIBILITY_STATE: InterruptibilityState,
    Field.GUEST_PENDING_DEBUG_EXCEPTIONS: PendingDebugExceptions,
}
"""Fields that are sets of bits, each with its own meaning."""

# The default1 class: bits that most processors want to be 1. Those without a name say nothing.
_NAMELESS = {
    controls.field: controls.default1 & ~sum(int(flag) for flag in controls.flags) for controls in ControlSet
}

_EVENTS = (
    Field.ENTRY_INTERRUPTION_INFORMATION,
    Field.EXIT_INTERRUPTION_INFORMATION,
    Field.IDT_VECTORING_INFORMATION,
)
_NO_LINK = (1 << 64) - 1


def describe_value(field: Field | int, value: int) -> str:
    """A field's value in words; empty for one that is just a number or an address.

    The exit qualification is not decoded here, as its meaning depends on the exit reason.
    """
    if not isinstance(field, Field):
        return ""
    if field in FLAGS:
        return FLAGS[field](value & ~_NAMELESS.get(field, 0)).describe()
    if field.name.endswith("_ACCESS_RIGHTS"):
        return describe_access_rights(value)
    decoder = _DECODERS.get(field)
    return decoder(value) if decoder is not None else ""


def _event(value: int) -> str:
    return InterruptionInformation.from_bits(value).describe()


def _activity(value: int) -> str:
    known = value in ActivityState.__members__.values()
    return ActivityState(value).name if known else "not defined"


def _exceptions(value: int) -> str:
    if value == Field.EXCEPTION_BITMAP.max:
        return "all exceptions"
    names = {int(vector): f"#{vector.name}" for vector in Vector}
    words = [names.get(bit, f"vector {bit}") for bit in range(32) if value >> bit & 1]
    return " ".join(words) or "none"


def _eptp(value: int) -> str:
    return repr(EPTPointer.from_bits(value)).partition(", ")[2].rstrip(">")


def _link(value: int) -> str:
    return "no link" if value == _NO_LINK else ""


_DECODERS: Mapping[Field, Callable[[int], str]] = {
    **dict.fromkeys(_EVENTS, _event),
    Field.GUEST_ACTIVITY_STATE: _activity,
    Field.EXCEPTION_BITMAP: _exceptions,
    Field.EXIT_REASON: describe_reason,
    Field.VM_INSTRUCTION_ERROR: describe_error,
    Field.EPT_POINTER: _eptp,
    Field.VMCS_LINK_POINTER: _link,
}


class FieldValue(int):
    """The value of a VMCS field: an int that shows itself in hexadecimal and in words.

    `field` is the field, or the encoding of one that the SDM does not list.
    """

    field: Field | int

    def __new__(cls, field: Field | int, value: int) -> FieldValue:
        """An int with a field."""
        self = super().__new__(cls, value)
        self.field = field
        return self

    def __getnewargs__(self) -> tuple[Field | int, int]:  # type: ignore[override]
        """For copy and pickle."""
        return self.field, int(self)

    def describe(self) -> str:
        """The value in words; empty for one that is just a number or an address."""
        return describe_value(self.field, int(self))

    def __repr__(self) -> str:
        """Such as "0x2 (FIXED1)"."""
        words = self.describe()
        return f"{int(self):#x}{words and f' ({words})'}"
