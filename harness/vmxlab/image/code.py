"""L2's code as it stands when a case starts: what a reader of the log needs to name its instructions.

    @code id=0x5 mode=long at=0x8000 data=e460f4*crc

`at` is the linear address of the first byte; `mode` says how the bytes decode ("long", "protected" and "real"
stand for 64, 32 and 16 bits); `base` is the base of CS, where it is not 0: RIP is the linear address less the
base. In a live lab the harness writes these records into the log, as remarks; an image that boots by hand
has the monitor say them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.program import Mode
from vmxlab.sdm.controls import EntryControls
from vmxlab.sdm.fields import Field

RECORD_BYTES = 4096
"""Longer code goes on in another record."""

_CS_L, _CS_D = 1 << 13, 1 << 14  # SDM Vol. 3C, Table 25-2


@dataclass(frozen=True, slots=True)
class LoadedCode:
    """What a case puts where L2 may execute it: its program first, then its data, which may be code too."""

    mode: Mode
    cs_base: int
    chunks: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, program: bytes, data: Mapping[int, bytes], fields: Mapping[Field, int]) -> LoadedCode:
        """The code of a case whose VMCS has these fields."""
        mode = _mode(fields)
        # 64-bit mode takes the base of CS for 0 (SDM Vol. 1, 3.4.2.1).
        base = 0 if mode is Mode.LONG else fields.get(Field.GUEST_CS_BASE, 0)
        chunks = [(PROGRAM, program), *sorted(data.items())]
        return cls(mode, base, tuple((at, bytes(content)) for at, content in chunks if content))

    def records(self, number: int) -> Iterator[dict[str, str | int]]:
        """The values of its records, for case `number`. Zeros at the end of data are no code."""
        for index, (start, content) in enumerate(self.chunks):
            kept = content if index == 0 else content.rstrip(b"\0")
            for offset in range(0, len(kept), RECORD_BYTES):
                values: dict[str, str | int] = {"id": number, "mode": self.mode.name.lower()}
                if self.cs_base:
                    values["base"] = self.cs_base
                piece = kept[offset : offset + RECORD_BYTES]
                yield values | {"at": start + offset, "data": piece.hex()}


def _mode(fields: Mapping[Field, int]) -> Mode:
    """How the processor decodes code from this CS (SDM Vol. 3A, 3.4.5: L counts in IA-32e mode only)."""
    rights = fields.get(Field.GUEST_CS_ACCESS_RIGHTS, 0)
    if rights & _CS_L and fields.get(Field.ENTRY_CONTROLS, 0) & EntryControls.IA32E_MODE_GUEST:
        return Mode.LONG
    return Mode.PROTECTED if rights & _CS_D else Mode.REAL
