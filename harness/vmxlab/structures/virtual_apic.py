"""The virtual-APIC page: the local APIC that L2 sees where APIC accesses are virtualized.

SDM Vol. 3C, 25.6.8 (its address in the VMCS) and 30.1.1 (its registers). A register stands where that of
the local APIC does, in the low four bytes of an aligned 16-byte field; VIRR, VISR and VTMR are 256 bits in
eight of them. What no register uses is memory like any other, and kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vmxlab.errors import OutOfRange
from vmxlab.sdm.apic import ApicRegister
from vmxlab.structures.checks import PAGE_SIZE, require_aligned, require_bits, require_page_address

_WORD = 4
_FIELD = 16
_VECTORS_PER_WORD = 32
X2APIC_MSRS = range(0x800, 0x900)
"""The MSRs of x2APIC mode (Vol. 3C, 30.5)."""


def x2apic_msr(offset: int) -> int:
    """The MSR that is the register at `offset` in x2APIC mode (SDM Vol. 3A, 11.12.1.2); Misaligned."""
    _require_offset(offset)
    return X2APIC_MSRS.start + require_aligned("offset of an x2APIC register", offset, _FIELD) // _FIELD


class VirtualApicPage:
    """One virtual-APIC page.

        page = VirtualApicPage({ApicRegister.TASK_PRIORITY: 0x30}, requests=[0x41])
        page[ApicRegister.EOI]                 # 0: a register, by its offset
        page.requests, page.in_service         # vectors set in VIRR and VISR, lowest first

    `registers` are 32-bit words by offset, any multiple of 4; `requests`, `in_service`, `level_triggered` are
    vectors to set in VIRR, VISR and VTMR. Mutable; `copy()` gives one of its own. Raises OutOfRange for a
    value over 32 bits, an offset outside of the page, a vector over 255; Misaligned for an odd offset.
    """

    __slots__ = ("_bytes",)

    def __init__(
        self,
        registers: Mapping[int, int] | None = None,
        *,
        requests: Iterable[int] = (),
        in_service: Iterable[int] = (),
        level_triggered: Iterable[int] = (),
    ) -> None:
        self._bytes = bytearray(PAGE_SIZE)
        for offset, value in (registers or {}).items():
            self[offset] = value
        for first, vectors in (
            (ApicRegister.INTERRUPT_REQUEST_0, requests),
            (ApicRegister.IN_SERVICE_0, in_service),
            (ApicRegister.TRIGGER_MODE_0, level_triggered),
        ):
            for vector in vectors:
                self._set_vector(first, vector, True)

    @classmethod
    def from_bytes(cls, data: bytes) -> VirtualApicPage:
        """The page that these 4096 bytes are; `to_bytes` gives the same bytes back."""
        if len(data) != PAGE_SIZE:
            raise OutOfRange("length of a virtual-APIC page", len(data), f"it is {PAGE_SIZE:#x} bytes")
        page = cls()
        page._bytes[:] = data
        return page

    def to_bytes(self) -> bytes:
        """The 4096 bytes of the page."""
        return bytes(self._bytes)

    def copy(self) -> VirtualApicPage:
        """Another page with the same content."""
        return VirtualApicPage.from_bytes(self.to_bytes())

    def __getitem__(self, offset: int) -> int:
        """The 32-bit word at `offset`."""
        _require_offset(offset)
        return int.from_bytes(self._bytes[offset : offset + _WORD], "little")

    def __setitem__(self, offset: int, value: int) -> None:
        _require_offset(offset)
        word = require_bits(f"word {offset:#x} of a virtual-APIC page", value, 32)
        self._bytes[offset : offset + _WORD] = word.to_bytes(_WORD, "little")

    @property
    def requests(self) -> tuple[int, ...]:
        """The vectors whose bit in VIRR is set, lowest first."""
        return self._vectors(ApicRegister.INTERRUPT_REQUEST_0)

    @property
    def in_service(self) -> tuple[int, ...]:
        """The vectors whose bit in VISR is set, lowest first."""
        return self._vectors(ApicRegister.IN_SERVICE_0)

    @property
    def level_triggered(self) -> tuple[int, ...]:
        """The vectors whose bit in VTMR is set, lowest first."""
        return self._vectors(ApicRegister.TRIGGER_MODE_0)

    def set_request(self, vector: int, requested: bool) -> None:
        """Set or clear a vector in VIRR; RVI, in the VMCS, is another thing."""
        self._set_vector(ApicRegister.INTERRUPT_REQUEST_0, vector, requested)

    def set_in_service(self, vector: int, in_service: bool) -> None:
        """Set or clear a vector in VISR; SVI, in the VMCS, is another thing."""
        self._set_vector(ApicRegister.IN_SERVICE_0, vector, in_service)

    def set_level_triggered(self, vector: int, level: bool) -> None:
        """Set or clear a vector in VTMR."""
        self._set_vector(ApicRegister.TRIGGER_MODE_0, vector, level)

    def phys_addr(self, base: int) -> int:
        """The field virtual-APIC address for a page laid out at `base`; Misaligned, OutOfRange."""
        return require_page_address("address of the virtual-APIC page", base)

    def pages(self, base: int) -> list[tuple[int, bytes]]:
        """The one page as (physical address, 4096 bytes), laid out at `base`."""
        return [(self.phys_addr(base), self.to_bytes())]

    def _vectors(self, first: int) -> tuple[int, ...]:
        return tuple(v for v in range(256) if self[_word_of(first, v)] >> v % _VECTORS_PER_WORD & 1)

    def _set_vector(self, first: int, vector: int, value: bool) -> None:
        offset = _word_of(first, require_bits("interrupt vector", vector, 8))
        bit = 1 << vector % _VECTORS_PER_WORD
        self[offset] = self[offset] | bit if value else self[offset] & ~bit

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bytes."""
        if not isinstance(other, VirtualApicPage):
            return NotImplemented
        return self._bytes == other._bytes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The words that are not 0, by name where the local APIC has a register there."""
        words = {offset: self[offset] for offset in range(0, PAGE_SIZE, _WORD) if self[offset]}
        text = ", ".join(f"{_name(offset)}={value:#x}" for offset, value in list(words.items())[:8])
        return f"<VirtualApicPage: {text or 'all zero'}{', ...' if len(words) > 8 else ''}>"


def _require_offset(offset: int) -> None:
    if not 0 <= offset <= PAGE_SIZE - _WORD:
        raise OutOfRange(
            "offset of a 32-bit word in a virtual-APIC page", offset, f"0 to {PAGE_SIZE - _WORD:#x}"
        )
    require_aligned("offset of a 32-bit word in a virtual-APIC page", offset, _WORD)


def _word_of(first: int, vector: int) -> int:
    # Bit x of VIRR, VISR and VTMR is bit x & 1FH at offset first | (x & E0H) >> 1 (SDM Vol. 3C, 30.1.1).
    return first + vector // _VECTORS_PER_WORD * _FIELD


def _name(offset: int) -> str:
    try:
        return ApicRegister(offset).name
    except ValueError:
        return f"{offset:#x}"
