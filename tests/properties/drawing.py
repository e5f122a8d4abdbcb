"""What generated cases are made of: snippets of machine code with their text, and the case around them.

A generated case carries machine code, not text: one call of the assembler for each new program would cost
more than to run it. The snippets come out of finite lists that are assembled in one call, and `Drawn.shown`
has the program as text again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st

from vmxlab import Case, Field, Mode
from vmxlab.cases.program import Request, assemble_many
from vmxlab.cases.source import case_source
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import GENERAL_REGISTERS
from vmxlab.structures import Capabilities

MODES = (Mode.LONG, Mode.PROTECTED, Mode.REAL)


@dataclass(frozen=True, slots=True)
class Snippet:
    """One or more instructions: their text and their code."""

    text: str
    code: bytes

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Drawn:
    """A generated case. `rest`: what it says besides program and mode."""

    mode: Mode
    lines: tuple[Snippet, ...]
    rest: Mapping[str, object] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        """To be run."""
        code = b"".join(line.code for line in self.lines)
        return Case(program=code, mode=self.mode, **self.rest)  # type: ignore[arg-type]

    @property
    def shown(self) -> Case:
        """To be read: the program is text."""
        return replace(self.case, program="; ".join(line.text for line in self.lines))

    def source(self, name: str = "test_case") -> str:
        """A test that can be pasted into a file."""
        return case_source(self.shown, name=name)

    def __repr__(self) -> str:
        return f"{self.mode.value}: {'; '.join(line.text for line in self.lines)}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows; the whole case is in the message."""
        printer.text(repr(self))


@cache
def snippets(mode: Mode, texts: tuple[str, ...]) -> Mapping[str, Snippet]:
    """All these texts assembled, in one call."""
    programs = assemble_many([Request(text, mode=mode) for text in texts])
    return {text: Snippet(text, program.code) for text, program in zip(texts, programs, strict=True)}


@cache
def one_of_texts(mode: Mode, texts: tuple[str, ...]) -> st.SearchStrategy[Snippet]:
    """One of these instructions; the first are the simplest."""
    return st.sampled_from(list(snippets(mode, texts).values()))


def plain(mode: Mode, text: str) -> Snippet:
    """One fixed instruction."""
    return snippets(mode, (text,))[text]


def hlt(mode: Mode) -> Snippet:
    """The end of a program."""
    return plain(mode, "hlt")


# --- registers ---------------------------------------------------------------------------------------------

_NAMES_32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", *(f"r{n}d" for n in range(8, 16)))


def register_names(mode: Mode) -> tuple[str, ...]:
    """The general registers of a mode, by their widest names."""
    return GENERAL_REGISTERS if mode is Mode.LONG else _NAMES_32[:8]


def mov(mode: Mode, register: str, value: int) -> Snippet:
    """MOV of a number to a general register: all of it in 64-bit mode, its lower half elsewhere."""
    number = GENERAL_REGISTERS.index(register)
    rex = [0x41] if number > 7 else []
    if mode is Mode.LONG and value >> 32:
        return Snippet(
            f"movabs {register}, {value:#x}",
            bytes([0x48 | number >> 3, 0xB8 + number % 8]) + value.to_bytes(8, "little"),
        )
    prefix = [0x66] if mode is Mode.REAL else []
    code = bytes([*prefix, *rex, 0xB8 + number % 8]) + (value & 0xFFFF_FFFF).to_bytes(4, "little")
    return Snippet(f"mov {_NAMES_32[number]}, {value & 0xFFFF_FFFF:#x}", code)


# --- modes and controls ------------------------------------------------------------------------------------


# Strategies that are made again and again would cost more than to draw from them: they are kept.


@cache
def modes(capabilities: Capabilities) -> st.SearchStrategy[Mode]:
    """The modes that L2 can be in; 64-bit mode is the simplest."""
    from vmxlab import SecondaryControls

    real = capabilities.supports(SecondaryControls.UNRESTRICTED_GUEST)
    return st.sampled_from(MODES if real else MODES[:2])


@cache
def settings_of(
    capabilities: Capabilities, flags: tuple[BitFlags, ...]
) -> st.SearchStrategy[dict[str, tuple[BitFlags, ...]]]:
    """Each control set or not: `enable` of a case. The baseline has them where the processor demands it."""
    chosen = [flag for flag in flags if capabilities.supports(flag)]

    def settings(bits: list[bool]) -> dict[str, tuple[BitFlags, ...]]:
        return {"enable": tuple(flag for flag, bit in zip(chosen, bits, strict=True) if bit)}

    lists = st.tuples(*(st.booleans() for _ in chosen)).map(list)
    return lists.map(settings)


@cache
def spread(bits: int) -> st.SearchStrategy[int]:
    """Numbers of so many bits: small ones, single bits, all ones, anything."""
    top = (1 << bits) - 1
    return st.one_of(
        st.integers(0, 16).map(lambda value: value & top),
        st.integers(0, bits - 1).map(lambda bit: 1 << bit),
        st.integers(0, bits - 1).map(lambda bit: top >> bit),
        st.integers(0, top),
    )


@cache
def some_bits_of(mask: int) -> st.SearchStrategy[int]:
    """Any of the bits of a mask; none is the simplest."""
    bits = [1 << n for n in range(64) if mask >> n & 1]
    if not bits:
        return st.just(0)
    return st.lists(st.sampled_from(bits), max_size=min(4, len(bits)), unique=True).map(sum)


def what_differs(fields: Mapping[Field, int], baseline: Mapping[Field, int]) -> dict[Field, int]:
    """VMCS fields without those that are so anyway; what the baseline does not name is 0."""
    return {name: value for name, value in fields.items() if value != baseline.get(name, 0)}


T = TypeVar("T")


def some(element: st.SearchStrategy[T], most: int = 6) -> st.SearchStrategy[list[T]]:
    """A few of these. Each is drawn and may then be left out: that a shrinker can try for each by itself."""
    pairs = st.lists(st.tuples(element, st.booleans()), min_size=1, max_size=most)
    return pairs.map(lambda drawn: [value for value, is_in in drawn if is_in])


def merged(*parts: Mapping[str, object]) -> dict[str, object]:
    """Case arguments put together; mappings and sequences are joined."""
    result: dict[str, object] = {}
    for part in parts:
        for name, value in part.items():
            have = result.get(name)
            if isinstance(value, Mapping):
                result[name] = {**(have or {}), **value}  # type: ignore[dict-item]
            elif isinstance(value, tuple | list):
                result[name] = (*(have or ()), *value)  # type: ignore[misc]
            else:
                result[name] = value
    return result
