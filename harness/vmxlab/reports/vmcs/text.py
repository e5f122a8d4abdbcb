"""A VMCS that was read from a text, with what was odd about the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmxlab.sdm.fields import Field
from vmxlab.structures import Capabilities


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something in the text that could not be taken as it stands; `line` counts from 1."""

    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


@dataclass(frozen=True, slots=True)
class VmcsText:
    """A VMCS that was read.

    title         which one of the text it is, and what the text says of its failure
    format        what the text was read as
    fields        the fields that it holds
    oddities      what could not be taken as it stands
    limits        what this kind of text leaves out, in words
    capabilities, physical_address_width
                  of the processor, where the text holds them
    current_vmcs  the address of the VMCS, where the text holds it
    """

    title: str
    format: str
    fields: Mapping[Field, int]
    oddities: tuple[Oddity, ...] = ()
    limits: str = ""
    capabilities: Capabilities | None = None
    physical_address_width: int | None = None
    current_vmcs: int | None = None


@dataclass(slots=True)
class FieldCollector:
    """Gathers fields: each once, each as wide as it may be."""

    fields: dict[Field, int] = field(default_factory=dict)
    oddities: list[Oddity] = field(default_factory=list)
    _lines: dict[Field, int] = field(default_factory=dict)

    def take(self, line: int, name: Field, value: int) -> None:
        """A field's value. The same value twice is no matter; of two different ones the first stays."""
        if value > name.max:
            self.odd(line, f"{name.name} has {name.bits} bits: {value:#x} is too wide; it is left out")
            return
        if name in self.fields:
            if self.fields[name] != value:
                self.odd(
                    line,
                    f"{name.name} was {self.fields[name]:#x} in line {self._lines[name]} already; "
                    f"{value:#x} is left out",
                )
            return
        self.fields[name] = value
        self._lines[name] = line

    def odd(self, line: int, what: str) -> None:
        """Note something."""
        self.oddities.append(Oddity(line, what))
