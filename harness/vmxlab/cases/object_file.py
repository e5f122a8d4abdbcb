"""The object file that `as` wrote: its code, its labels, and the relocations that it left, applied.

There is nothing to link a guest program with, and its address is known. So the few relocations that
`as` leaves for x86 (psABI for AMD64, version 1.0, section 4.4.1 "Relocation Types") are applied here, and
everything that would need a linker is refused by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_UNDEFINED = "SHN_UNDEF"
_ABSOLUTE = "SHN_ABS"


@dataclass(frozen=True, slots=True)
class _Kind:
    """One type of relocation: how many bits it fills, whether from the place on, and what fits in them."""

    name: str
    bits: int
    relative: bool = False
    signed: bool = False

    def fits(self, value: int, address_bits: int) -> bool:
        """Whether the processor will see `value`, running with addresses of `address_bits`.

        Outside 64-bit mode an offset wraps with the instruction pointer, so any difference of two
        addresses of that width is reached.
        """
        if self.relative and self.bits >= address_bits:
            return abs(value) < 1 << address_bits
        zero_extended = self.bits == 32 and not self.signed and address_bits == 64
        low = 0 if zero_extended else -(1 << (self.bits - 1))
        high = 1 << (self.bits - 1 if self.signed else self.bits)
        return low <= value < high


_KINDS: Mapping[int, _Kind] = {
    1: _Kind("R_X86_64_64", 64),
    2: _Kind("R_X86_64_PC32", 32, relative=True, signed=True),
    # The psABI's PLT32 is PC32 where no procedure linkage table is made: never, here.
    4: _Kind("R_X86_64_PLT32", 32, relative=True, signed=True),
    10: _Kind("R_X86_64_32", 32),
    11: _Kind("R_X86_64_32S", 32, signed=True),
    12: _Kind("R_X86_64_16", 16),
    13: _Kind("R_X86_64_PC16", 16, relative=True, signed=True),
    14: _Kind("R_X86_64_8", 8),
    15: _Kind("R_X86_64_PC8", 8, relative=True, signed=True),
    24: _Kind("R_X86_64_PC64", 64, relative=True, signed=True),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a section of the object will run: its address, the bits an address has, the room there."""

    section: str
    origin: int
    address_bits: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a section can't be loaded; `offset` is where in it (None: the section as a whole)."""

    text: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A section made ready for its address, with the addresses of its labels; or the problems with it."""

    code: bytes
    labels: Mapping[str, int]
    problems: Sequence[Problem]


def load(elf: bytes, places: Sequence[Place]) -> list[Loaded]:
    """The sections of `places`, in that order, relocated to their origins."""
    from elftools.elf.elffile import ELFFile

    file = ELFFile(io.BytesIO(elf))
    sections: dict[str, Any] = {section.name: section for section in file.iter_sections()}
    indices = {name: index for index, name in enumerate(sections)}
    symbols = list(sections[".symtab"].iter_symbols()) if ".symtab" in sections else []
    strays = _strays(sections, {place.section for place in places})
    return [
        _load_section(sections, symbols, indices.get(place.section, -1), place, strays) for place in places
    ]


def _strays(sections: Mapping[str, Any], wanted: set[str]) -> list[Problem]:
    """Sections with contents that nothing would load."""
    bookkeeping = {"SHT_NULL", "SHT_SYMTAB", "SHT_STRTAB", "SHT_RELA"}
    return [
        Problem(
            f"{section['sh_size']} bytes in section {name}: only .text is loaded, so data must stand there"
        )
        for name, section in sections.items()
        if section["sh_type"] not in bookkeeping and name not in wanted and section["sh_size"]
    ]


def _load_section(
    sections: Mapping[str, Any], symbols: Sequence[Any], index: int, place: Place, strays: Sequence[Problem]
) -> Loaded:
    problems = list(strays)
    section = sections.get(place.section)
    code = bytearray(section.data() if section is not None else b"")
    alignment = section["sh_addralign"] if section is not None else 1
    if alignment > 1 and place.origin % alignment:
        problems.append(
            Problem(f"its origin {place.origin:#x} has not the alignment of {alignment} it asks for")
        )
    if len(code) > place.limit_bytes:
        limit = f"at most {place.limit_bytes} ({place.limit_bytes:#x}) can stand at {place.origin:#x}"
        return Loaded(b"", {}, [*problems, Problem(f"it is {len(code)} bytes long: {limit}")])
    labels = {
        symbol.name: place.origin + symbol["st_value"]
        for symbol in symbols
        if symbol["st_shndx"] == index and symbol["st_info"]["type"] != "STT_SECTION" and symbol.name
    }
    relocations = sections.get(f".rela{place.section}")
    for relocation in relocations.iter_relocations() if relocations is not None else ():
        problem = _apply(code, relocation.entry, symbols[relocation["r_info_sym"]], index, place)
        if problem is not None:
            problems.append(problem)
    return Loaded(bytes(code), labels, problems)


def _apply(
    code: bytearray, entry: Mapping[str, int], symbol: Any, index: int, place: Place
) -> Problem | None:
    """Write one relocation into `code`; the problem where that can't be done."""
    offset = entry["r_offset"]
    kind = _KINDS.get(entry["r_info_type"])
    if kind is None:
        name = symbol.name or "an address"
        return Problem(f"{name} needs a linker (relocation type {entry['r_info_type']})", offset)
    where = symbol["st_shndx"]
    if where == index:
        base = place.origin + symbol["st_value"]
    elif where == _ABSOLUTE or (where == _UNDEFINED and not symbol.name):
        base = symbol["st_value"]
    else:
        return Problem(f"undefined symbol {symbol.name!r}", offset)
    value = base + entry["r_addend"] - (place.origin + offset if kind.relative else 0)
    if not kind.fits(value, place.address_bits):
        return Problem(f"{value:#x} does not fit in the {kind.bits} bits left for it ({kind.name})", offset)
    size = kind.bits // 8
    code[offset : offset + size] = (value & ((1 << kind.bits) - 1)).to_bytes(size, "little")
    return None
