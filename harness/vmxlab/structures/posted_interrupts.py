"""The posted-interrupt descriptor (SDM Vol. 3C, 30.6, table 30-1): interrupts for L2 without a VM exit.

64 bytes, 64-byte aligned: bits 255:0 are the posted-interrupt requests (PIR), one for each vector, bit 256
says that a notification is outstanding; the rest is the software's, and the processor does not touch it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.structures.checks import (
    MAX_PHYSICAL_ADDRESS_WIDTH,
    require_aligned,
    require_bits,
    require_width,
)

DESCRIPTOR_BYTES = 64
_OUTSTANDING = 256
_SOFTWARE = 257


@dataclass(frozen=True, slots=True)
class PostedInterruptDescriptor:
    """One descriptor.

    `requests` are the vectors in PIR, `outstanding_notification` is bit 256, and `software` bits 511:257.
    Raises OutOfRange for a vector over 255 and for more than 255 bits of software's own.
    """

    requests: tuple[int, ...] = ()
    outstanding_notification: bool = False
    software: int = 0

    def __post_init__(self) -> None:
        """Check what the format can hold, and put the vectors in order."""
        vectors = {require_bits("posted interrupt vector", vector, 8) for vector in self.requests}
        object.__setattr__(self, "requests", tuple(sorted(vectors)))
        require_bits("bits 511:257 of a posted-interrupt descriptor", self.software, 512 - _SOFTWARE)

    @classmethod
    def from_bytes(cls, data: bytes) -> PostedInterruptDescriptor:
        """The descriptor that these 64 bytes are; `to_bytes` gives the same bytes back."""
        if len(data) != DESCRIPTOR_BYTES:
            raise OutOfRange(
                "length of a posted-interrupt descriptor", len(data), f"it is {DESCRIPTOR_BYTES} bytes"
            )
        bits = int.from_bytes(data, "little")
        vectors = tuple(vector for vector in range(_OUTSTANDING) if bits >> vector & 1)
        return cls(vectors, bool(bits >> _OUTSTANDING & 1), bits >> _SOFTWARE)

    def to_bytes(self) -> bytes:
        """The 64 bytes of the descriptor."""
        bits = sum(1 << vector for vector in self.requests)
        bits |= self.outstanding_notification << _OUTSTANDING | self.software << _SOFTWARE
        return bits.to_bytes(DESCRIPTOR_BYTES, "little")

    def phys_addr(self, base: int, width: int = MAX_PHYSICAL_ADDRESS_WIDTH) -> int:
        """The field for a descriptor at `base`; Misaligned, OutOfRange (SDM Vol. 3C, 27.2.1.1)."""
        if not 0 <= base < 1 << require_width(width):
            raise OutOfRange(
                "address of a posted-interrupt descriptor", base, f"physical addresses have {width} bits"
            )
        return require_aligned("address of a posted-interrupt descriptor", base, DESCRIPTOR_BYTES)
