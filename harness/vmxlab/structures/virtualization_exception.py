"""The virtualization-exception information area (SDM Vol. 3C, 25.6.20 and 26.5.7.2, Table 26-1).

The processor writes it when it raises #VE in place of an EPT-violation exit, and marks it as in use: as long
as the 32 bits at offset 4 are not 0, EPT violations exit. Its reader clears them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.qualifications.memory import EptViolationQualification
from vmxlab.structures.checks import PAGE_SIZE, require_bits

IN_USE = 0xFFFF_FFFF
"""What the processor writes at offset 4."""
IN_USE_OFFSET = 4

_FORMAT = struct.Struct("<IIQQQH")
_WIDTHS = {
    "exit_reason": 32,
    "in_use": 32,
    "raw_qualification": 64,
    "guest_linear_address": 64,
    "guest_physical_address": 64,
    "eptp_index": 16,
}


@dataclass(frozen=True, slots=True)
class VirtualizationExceptionInformation:
    """Table 26-1: what would have been in the exit's fields, and the EPTP index.

    `exit_reason`             offset 0, 32 bits: 48, EPT violation
    `in_use`                  offset 4, 32 bits: FFFFFFFFH
    `raw_qualification`       offset 8, 64 bits: the exit qualification
    `guest_linear_address`    offset 16, 64 bits
    `guest_physical_address`  offset 24, 64 bits
    `eptp_index`              offset 32, 16 bits: the VM-execution control field of this name

    Any values may be there (OutOfRange only for those that don't fit); `is_written` says whether they are the
    processor's.
    """

    exit_reason: int = 0
    in_use: int = 0
    raw_qualification: int = 0
    guest_linear_address: int = 0
    guest_physical_address: int = 0
    eptp_index: int = 0

    def __post_init__(self) -> None:
        """Check that each value fits its place."""
        for name, bits in _WIDTHS.items():
            require_bits(name.replace("_", " "), getattr(self, name), bits)

    @property
    def is_written(self) -> bool:
        """Whether the processor has written it, and nobody released it since."""
        return (self.exit_reason, self.in_use) == (ExitReason.EPT_VIOLATION, IN_USE)

    @property
    def qualification(self) -> EptViolationQualification:
        """The exit qualification, decoded (Table 28-7)."""
        return EptViolationQualification.decode(self.raw_qualification)

    def to_bytes(self) -> bytes:
        """The 4096 bytes of the area; what the manual does not define is 0."""
        return _FORMAT.pack(*(getattr(self, name) for name in _WIDTHS)).ljust(PAGE_SIZE, b"\0")

    @classmethod
    def from_bytes(cls, data: bytes) -> VirtualizationExceptionInformation:
        """What lies in such an area, or in the first 34 bytes or more of it; OutOfRange for fewer."""
        if not _FORMAT.size <= len(data) <= PAGE_SIZE:
            raise OutOfRange(
                "size of virtualization-exception information",
                len(data),
                f"{_FORMAT.size} bytes at least, {PAGE_SIZE} at most",
            )
        return cls(*_FORMAT.unpack_from(data))
