"""What all exit qualifications have in common: the raw value, and how it is put in words."""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.sdm.registers import GENERAL_REGISTERS


@dataclass(frozen=True, slots=True)
class Qualification:
    """An exit qualification. `raw` is the field as VMREAD gave it, undefined bits included.

    Bits that the manual calls undefined are decoded like all others (a bit that exists only with some control
    set is read as the bit it is); what they mean is for the caller to know.
    """

    raw: int

    def describe(self) -> str:
        """The qualification in a few words."""
        return f"{self.raw:#x}"


@dataclass(frozen=True, slots=True)
class PlainQualification(Qualification):
    """The qualification of an exit that has none (it is 0 then), or that isn't known here."""

    def describe(self) -> str:
        """The raw value, or "-" where it is 0, as it should be."""
        return f"{self.raw:#x}" if self.raw else "-"


def bit(raw: int, number: int) -> bool:
    """Whether a bit is set."""
    return bool(raw >> number & 1)


def bits(raw: int, high: int, low: int) -> int:
    """Bits high:low, both included, as the manual writes ranges."""
    return raw >> low & (1 << high - low + 1) - 1


def signed64(raw: int) -> int:
    """A 64-bit value as the two's-complement number it stands for."""
    return raw - (1 << 64) if raw >> 63 else raw


def register_name(index: int) -> str:
    """The general register that a 4-bit index stands for."""
    return GENERAL_REGISTERS[index]


def with_notes(text: str, *notes: tuple[bool, str]) -> str:
    """`text`, and after it the notes whose condition holds."""
    return ", ".join([text, *(note for holds, note in notes if holds)])
