"""The extended-page-table pointer, EPTP (SDM Vol. 3C, 25.6.11; checked by 27.2.1.1).

Its low bits are fields, not flags: memory type 6 is not "types 2 and 4 both", and the walk length is
written as one less than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmxlab.errors import MissingCapability, OutOfRange
from vmxlab.sdm.registers import MemoryType
from vmxlab.structures.capability_msrs import EptVpidCap, memory_type
from vmxlab.structures.checks import (
    MAX_PHYSICAL_ADDRESS_WIDTH,
    PAGE_SIZE,
    BrokenRule,
    require_aligned,
    require_bits,
    require_page_address,
    require_width,
)

_SOURCE = "SDM Vol. 3C, 27.2.1.1"
_LENGTH_SHIFT = 3
_RESERVED = 0xF00


@dataclass(frozen=True, slots=True, kw_only=True)
class EPTPointer:
    """An EPTP as its fields. It may hold any 64-bit value, legal or not: `check` says which rules it breaks.

    `memory_type`              bits 2:0, of the EPT paging structures
    `page_walk_length`         bits 5:3 plus 1, so 1 to 8; processors support 4 and maybe 5
    `accessed_dirty`           bit 6, enables accessed and dirty flags for EPT
    `supervisor_shadow_stack`  bit 7, enables access rights for supervisor shadow-stack pages
    `reserved`                 bits 11:8 in place, must be 0
    `address`                  bits 63:12 in place, of the EPT PML4 (or PML5) table

    Raises OutOfRange or Misaligned for what a field can't hold.
    """

    memory_type: int = MemoryType.WB
    page_walk_length: int = 4
    accessed_dirty: bool = False
    supervisor_shadow_stack: bool = False
    reserved: int = 0
    address: int = 0

    # Values of single fields, in place.
    MEM_TYPE_UC: ClassVar[int] = 0
    MEM_TYPE_WB: ClassVar[int] = 6
    WALK_LENGTH_1: ClassVar[int] = 0 << _LENGTH_SHIFT
    WALK_LENGTH_2: ClassVar[int] = 1 << _LENGTH_SHIFT
    WALK_LENGTH_3: ClassVar[int] = 2 << _LENGTH_SHIFT
    WALK_LENGTH_4: ClassVar[int] = 3 << _LENGTH_SHIFT
    WALK_LENGTH_5: ClassVar[int] = 4 << _LENGTH_SHIFT
    ENABLE_ACCESSED_DIRTY: ClassVar[int] = 1 << 6
    ENABLE_SUPERVISOR_SHADOW_STACK: ClassVar[int] = 1 << 7

    def __post_init__(self) -> None:
        """Check that each field fits its bits."""
        require_bits("EPTP memory type", self.memory_type, 3)
        if not 1 <= self.page_walk_length <= 8:
            raise OutOfRange(
                "EPT page-walk length",
                self.page_walk_length,
                "bits 5:3 hold it less 1, so 1 to 8 can be written",
            )
        require_bits("EPTP bits 63:12", self.address, 64)
        require_aligned("EPTP bits 63:12", self.address, PAGE_SIZE)
        if self.reserved & ~_RESERVED:
            raise OutOfRange(
                "reserved bits of an EPTP", self.reserved, f"they are bits 11:8, mask {_RESERVED:#x}"
            )
        object.__setattr__(self, "memory_type", memory_type(self.memory_type))

    @property
    def bits(self) -> int:
        """The 64-bit value of the field."""
        return (
            int(self.memory_type)
            | (self.page_walk_length - 1) << _LENGTH_SHIFT
            | (self.ENABLE_ACCESSED_DIRTY if self.accessed_dirty else 0)
            | (self.ENABLE_SUPERVISOR_SHADOW_STACK if self.supervisor_shadow_stack else 0)
            | self.reserved
            | self.address
        )

    @classmethod
    def from_bits(cls, raw: int) -> EPTPointer:
        """The EPTP with this 64-bit value, whatever it is: `.bits` gives the same back."""
        require_bits("EPTP", raw, 64)
        return cls(
            memory_type=raw & 7,
            page_walk_length=(raw >> _LENGTH_SHIFT & 7) + 1,
            accessed_dirty=bool(raw & cls.ENABLE_ACCESSED_DIRTY),
            supervisor_shadow_stack=bool(raw & cls.ENABLE_SUPERVISOR_SHADOW_STACK),
            reserved=raw & _RESERVED,
            address=raw & ~(PAGE_SIZE - 1),
        )

    @classmethod
    def from_table_phys(
        cls,
        address: int,
        *,
        memory_type: int = MemoryType.WB,
        page_walk_length: int = 4,
        accessed_dirty: bool = True,
        supervisor_shadow_stack: bool = False,
        physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH,
    ) -> EPTPointer:
        """The EPTP for a root table at this physical address: write-back, 4 levels, accessed and dirty flags.

        Misaligned if the address is no multiple of 4 KiB (`from_table_phys_aligned_down` takes such a one),
        OutOfRange if the table would not lie below 2**physical_address_width.
        """
        width = require_width(physical_address_width)
        return cls(
            memory_type=memory_type,
            page_walk_length=page_walk_length,
            accessed_dirty=accessed_dirty,
            supervisor_shadow_stack=supervisor_shadow_stack,
            address=require_page_address("address of the EPT root table", address, width),
        )

    @classmethod
    def from_table_phys_aligned_down(
        cls, address: int, *, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH
    ) -> EPTPointer:
        """`from_table_phys` for the page that holds `address`: bits 11:0 are dropped."""
        return cls.from_table_phys(
            address & ~(PAGE_SIZE - 1) if address >= 0 else address,
            physical_address_width=physical_address_width,
        )

    def check(
        self, capabilities: EptVpidCap, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH
    ) -> list[BrokenRule]:
        """The rules for VM entry with "enable EPT" that this EPTP breaks on such a processor; empty if none.

        (SDM Vol. 3C, 27.2.1.1: VM entry fails with VMfailValid 7 if any is broken.)
        """
        broken: list[BrokenRule] = []

        def rule(text: str, field: str | None = None) -> None:
            bit = EptVpidCap.bit_name(field) if field else None
            feature = getattr(EptVpidCap, field).feature if field else None
            broken.append(BrokenRule(text, _SOURCE, bit, feature))

        types = {MemoryType.UC: "memory_type_uc", MemoryType.WB: "memory_type_wb"}
        lengths = {4: "page_walk_length_4", 5: "page_walk_length_5"}
        for what, value, known in (
            ("memory type", self.memory_type, types),
            ("page-walk length", self.page_walk_length, lengths),
        ):
            field = known.get(value)  # type: ignore[call-overload]
            if field is None:
                rule(f"EPTP {what} {int(value)} is reserved")
            elif not getattr(capabilities, field):
                rule(f"EPTP {what} {int(value)} is not supported", field)
        if self.accessed_dirty and not capabilities.accessed_dirty:
            rule("EPTP bit 6 (accessed and dirty flags) must be 0", "accessed_dirty")
        if self.supervisor_shadow_stack and not capabilities.supervisor_shadow_stack:
            rule("EPTP bit 7 (supervisor shadow stack) must be 0", "supervisor_shadow_stack")
        if self.reserved:
            rule(f"EPTP bits 11:8 must be 0, mask {self.reserved:#x} is set")
        width = require_width(physical_address_width)
        if self.address >> width:
            rule(f"EPTP bits 63:{width} must be 0, the address is {self.address:#x}")
        return broken

    def require(
        self, capabilities: EptVpidCap, physical_address_width: int = MAX_PHYSICAL_ADDRESS_WIDTH
    ) -> None:
        """Nothing if the processor accepts it; else MissingCapability for a feature that the processor lacks.

        A value that no processor allows is OutOfRange; it comes first where both are the case.
        """
        broken = self.check(capabilities, physical_address_width)
        for fault in broken:
            if fault.bit is None:
                raise OutOfRange("EPTP", self.bits, "; ".join(map(str, broken)))
        for fault in broken:
            if fault.bit is not None:
                raise MissingCapability(fault.feature or fault.rule, fault.bit)

    def describe(self) -> str:
        """The value and its fields."""
        kind = getattr(self.memory_type, "name", f"type {int(self.memory_type)}")
        words = [f"{self.bits:#x}", f"table {self.address:#x}", f"{self.page_walk_length} levels", kind]
        words += ["accessed/dirty"] if self.accessed_dirty else []
        words += ["supervisor shadow stack"] if self.supervisor_shadow_stack else []
        words += [f"reserved {self.reserved:#x}"] if self.reserved else []
        return ", ".join(words)

    def __repr__(self) -> str:
        """The same, with the name of the class."""
        return f"<EPTPointer {self.describe()}>"
