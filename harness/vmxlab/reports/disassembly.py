"""The instruction at an address of L2, from the bytes that a case put there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from vmxlab.cases.case import Case
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.program import Mode
from vmxlab.console.records import Record
from vmxlab.sdm.fields import Field

if TYPE_CHECKING:
    from iced_x86 import Formatter

MAX_INSTRUCTION_BYTES = 15
"""SDM Vol. 2A, 2.3.11: a longer one raises #GP."""


@dataclass(frozen=True, slots=True)
class Code:
    """What L2 executes: bytes by L2's linear address, what mode they are for, and the base of CS.

    It is what the case loaded: code that L2 writes itself isn't seen, nor a change of mode or of CS.
    """

    mode: Mode
    chunks: Mapping[int, bytes] = field(default_factory=dict)
    cs_base: int = 0

    @classmethod
    def of(cls, case: Case, program: bytes) -> Code:
        """A case's program, in machine code, and its data, which may be code as well."""
        data = {address: bytes(content) for address, content in case.data.items()}
        # 64-bit mode takes the base of CS for 0 (SDM Vol. 1, 3.4.2.1).
        base = 0 if case.mode is Mode.LONG else case.fields.get(Field.GUEST_CS_BASE, 0)
        return cls.of_bytes(case.mode, program, data, base)

    @classmethod
    def of_bytes(cls, mode: Mode, program: bytes, data: Mapping[int, bytes], cs_base: int = 0) -> Code:
        """A program in machine code where programs lie, and further bytes by L2's addresses."""
        return cls(mode, {PROGRAM: program, **data}, cs_base)

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> Code | None:
        """What "code" records say (`vmxlab.image.code`); later ones lie over earlier ones. None without any.

        Raises KeyError or ValueError for one that makes no sense.
        """
        mode, base, memory = Mode.LONG, 0, dict[int, int]()
        for record in records:
            mode, base = Mode[record.values["mode"].upper()], record.number("base", 0)
            at = record.number("at")
            memory |= dict(enumerate(bytes.fromhex(record.values["data"]), at))
        chunks: dict[int, bytearray] = {}
        start = 0
        for address in sorted(memory):
            if not chunks or address != start + len(chunks[start]):
                start = address
                chunks[start] = bytearray()
            chunks[start].append(memory[address])
        return cls(mode, {at: bytes(chunk) for at, chunk in chunks.items()}, base) if chunks else None

    def at(self, rip: int) -> str | None:
        """The instruction at RIP, in Intel syntax; None where the case put nothing.

        Bytes that are no instruction, or the start of one only, are shown as "(bad)" with the first byte.
        """
        address = self.cs_base + rip
        for start, chunk in self.chunks.items():
            if start <= address < start + len(chunk):
                offset = address - start
                return _disassemble(chunk[offset : offset + MAX_INSTRUCTION_BYTES], self.mode.bits, rip)
        return None

    def listing(self) -> Iterator[tuple[int, str]]:
        """Every instruction with its linear address, one after the other; bytes that are none are left out.

        Data is read as if it were code, and what L2 jumps over as if it came to it.
        """
        from iced_x86 import Decoder

        for start, chunk in self.chunks.items():
            for instruction in Decoder(self.mode.bits, chunk, ip=start):
                if not instruction.is_invalid:
                    yield instruction.ip, _formatter().format(instruction)


@lru_cache(maxsize=1024)
def _disassemble(code: bytes, bits: int, rip: int) -> str:
    from iced_x86 import Decoder

    instruction = Decoder(bits, code, ip=rip).decode()
    if instruction.is_invalid:
        return f"(bad) {code[0]:#04x}"
    text: str = _formatter().format(instruction)
    return text


@lru_cache(maxsize=1)
def _formatter() -> Formatter:
    from iced_x86 import Formatter, FormatterSyntax

    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix = "0x"
    formatter.hex_suffix = ""
    formatter.uppercase_hex = False
    formatter.space_after_operand_separator = True
    formatter.branch_leading_zeros = False
    formatter.show_branch_size = False
    formatter.rip_relative_addresses = True
    return formatter
