"""Registers as tables: a class body that lists the fields of a 64-bit MSR is its decoder.

A subclass of `Register` names an MSR and gives a `Bit` or `Bits` for each field; an instance holds the raw
value and reads the fields from it, so that no bit is lost, not even one that the manual doesn't define.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self, overload

from vmxlab.errors import MissingCapability
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.checks import require_bits


class Bits:
    """A field of several bits, `high`:`low`, read as a number."""

    __slots__ = ("feature", "high", "low", "name", "owner")

    def __init__(self, high: int, low: int, feature: str) -> None:
        self.high = high
        self.low = low
        self.feature = feature
        self.name = ""
        self.owner: type[Register]

    def __set_name__(self, owner: type[Register], name: str) -> None:
        self.name = name
        self.owner = owner

    def __repr__(self) -> str:
        """As it is written: EptVpidCap.page_1g."""
        return f"{self.owner.__name__}.{self.name}"

    @overload
    def __get__(self, register: None, owner: type[Register]) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type[Register]) -> int: ...
    def __get__(self, register: Register | None, owner: type[Register]) -> Self | int:
        """The field's value in an instance; the field itself on the class."""
        return self if register is None else register.raw >> self.low & self.mask >> self.low

    @property
    def mask(self) -> int:
        """The field's bits in the register."""
        return (1 << self.high + 1) - (1 << self.low)


class Bit(Bits):
    """A field of one bit, read as a bool."""

    __slots__ = ()

    def __init__(self, bit: int, feature: str) -> None:
        super().__init__(bit, bit, feature)

    @overload
    def __get__(self, register: None, owner: type[Register]) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type[Register]) -> bool: ...
    def __get__(self, register: Register | None, owner: type[Register]) -> Self | bool:
        """Whether the bit is set in an instance; the field itself on the class."""
        return self if register is None else bool(register.raw >> self.low & 1)


@dataclass(frozen=True, slots=True, repr=False)
class Register:
    """The value of a 64-bit MSR. `raw` is all of it; the fields of the subclass are read from it."""

    MSR: ClassVar[Msr]
    raw: int = 0

    def __post_init__(self) -> None:
        """Check that it fits 64 bits."""
        require_bits(self.MSR.name, self.raw, 64)

    @classmethod
    def from_bits(cls, raw: int) -> Self:
        """The register with this 64-bit value; OutOfRange if it is wider."""
        return cls(raw)

    @property
    def bits(self) -> int:
        """The 64-bit value."""
        return self.raw

    @classmethod
    def table(cls) -> Iterator[Bits]:
        """The fields that the manual defines, from bit 0 up."""
        return iter(sorted((f for f in vars(cls).values() if isinstance(f, Bits)), key=lambda f: f.low))

    @property
    def undefined(self) -> int:
        """The bits that are set though this project's edition of the manual doesn't define them."""
        rest = self.raw
        for field in self.table():
            rest &= ~field.mask
        return rest

    @classmethod
    def bit_name(cls, field: str) -> str:
        """Where the processor tells of a field: "IA32_VMX_EPT_VPID_CAP[6]" or "IA32_VMX_MISC[24:16]"."""
        found = vars(cls)[field]
        span = f"{found.high}:{found.low}" if found.high != found.low else f"{found.low}"
        return f"{cls.MSR.name}[{span}]"

    def require(self, field: str) -> None:
        """Nothing if the field is not 0; else MissingCapability with the feature's name and the bit."""
        if not getattr(self, field):
            raise MissingCapability(vars(type(self))[field].feature, self.bit_name(field))

    def __repr__(self) -> str:
        """The raw value and every field that is not 0."""
        words = [f"raw={self.raw:#x}"]
        for field in self.table():
            value = field.__get__(self, type(self))
            if value:
                words.append(field.name if value is True else f"{field.name}={value:#x}")
        if self.undefined:
            words.append(f"undefined={self.undefined:#x}")
        return f"{type(self).__name__}({', '.join(words)})"
