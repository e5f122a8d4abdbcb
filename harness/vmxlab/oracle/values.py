"""What the oracle says of a value: the number, some of its bits, that it is undefined, or that it is unknown.

`Undefined` is a statement of the SDM: any value is right. `Unknown` is one about the oracle: it can't tell,
and says why. Neither is ever compared with what a machine did.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Unknown:
    """The oracle does not know, and why."""

    why: str

    def __str__(self) -> str:
        return f"unknown: {self.why}"


class Undefined(Enum):
    """The SDM leaves it undefined."""

    UNDEFINED = "undefined"


UNDEFINED = Undefined.UNDEFINED


@dataclass(frozen=True, slots=True)
class Bits:
    """A value of which only the bits in `known` are said; the rest is undefined or unknown, and 0 here."""

    value: int
    known: int = U64

    def __post_init__(self) -> None:
        """Bits that are not known have no value, so that equal statements are equal."""
        object.__setattr__(self, "value", self.value & self.known)

    def knows(self, mask: int) -> bool:
        """Whether all bits of `mask` are known."""
        return not mask & ~self.known

    def bit(self, mask: int) -> bool | None:
        """Whether the one bit in `mask` is set; None where it is not known."""
        return bool(self.value & mask) if self.known & mask else None

    def with_bits(self, mask: int, other: Bits) -> Bits:
        """These bits, with those in `mask` taken from `other`."""
        return Bits(
            self.value & ~mask | other.value & mask,
            self.known & ~mask | other.known & mask,
        )

    def __str__(self) -> str:
        return f"{self.value:#x} in the bits {self.known:#x}"


NOTHING_KNOWN = Bits(0, 0)

Value = int | Bits | Unknown | Undefined


def as_value(bits: Bits, width: int, why: str) -> Value:
    """Bits of a register or field of `width` bits, as the simplest statement that says the same."""
    mask = (1 << width) - 1
    if bits.knows(mask):
        return bits.value & mask
    if not bits.known & mask:
        return Unknown(why)
    return Bits(bits.value & mask, bits.known & mask)


def agrees(said: Value, seen: int) -> bool:
    """Whether what was seen is allowed by what was said. Unknown and undefined allow everything."""
    match said:
        case Bits(value, known):
            return not (seen ^ value) & known
        case int():
            return said == seen
        case _:
            return True


def is_said(value: Value) -> bool:
    """Whether a statement can be wrong at all."""
    return isinstance(value, int) or (isinstance(value, Bits) and bool(value.known))


def describe(value: Value) -> str:
    """A value in words, numbers in hexadecimal."""
    match value:
        case int():
            return f"{value:#x}"
        case Undefined():
            return "undefined"
        case _:
            return str(value)


@dataclass(frozen=True, slots=True)
class Rule:
    """One sentence of the SDM that a prediction rests on: a name for it, and its section."""

    name: str
    section: str

    def __str__(self) -> str:
        return f"{self.name} ({self.section})"


class CannotTell(Exception):
    """The oracle's knowledge ends here; from now on nothing is predicted."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.unknown = Unknown(why)
