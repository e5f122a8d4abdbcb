"""The local APIC: its registers in xAPIC mode, and the bits of those a program writes.

SDM Vol. 3A, chapter 11: 11.4.1 (register map), 11.5.1 (local vector table), 11.5.4 (timer), 11.6.1 (interrupt
command register), 11.9 (spurious-interrupt vector). Each register is one aligned 32-bit word.
"""

from __future__ import annotations

from enum import IntEnum

from vmxlab.errors import OutOfRange
from vmxlab.sdm.flags import BitFlags

# Where the registers stand after a reset, until IA32_APIC_BASE says otherwise (Vol. 3A, 11.4.1).
APIC_DEFAULT_BASE = 0xFEE0_0000


class ApicRegister(IntEnum):
    """Offsets from the APIC base (Vol. 3A, Table 11-1); of 256-bit registers eight words, lowest first."""

    ID = 0x020
    VERSION = 0x030
    TASK_PRIORITY = 0x080
    ARBITRATION_PRIORITY = 0x090
    PROCESSOR_PRIORITY = 0x0A0
    EOI = 0x0B0
    REMOTE_READ = 0x0C0
    LOGICAL_DESTINATION = 0x0D0
    DESTINATION_FORMAT = 0x0E0
    SPURIOUS_INTERRUPT_VECTOR = 0x0F0
    IN_SERVICE_0 = 0x100
    IN_SERVICE_1 = 0x110
    IN_SERVICE_2 = 0x120
    IN_SERVICE_3 = 0x130
    IN_SERVICE_4 = 0x140
    IN_SERVICE_5 = 0x150
    IN_SERVICE_6 = 0x160
    IN_SERVICE_7 = 0x170
    TRIGGER_MODE_0 = 0x180
    TRIGGER_MODE_1 = 0x190
    TRIGGER_MODE_2 = 0x1A0
    TRIGGER_MODE_3 = 0x1B0
    TRIGGER_MODE_4 = 0x1C0
    TRIGGER_MODE_5 = 0x1D0
    TRIGGER_MODE_6 = 0x1E0
    TRIGGER_MODE_7 = 0x1F0
    INTERRUPT_REQUEST_0 = 0x200
    INTERRUPT_REQUEST_1 = 0x210
    INTERRUPT_REQUEST_2 = 0x220
    INTERRUPT_REQUEST_3 = 0x230
    INTERRUPT_REQUEST_4 = 0x240
    INTERRUPT_REQUEST_5 = 0x250
    INTERRUPT_REQUEST_6 = 0x260
    INTERRUPT_REQUEST_7 = 0x270
    ERROR_STATUS = 0x280
    LVT_CMCI = 0x2F0
    INTERRUPT_COMMAND_LOW = 0x300
    INTERRUPT_COMMAND_HIGH = 0x310
    LVT_TIMER = 0x320
    LVT_THERMAL_SENSOR = 0x330
    LVT_PERFORMANCE_MONITORING_COUNTERS = 0x340
    LVT_LINT0 = 0x350
    LVT_LINT1 = 0x360
    LVT_ERROR = 0x370
    INITIAL_COUNT = 0x380
    CURRENT_COUNT = 0x390
    DIVIDE_CONFIGURATION = 0x3E0

    @property
    def default_address(self) -> int:
        """The physical address, where IA32_APIC_BASE is as after a reset."""
        return APIC_DEFAULT_BASE + self


def require_apic_register(offset: int) -> None:
    """Raise OutOfRange for what is no offset of a register: multiples of 16 in one page (Vol. 3A, 11.4.1)."""
    if not 0 <= offset < 0x1000 or offset % 0x10:
        raise OutOfRange("offset of an APIC register", offset, "a multiple of 16, below 0x1000")


class ApicDeliveryMode(IntEnum):
    """How an interrupt is delivered: bits 10:8 of the ICR (Vol. 3A, 11.6.1) and of LVT entries (11.5.1).

    LOWEST_PRIORITY and START_UP are the ICR's alone, EXT_INT that of LVT entries.
    """

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    START_UP = 6
    EXT_INT = 7

    @property
    def bits(self) -> int:
        """The mode where it stands in the register."""
        return self << 8


class ApicDestinationShorthand(IntEnum):
    """Who receives an interprocessor interrupt: bits 19:18 of the ICR (Vol. 3A, 11.6.1)."""

    NONE = 0
    SELF = 1
    ALL_INCLUDING_SELF = 2
    ALL_EXCLUDING_SELF = 3

    @property
    def bits(self) -> int:
        """The shorthand where it stands in the register."""
        return self << 18


class InterruptCommandFlags(BitFlags):
    """Bits of the ICR's low word, beside vector, delivery mode and shorthand (Vol. 3A, Figure 11-12)."""

    LOGICAL_DESTINATION = 1 << 11
    SEND_PENDING = 1 << 12
    LEVEL_ASSERT = 1 << 14
    LEVEL_TRIGGERED = 1 << 15


class LocalVectorFlags(BitFlags):
    """Bits of an LVT entry, beside vector and delivery mode (Vol. 3A, Figure 11-8).

    A timer with neither of its two bits counts down once.
    """

    SEND_PENDING = 1 << 12
    ACTIVE_LOW = 1 << 13
    REMOTE_IRR = 1 << 14
    LEVEL_TRIGGERED = 1 << 15
    MASKED = 1 << 16
    TIMER_PERIODIC = 1 << 17
    TIMER_TSC_DEADLINE = 1 << 18


class SpuriousVectorFlags(BitFlags):
    """Bits of the spurious-interrupt vector register, beside the vector (Vol. 3A, Figure 11-23)."""

    SOFTWARE_ENABLE = 1 << 8
    FOCUS_CHECKING_DISABLED = 1 << 9
    EOI_BROADCAST_SUPPRESSED = 1 << 12


class ApicTimerDivide(IntEnum):
    """Values of the divide configuration register: bits 3, 1 and 0 (Vol. 3A, Figure 11-10)."""

    BY_2 = 0b0000
    BY_4 = 0b0001
    BY_8 = 0b0010
    BY_16 = 0b0011
    BY_32 = 0b1000
    BY_64 = 0b1001
    BY_128 = 0b1010
    BY_1 = 0b1011
