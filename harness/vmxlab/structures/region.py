"""The VMXON region and the VMCS region (SDM Vol. 3C, 25.2 and 25.11.5).

To software both are one page whose first word it writes; everything after the first eight bytes is the
processor's own and has no documented format. Python gives the first word, VMWRITE does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import PAGE_SIZE, require_bits, require_page_address

SHADOW_INDICATOR = 1 << 31
"""Bit 31 of a VMCS region's first word (SDM Vol. 3C, 25.2)."""
_DATA_OFFSET = 8


@dataclass(frozen=True, slots=True)
class VmxRegion:
    """One VMXON or VMCS region of 4 KiB.

    `revision_id` is the 31-bit VMCS revision identifier; the one to use comes from `VmxBasic.revision_id` of
    the processor that will run it (a test of VMfail gives another). `shadow` is bit 31 of the first word, the
    shadow-VMCS indicator; it must be 0 in a VMXON region. `abort_indicator` is what a VMX abort leaves in
    bytes 7:4, and `data` the processor's own bytes from offset 8 on, without trailing zeros; both stay empty
    in a region that software makes, and are there to hold one that was read back.

    Raises OutOfRange for a revision identifier over 31 bits, an indicator over 32, or too much data.
    """

    revision_id: int
    shadow: bool = False
    abort_indicator: int = 0
    data: bytes = b""

    def __post_init__(self) -> None:
        """Check what the format can hold."""
        if not 0 <= self.revision_id < SHADOW_INDICATOR:
            raise OutOfRange(
                "VMCS revision identifier",
                self.revision_id,
                "it has 31 bits; bit 31 of the word is the shadow-VMCS indicator (SDM Vol. 3C, 25.2)",
                advice="ask for a shadow VMCS with shadow=True",
            )
        require_bits("VMX-abort indicator", self.abort_indicator, 32)
        if len(self.data) > PAGE_SIZE - _DATA_OFFSET:
            raise OutOfRange(
                "length of VMCS data", len(self.data), f"at most {PAGE_SIZE - _DATA_OFFSET:#x} bytes"
            )
        object.__setattr__(self, "data", bytes(self.data).rstrip(b"\0"))

    @classmethod
    def uninit(cls) -> VmxRegion:
        """A region that nobody initialized: all zero, so revision identifier 0 and no shadow indicator."""
        return cls(0)

    @classmethod
    def from_bytes(cls, data: bytes) -> VmxRegion:
        """The region that these 4096 bytes hold; `to_bytes` gives the same bytes back."""
        if len(data) != PAGE_SIZE:
            raise OutOfRange("length of a VMX region", len(data), f"it is {PAGE_SIZE:#x} bytes")
        word = int.from_bytes(data[:4], "little")
        abort = int.from_bytes(data[4:_DATA_OFFSET], "little")
        return cls(word & ~SHADOW_INDICATOR, bool(word & SHADOW_INDICATOR), abort, bytes(data[_DATA_OFFSET:]))

    def to_bytes(self) -> bytes:
        """The 4096 bytes of the region."""
        word = self.revision_id | (SHADOW_INDICATOR if self.shadow else 0)
        head = word.to_bytes(4, "little") + self.abort_indicator.to_bytes(4, "little")
        return (head + self.data).ljust(PAGE_SIZE, b"\0")

    def phys_addr(self, base: int) -> int:
        """The operand of VMXON, VMCLEAR, VMPTRLD for a region laid out at `base`; Misaligned, OutOfRange."""
        return require_page_address("address of a VMX region", base)

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """The one page of the region as (physical address, 4096 bytes), laid out at `base`."""
        return [(self.phys_addr(base), self.to_bytes())]
