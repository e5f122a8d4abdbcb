"""The interruption-information fields, which share one format (SDM Vol. 3C, Tables 25-17, 25-19 and 25-20).

Three fields of the VMCS hold it: VM-entry interruption information (an event to inject), VM-exit
interruption information (the event that caused the exit) and IDT-vectoring information (the event that was
being delivered).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmxlab.errors import OutOfRange
from vmxlab.sdm.registers import Vector

_OTHER_BITS = 0x7FFF_E000  # 30:13: reserved or undefined; bit 13 is "nested exception" in later editions


class InterruptionType(IntEnum):
    """Bits 10:8. 1 is not used."""

    EXTERNAL_INTERRUPT = 0
    RESERVED = 1
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER_EVENT = 7

    @property
    def words(self) -> str:
        """Such as "hardware exception"."""
        return self.name.lower().replace("_", " ").replace("nmi", "NMI")


@dataclass(frozen=True, slots=True)
class InterruptionInformation:
    """One interruption-information field.

    `error_code_valid` is bit 11 (for injection: deliver the error code), `nmi_unblocking` bit 12 (reserved
    for injection, undefined in IDT-vectoring information), `other_bits` holds bits 30:13 in place, so that
    `bits` gives back what was read.
    """

    vector: int
    type: InterruptionType
    error_code_valid: bool = False
    nmi_unblocking: bool = False
    valid: bool = True
    other_bits: int = 0

    def __post_init__(self) -> None:
        """Refuse what the field can't hold."""
        if not 0 <= self.vector <= 0xFF:
            raise OutOfRange("interruption vector", self.vector, "8 bits, at most 0xff")
        if self.other_bits & ~_OTHER_BITS:
            raise OutOfRange("other bits of interruption information", self.other_bits, "bits 30:13 only")

    @classmethod
    def from_bits(cls, raw: int) -> InterruptionInformation:
        """From the 32-bit field; any value decodes. OutOfRange for what isn't 32 bits."""
        if raw < 0 or raw >> 32:
            raise OutOfRange("interruption information", raw, "32 bits, unsigned")
        return cls(
            vector=raw & 0xFF,
            type=InterruptionType(raw >> 8 & 7),
            error_code_valid=bool(raw >> 11 & 1),
            nmi_unblocking=bool(raw >> 12 & 1),
            valid=bool(raw >> 31),
            other_bits=raw & _OTHER_BITS,
        )

    @property
    def bits(self) -> int:
        """The 32-bit field."""
        return (
            self.vector
            | self.type << 8
            | self.error_code_valid << 11
            | self.nmi_unblocking << 12
            | self.other_bits
            | self.valid << 31
        )

    def describe(self) -> str:
        """Such as "#PF (14), hardware exception, error code"; "none" where the field isn't valid."""
        if not self.valid:
            return "none"
        words = [f"{self._event_name()}{self.type.words}"]
        if self.error_code_valid:
            words.append("error code")
        if self.nmi_unblocking:
            words.append("NMI unblocking by IRET")
        return ", ".join(words)

    def _event_name(self) -> str:
        # A vector names an exception only where the type says that it is one.
        if self.type in (InterruptionType.NMI, InterruptionType.OTHER_EVENT):
            return f"({self.vector}) "
        exceptions = (
            InterruptionType.HARDWARE_EXCEPTION,
            InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
            InterruptionType.SOFTWARE_EXCEPTION,
        )
        if self.type in exceptions and self.vector in Vector.__members__.values():
            return f"#{Vector(self.vector).name} ({self.vector}), "
        return f"vector {self.vector:#x}, "
