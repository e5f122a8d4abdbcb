"""Exit qualifications of events: exceptions, SIPI, task switches, failed VM entries, APIC events, time-outs.

SDM Vol. 3C, 28.2.1, with Tables 28-1 (debug exceptions) and 28-2 (task switches); 27.8 (VM-entry failures).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmxlab.sdm.qualifications.base import Qualification, bit, bits, with_notes


@dataclass(frozen=True, slots=True)
class DebugExceptionQualification(Qualification):
    """Table 28-1, with the names of DR6. BLD and RTM are active high here, other than in DR6 itself."""

    b0: bool
    b1: bool
    b2: bool
    b3: bool
    bld: bool
    bd: bool
    bs: bool
    rtm: bool

    @classmethod
    def decode(cls, raw: int) -> DebugExceptionQualification:
        """From the field."""
        return cls(raw, *(bit(raw, number) for number in (0, 1, 2, 3, 11, 13, 14, 16)))

    def describe(self) -> str:
        """The names of the bits that are set, such as "B0 BS"; "no cause" where none is."""
        names = ("b0", "b1", "b2", "b3", "bld", "bd", "bs", "rtm")
        return " ".join(name.upper() for name in names if getattr(self, name)) or "no cause"


@dataclass(frozen=True, slots=True)
class PageFaultQualification(Qualification):
    """A page fault: the linear address that CR2 would hold."""

    linear_address: int

    @classmethod
    def decode(cls, raw: int) -> PageFaultQualification:
        """From the field."""
        return cls(raw, raw)

    def describe(self) -> str:
        """Such as "linear address 0x401000"."""
        return f"linear address {self.linear_address:#x}"


@dataclass(frozen=True, slots=True)
class SipiQualification(Qualification):
    """A start-up IPI: its vector, which is bits 19:12 of the address to start at."""

    vector: int

    @classmethod
    def decode(cls, raw: int) -> SipiQualification:
        """From the field."""
        return cls(raw, bits(raw, 7, 0))

    def describe(self) -> str:
        """Such as "vector 0x9f"."""
        return f"vector {self.vector:#x}"


class TaskSwitchSource(IntEnum):
    """Bits 31:30 of Table 28-2."""

    CALL = 0
    IRET = 1
    JMP = 2
    TASK_GATE = 3


@dataclass(frozen=True, slots=True)
class TaskSwitchQualification(Qualification):
    """Table 28-2: the selector of the TSS that the guest tried to switch to, and by what."""

    selector: int
    source: TaskSwitchSource

    @classmethod
    def decode(cls, raw: int) -> TaskSwitchQualification:
        """From the field."""
        return cls(raw, bits(raw, 15, 0), TaskSwitchSource(bits(raw, 31, 30)))

    def describe(self) -> str:
        """Such as "to TSS 0x28 by JMP"."""
        by = "a task gate in the IDT" if self.source is TaskSwitchSource.TASK_GATE else self.source.name
        return f"to TSS {self.selector:#x} by {by}"


class EntryFailureCause(IntEnum):
    """Why loading guest state failed (27.8). Most failures have no number of their own and give 0."""

    UNSPECIFIED = 0
    PDPTE_LOADING = 2
    NMI_INTO_STI_BLOCKING = 3
    VMCS_LINK_POINTER = 4


@dataclass(frozen=True, slots=True)
class EntryFailureQualification(Qualification):
    """A VM entry that failed on guest state. One cause being named doesn't mean that there are no others."""

    cause: EntryFailureCause | int

    @classmethod
    def decode(cls, raw: int) -> EntryFailureQualification:
        """From the field."""
        try:
            return cls(raw, EntryFailureCause(raw))
        except ValueError:
            return cls(raw, raw)

    def describe(self) -> str:
        """Such as "invalid VMCS link pointer"."""
        match self.cause:
            case EntryFailureCause.UNSPECIFIED:
                return "no cause given"
            case EntryFailureCause.PDPTE_LOADING:
                return "problem loading the PDPTEs"
            case EntryFailureCause.NMI_INTO_STI_BLOCKING:
                return "NMI injected while blocking by STI"
            case EntryFailureCause.VMCS_LINK_POINTER:
                return "invalid VMCS link pointer"
            case _:
                return f"unknown cause {self.cause:#x}"


@dataclass(frozen=True, slots=True)
class MsrLoadFailureQualification(Qualification):
    """A VM entry that failed on its MSR-load area: which entry, counted from 1."""

    entry: int

    @classmethod
    def decode(cls, raw: int) -> MsrLoadFailureQualification:
        """From the field."""
        return cls(raw, raw)

    def describe(self) -> str:
        """Such as "entry 3 of the MSR-load area"."""
        return f"entry {self.entry} of the MSR-load area"


@dataclass(frozen=True, slots=True)
class VirtualizedEoiQualification(Qualification):
    """EOI virtualization: the vector of the virtual interrupt that was dismissed."""

    vector: int

    @classmethod
    def decode(cls, raw: int) -> VirtualizedEoiQualification:
        """From the field."""
        return cls(raw, bits(raw, 7, 0))

    def describe(self) -> str:
        """Such as "vector 0x31"."""
        return f"vector {self.vector:#x}"


@dataclass(frozen=True, slots=True)
class InstructionTimeoutQualification(Qualification):
    """Instruction timeout. With `context_invalid` the guest can't be resumed."""

    context_invalid: bool
    nmi_unblocking: bool

    @classmethod
    def decode(cls, raw: int) -> InstructionTimeoutQualification:
        """From the field."""
        return cls(raw, bit(raw, 0), bit(raw, 12))

    def describe(self) -> str:
        """Such as "context invalid"."""
        text = "context invalid" if self.context_invalid else "context valid"
        return with_notes(text, (self.nmi_unblocking, "NMI unblocking by IRET"))
