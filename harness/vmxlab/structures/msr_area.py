"""MSR areas: the lists of MSRs that VM exits store, and that VM exits and VM entries load.

SDM Vol. 3C, 25.7.2 (table 25-15) and 25.8.2: an entry is 16 bytes, with the MSR's index in bits 31:0, zeros
in bits 63:32 and the value in bits 127:64. An area is 16-byte aligned; its length stands in the VMCS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import (
    MAX_PHYSICAL_ADDRESS_WIDTH,
    require_aligned,
    require_bits,
    require_width,
)

_ENTRY = struct.Struct("<IIQ")
ENTRY_BYTES = _ENTRY.size


@dataclass(frozen=True, slots=True)
class MsrEntry:
    """One entry: an MSR and its value.

    `reserved` is bits 63:32, which must be 0: anything else makes the entry fail. Raises OutOfRange for what
    the entry can't hold.
    """

    msr: int
    value: int = 0
    reserved: int = 0

    def __post_init__(self) -> None:
        """Check what the format can hold."""
        require_bits("MSR index", self.msr, 32)
        require_bits("value of an MSR", self.value, 64)
        require_bits("bits 63:32 of an MSR-area entry", self.reserved, 32)

    def to_bytes(self) -> bytes:
        """The 16 bytes of the entry."""
        return _ENTRY.pack(self.msr, self.reserved, self.value)


class MsrArea:
    """An area of entries, in the order in which they are processed.

        MsrArea([(Msr.IA32_STAR, 5), MsrEntry(Msr.IA32_LSTAR, reserved=1)])
        MsrArea.of_msrs([Msr.IA32_STAR, Msr.IA32_LSTAR])      # values 0: for a VM-exit MSR-store area

    Immutable. How long it may be says `VmxMisc.recommended_msr_count` of the processor: 512 * (N + 1); beyond
    it the processor's behaviour is undefined, and machine checks may follow (25.7.2).
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[MsrEntry | tuple[int, int]] = ()) -> None:
        self._entries = tuple(e if isinstance(e, MsrEntry) else MsrEntry(*e) for e in entries)

    @classmethod
    def of_msrs(cls, msrs: Iterable[int]) -> MsrArea:
        """An area that names MSRs and holds no values yet."""
        return cls(MsrEntry(msr) for msr in msrs)

    @classmethod
    def from_bytes(cls, data: bytes) -> MsrArea:
        """The area that these bytes are; OutOfRange if they are no whole number of entries."""
        if len(data) % ENTRY_BYTES:
            raise OutOfRange("length of an MSR area", len(data), f"entries have {ENTRY_BYTES} bytes")
        return cls(MsrEntry(msr, value, reserved) for msr, reserved, value in _ENTRY.iter_unpack(data))

    def to_bytes(self) -> bytes:
        """The entries, 16 bytes each."""
        return b"".join(entry.to_bytes() for entry in self._entries)

    @property
    def entries(self) -> tuple[MsrEntry, ...]:
        """The entries in order."""
        return self._entries

    @property
    def values(self) -> tuple[int, ...]:
        """The entries' values, in order."""
        return tuple(entry.value for entry in self._entries)

    def phys_addr(self, base: int, width: int = MAX_PHYSICAL_ADDRESS_WIDTH) -> int:
        """The field for an area laid out at `base`; Misaligned, OutOfRange (SDM Vol. 3C, 27.2.1.2, 27.2.1.3).

        It is 16-byte aligned, and its last byte is not beyond the processor's `width` of physical addresses.
        """
        size = max(len(self._entries), 1) * ENTRY_BYTES
        if not 0 <= base <= (1 << require_width(width)) - size:
            raise OutOfRange("address of an MSR area", base, f"{size:#x} bytes must end below 2^{width}")
        return require_aligned("address of an MSR area", base, ENTRY_BYTES)

    def __len__(self) -> int:
        """The number of entries: the count in the VMCS."""
        return len(self._entries)

    def __iter__(self) -> Iterator[MsrEntry]:
        """The entries in order."""
        return iter(self._entries)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same entries in the same order."""
        return self._entries == other._entries if isinstance(other, MsrArea) else NotImplemented

    def __hash__(self) -> int:
        """By the entries."""
        return hash(self._entries)

    def __repr__(self) -> str:
        """The first entries."""
        shown = ", ".join(f"{e.msr:#x}={e.value:#x}" for e in self._entries[:4])
        return f"<MsrArea of {len(self)}: {shown}{', ...' if len(self) > 4 else ''}>"
