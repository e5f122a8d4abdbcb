"""Exit qualifications of memory accesses: EPT violations, the APIC page, page-modification log, sub-pages.

SDM Vol. 3C, 28.2.1, with Tables 28-6 (APIC access) and 28-7 (EPT violations).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmxlab.sdm.qualifications.base import Qualification, bit, bits, with_notes


@dataclass(frozen=True, slots=True)
class EptViolationQualification(Qualification):
    """Table 28-7.

    `read`, `write`, `fetch`: the access (bits 0-2). A read-modify-write sets `write`, and maybe `read`
    `readable`, `writable`, `executable`: the permissions that all EPT entries used agree on (bits 3-5)
    `user_executable`: bit 6, defined with mode-based execute control; `executable` then is for supervisors
    `guest_linear_valid`: the guest-linear-address field holds an address (bit 7)
    `translated`: bit 8: the access was to the translation of that linear address; clear: to a guest paging
        structure on the way there (a walk, or an update of accessed or dirty flags). Defined if bit 7 is set
    `user_linear_address`, `read_write_linear`, `execute_disable_linear`: bits 9-11, of the guest's own
        paging; defined if bits 7 and 8 are set and IA32_VMX_EPT_VPID_CAP[22] is 1 (advanced information)
    `nmi_unblocking`: NMI unblocking due to IRET (bit 12; 28.2.3 says when it is defined)
    `shadow_stack`: a shadow-stack access (bit 13)
    `supervisor_shadow_stack`: bit 60 of the EPT entry that maps the page (bit 14)
    `guest_paging_verification`: caused by it (bit 15)
    `asynchronous`: to instruction execution, and not event delivery (bit 16)
    """

    read: bool
    write: bool
    fetch: bool
    readable: bool
    writable: bool
    executable: bool
    user_executable: bool
    guest_linear_valid: bool
    translated: bool
    user_linear_address: bool
    read_write_linear: bool
    execute_disable_linear: bool
    nmi_unblocking: bool
    shadow_stack: bool
    supervisor_shadow_stack: bool
    guest_paging_verification: bool
    asynchronous: bool

    @classmethod
    def decode(cls, raw: int) -> EptViolationQualification:
        """From the field."""
        return cls(raw, *(bit(raw, number) for number in range(17)))

    def describe(self) -> str:
        """Such as "write, EPT allows r-x" or "read+write of a paging structure, EPT allows r--"."""
        kinds = [name for name in ("read", "write", "fetch") if getattr(self, name)]
        access = "+".join(kinds) or "no access"
        if self.guest_linear_valid and not self.translated:
            access += " of a paging structure"
        allowed = "".join(
            letter if holds else "-"
            for letter, holds in (("r", self.readable), ("w", self.writable), ("x", self.executable))
        )
        return with_notes(
            f"{access}, EPT allows {allowed}",
            (not self.guest_linear_valid, "no linear address"),
            (self.shadow_stack, "shadow stack"),
            (self.guest_paging_verification, "guest-paging verification"),
            (self.nmi_unblocking, "NMI unblocking by IRET"),
            (self.asynchronous, "asynchronous"),
        )


class ApicAccessType(IntEnum):
    """Bits 15:12 of Table 28-6."""

    LINEAR_READ = 0
    LINEAR_WRITE = 1
    LINEAR_FETCH = 2
    LINEAR_EVENT_DELIVERY = 3
    LINEAR_ASYNCHRONOUS = 4
    GUEST_PHYSICAL_EVENT_DELIVERY = 10
    GUEST_PHYSICAL_ASYNCHRONOUS = 11
    GUEST_PHYSICAL_INSTRUCTION = 15


@dataclass(frozen=True, slots=True)
class ApicAccessQualification(Qualification):
    """Table 28-6. `offset` (of linear accesses; else undefined) is within the APIC page."""

    offset: int
    access_type: ApicAccessType | int
    asynchronous: bool

    @classmethod
    def decode(cls, raw: int) -> ApicAccessQualification:
        """From the field."""
        number = bits(raw, 15, 12)
        try:
            access_type: ApicAccessType | int = ApicAccessType(number)
        except ValueError:
            access_type = number
        return cls(raw, bits(raw, 11, 0), access_type, bit(raw, 16))

    def describe(self) -> str:
        """Such as "linear read at offset 0x20"."""
        if not isinstance(self.access_type, ApicAccessType):
            return f"unknown access type {self.access_type} at offset {self.offset:#x}"
        text = self.access_type.name.lower().replace("_", " ").replace("guest physical", "guest-physical")
        if self.access_type <= ApicAccessType.LINEAR_ASYNCHRONOUS:
            text += f" at offset {self.offset:#x}"
        return text


@dataclass(frozen=True, slots=True)
class ApicWriteQualification(Qualification):
    """APIC-write emulation: the offset in the APIC page."""

    offset: int

    @classmethod
    def decode(cls, raw: int) -> ApicWriteQualification:
        """From the field."""
        return cls(raw, bits(raw, 11, 0))

    def describe(self) -> str:
        """Such as "offset 0x300"."""
        return f"offset {self.offset:#x}"


@dataclass(frozen=True, slots=True)
class PmlFullQualification(Qualification):
    """Page-modification log full: only bits 12 and 16 are defined."""

    nmi_unblocking: bool
    asynchronous: bool

    @classmethod
    def decode(cls, raw: int) -> PmlFullQualification:
        """From the field."""
        return cls(raw, bit(raw, 12), bit(raw, 16))

    def describe(self) -> str:
        """Such as "log full"."""
        return with_notes(
            "log full",
            (self.nmi_unblocking, "NMI unblocking by IRET"),
            (self.asynchronous, "asynchronous"),
        )


@dataclass(frozen=True, slots=True)
class SppQualification(Qualification):
    """Sub-page permissions: an SPP miss (bit 11 set) or misconfiguration (clear)."""

    miss: bool
    nmi_unblocking: bool
    asynchronous: bool

    @classmethod
    def decode(cls, raw: int) -> SppQualification:
        """From the field."""
        return cls(raw, bit(raw, 11), bit(raw, 12), bit(raw, 16))

    def describe(self) -> str:
        """Either "SPP miss" or "SPP misconfiguration", and what else holds."""
        return with_notes(
            "SPP miss" if self.miss else "SPP misconfiguration",
            (self.nmi_unblocking, "NMI unblocking by IRET"),
            (self.asynchronous, "asynchronous"),
        )
