"""The fields of a VMCS and their encodings (SDM Vol. 3D, Appendix B; Vol. 3C, 25.11.2).

An encoding is never typed in. It is *computed* from what the manual says of a field: its width, its type and
its index within the table of that width and type; so it can't be mistyped, and it decodes back:

    bit 0      access type (1: the high half of a 64-bit field)
    bits 9:1   index
    bits 11:10 type (control, VM-exit information, guest state, host state)
    bits 14:13 width (16, 64, 32 bits, natural)
    bit 12 and bits 31:15 are reserved, 0

The comments name the table of Appendix B. Fields marked "later" stand in editions after the one this package
cites (see `vmxlab.sdm.EDITION`); their indices come from there. A field being listed says nothing about a
processor having it: that is what VMREAD and the capability MSRs are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from vmxlab.errors import OutOfRange, UnknownField


class FieldWidth(IntEnum):
    """Bits 14:13 of an encoding (Vol. 3C, Table 25-21)."""

    U16 = 0
    U64 = 1
    U32 = 2
    NATURAL = 3


class FieldType(IntEnum):
    """Bits 11:10 of an encoding (Vol. 3C, Table 25-21)."""

    CONTROL = 0
    EXIT_INFORMATION = 1
    GUEST_STATE = 2
    HOST_STATE = 3


# Natural width is that of the architecture, 64 bits: this project needs Intel 64 processors anyway.
_BITS = {FieldWidth.U16: 16, FieldWidth.U64: 64, FieldWidth.U32: 32, FieldWidth.NATURAL: 64}

_MAX_INDEX = 0x1FF
_RESERVED_ENCODING_BITS = 0xFFFF_9000


@dataclass(frozen=True, slots=True)
class Encoding:
    """An encoding taken apart, of a listed field or not."""

    access_high: bool
    type: FieldType
    width: FieldWidth
    index: int


def encode(access_high: bool, type: FieldType, width: FieldWidth, index: int) -> int:
    """The 32-bit operand of VMREAD and VMWRITE for a field (Vol. 3C, 25.11.2).

    Raises OutOfRange for an index over 9 bits, or the high half of a field that is not 64 bits wide.
    """
    if not 0 <= index <= _MAX_INDEX:
        raise OutOfRange("VMCS field index", index, f"9 bits, at most {_MAX_INDEX:#x}")
    if access_high and width is not FieldWidth.U64:
        raise OutOfRange("VMCS access type", 1, "only 64-bit fields have a high half")
    return int(access_high) | index << 1 | type << 10 | width << 13


def decode(encoding: int) -> Encoding:
    """The reverse of `encode`; raises OutOfRange where reserved bits are set."""
    if encoding < 0 or encoding >> 32 or encoding & _RESERVED_ENCODING_BITS:
        raise OutOfRange("VMCS field encoding", encoding, "bit 12 and bits 31:15 are reserved, 0")
    return Encoding(
        bool(encoding & 1),
        FieldType(encoding >> 10 & 3),
        FieldWidth(encoding >> 13 & 3),
        encoding >> 1 & _MAX_INDEX,
    )


_control16 = partial(encode, False, FieldType.CONTROL, FieldWidth.U16)
_guest16 = partial(encode, False, FieldType.GUEST_STATE, FieldWidth.U16)
_host16 = partial(encode, False, FieldType.HOST_STATE, FieldWidth.U16)
_control64 = partial(encode, False, FieldType.CONTROL, FieldWidth.U64)
_exit64 = partial(encode, False, FieldType.EXIT_INFORMATION, FieldWidth.U64)
_guest64 = partial(encode, False, FieldType.GUEST_STATE, FieldWidth.U64)
_host64 = partial(encode, False, FieldType.HOST_STATE, FieldWidth.U64)
_control32 = partial(encode, False, FieldType.CONTROL, FieldWidth.U32)
_exit32 = partial(encode, False, FieldType.EXIT_INFORMATION, FieldWidth.U32)
_guest32 = partial(encode, False, FieldType.GUEST_STATE, FieldWidth.U32)
_host32 = partial(encode, False, FieldType.HOST_STATE, FieldWidth.U32)
_control_natural = partial(encode, False, FieldType.CONTROL, FieldWidth.NATURAL)
_exit_natural = partial(encode, False, FieldType.EXIT_INFORMATION, FieldWidth.NATURAL)
_guest_natural = partial(encode, False, FieldType.GUEST_STATE, FieldWidth.NATURAL)
_host_natural = partial(encode, False, FieldType.HOST_STATE, FieldWidth.NATURAL)


class Field(IntEnum):
    """Every field of a VMCS; the value is the encoding with full access."""

    # Table B-1: 16-bit control fields
    VPID = _control16(0)
    POSTED_INTERRUPT_NOTIFICATION_VECTOR = _control16(1)
    EPTP_INDEX = _control16(2)
    HLAT_PREFIX_SIZE = _control16(3)
    LAST_PID_POINTER_INDEX = _control16(4)

    # Table B-2: 16-bit guest-state fields
    GUEST_ES_SELECTOR = _guest16(0)
    GUEST_CS_SELECTOR = _guest16(1)
    GUEST_SS_SELECTOR = _guest16(2)
    GUEST_DS_SELECTOR = _guest16(3)
    GUEST_FS_SELECTOR = _guest16(4)
    GUEST_GS_SELECTOR = _guest16(5)
    GUEST_LDTR_SELECTOR = _guest16(6)
    GUEST_TR_SELECTOR = _guest16(7)
    GUEST_INTERRUPT_STATUS = _guest16(8)
    PML_INDEX = _guest16(9)
    GUEST_UINV = _guest16(10)

    # Table B-3: 16-bit host-state fields
    HOST_ES_SELECTOR = _host16(0)
    HOST_CS_SELECTOR = _host16(1)
    HOST_SS_SELECTOR = _host16(2)
    HOST_DS_SELECTOR = _host16(3)
    HOST_FS_SELECTOR = _host16(4)
    HOST_GS_SELECTOR = _host16(5)
    HOST_TR_SELECTOR = _host16(6)

    # Table B-4: 64-bit control fields
    IO_BITMAP_A = _control64(0)
    IO_BITMAP_B = _control64(1)
    MSR_BITMAP = _control64(2)
    EXIT_MSR_STORE_ADDRESS = _control64(3)
    EXIT_MSR_LOAD_ADDRESS = _control64(4)
    ENTRY_MSR_LOAD_ADDRESS = _control64(5)
    EXECUTIVE_VMCS_POINTER = _control64(6)
    PML_ADDRESS = _control64(7)
    TSC_OFFSET = _control64(8)
    VIRTUAL_APIC_ADDRESS = _control64(9)
    APIC_ACCESS_ADDRESS = _control64(10)
    POSTED_INTERRUPT_DESCRIPTOR_ADDRESS = _control64(11)
    VM_FUNCTION_CONTROLS = _control64(12)
    EPT_POINTER = _control64(13)
    EOI_EXIT_BITMAP_0 = _control64(14)
    EOI_EXIT_BITMAP_1 = _control64(15)
    EOI_EXIT_BITMAP_2 = _control64(16)
    EOI_EXIT_BITMAP_3 = _control64(17)
    EPTP_LIST_ADDRESS = _control64(18)
    VMREAD_BITMAP = _control64(19)
    VMWRITE_BITMAP = _control64(20)
    VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS = _control64(21)
    XSS_EXITING_BITMAP = _control64(22)
    ENCLS_EXITING_BITMAP = _control64(23)
    SUB_PAGE_PERMISSION_TABLE_POINTER = _control64(24)
    TSC_MULTIPLIER = _control64(25)
    TERTIARY_PROCESSOR_BASED_CONTROLS = _control64(26)
    ENCLV_EXITING_BITMAP = _control64(27)
    LOW_PASID_DIRECTORY_ADDRESS = _control64(28)
    HIGH_PASID_DIRECTORY_ADDRESS = _control64(29)
    SHARED_EPT_POINTER = _control64(30)
    PCONFIG_EXITING_BITMAP = _control64(31)
    HLAT_POINTER = _control64(32)
    PID_POINTER_TABLE_ADDRESS = _control64(33)
    SECONDARY_EXIT_CONTROLS = _control64(34)
    IA32_SPEC_CTRL_MASK = _control64(37)
    IA32_SPEC_CTRL_SHADOW = _control64(38)
    INJECTED_EVENT_DATA = _control64(41)  # later: FRED

    # Table B-5: 64-bit read-only data fields
    GUEST_PHYSICAL_ADDRESS = _exit64(0)
    MSR_DATA = _exit64(1)  # later: RDMSRLIST and WRMSRLIST
    ORIGINAL_EVENT_DATA = _exit64(2)  # later: FRED

    # Table B-6: 64-bit guest-state fields
    VMCS_LINK_POINTER = _guest64(0)
    GUEST_IA32_DEBUGCTL = _guest64(1)
    GUEST_IA32_PAT = _guest64(2)
    GUEST_IA32_EFER = _guest64(3)
    GUEST_IA32_PERF_GLOBAL_CTRL = _guest64(4)
    GUEST_PDPTE0 = _guest64(5)
    GUEST_PDPTE1 = _guest64(6)
    GUEST_PDPTE2 = _guest64(7)
    GUEST_PDPTE3 = _guest64(8)
    GUEST_IA32_BNDCFGS = _guest64(9)
    GUEST_IA32_RTIT_CTL = _guest64(10)
    GUEST_IA32_LBR_CTL = _guest64(11)
    GUEST_IA32_PKRS = _guest64(12)
    GUEST_IA32_FRED_CONFIG = _guest64(13)  # later, as the seven below
    GUEST_IA32_FRED_RSP1 = _guest64(14)
    GUEST_IA32_FRED_RSP2 = _guest64(15)
    GUEST_IA32_FRED_RSP3 = _guest64(16)
    GUEST_IA32_FRED_STKLVLS = _guest64(17)
    GUEST_IA32_FRED_SSP1 = _guest64(18)
    GUEST_IA32_FRED_SSP2 = _guest64(19)
    GUEST_IA32_FRED_SSP3 = _guest64(20)

    # Table B-7: 64-bit host-state fields
    HOST_IA32_PAT = _host64(0)
    HOST_IA32_EFER = _host64(1)
    HOST_IA32_PERF_GLOBAL_CTRL = _host64(2)
    HOST_IA32_PKRS = _host64(3)
    HOST_IA32_FRED_CONFIG = _host64(4)  # later, as the seven below
    HOST_IA32_FRED_RSP1 = _host64(5)
    HOST_IA32_FRED_RSP2 = _host64(6)
    HOST_IA32_FRED_RSP3 = _host64(7)
    HOST_IA32_FRED_STKLVLS = _host64(8)
    HOST_IA32_FRED_SSP1 = _host64(9)
    HOST_IA32_FRED_SSP2 = _host64(10)
    HOST_IA32_FRED_SSP3 = _host64(11)

    # Table B-8: 32-bit control fields
    PIN_BASED_CONTROLS = _control32(0)
    PRIMARY_PROCESSOR_BASED_CONTROLS = _control32(1)
    EXCEPTION_BITMAP = _control32(2)
    PAGE_FAULT_ERROR_CODE_MASK = _control32(3)
    PAGE_FAULT_ERROR_CODE_MATCH = _control32(4)
    CR3_TARGET_COUNT = _control32(5)
    EXIT_CONTROLS = _control32(6)
    EXIT_MSR_STORE_COUNT = _control32(7)
    EXIT_MSR_LOAD_COUNT = _control32(8)
    ENTRY_CONTROLS = _control32(9)
    ENTRY_MSR_LOAD_COUNT = _control32(10)
    ENTRY_INTERRUPTION_INFORMATION = _control32(11)
    ENTRY_EXCEPTION_ERROR_CODE = _control32(12)
    ENTRY_INSTRUCTION_LENGTH = _control32(13)
    TPR_THRESHOLD = _control32(14)
    SECONDARY_PROCESSOR_BASED_CONTROLS = _control32(15)
    PLE_GAP = _control32(16)
    PLE_WINDOW = _control32(17)
    INSTRUCTION_TIMEOUT_CONTROL = _control32(18)
    SEAM_GUEST_KEYID = _control32(19)  # later

    # Table B-9: 32-bit read-only data fields
    VM_INSTRUCTION_ERROR = _exit32(0)
    EXIT_REASON = _exit32(1)
    EXIT_INTERRUPTION_INFORMATION = _exit32(2)
    EXIT_INTERRUPTION_ERROR_CODE = _exit32(3)
    IDT_VECTORING_INFORMATION = _exit32(4)
    IDT_VECTORING_ERROR_CODE = _exit32(5)
    EXIT_INSTRUCTION_LENGTH = _exit32(6)
    EXIT_INSTRUCTION_INFORMATION = _exit32(7)

    # Table B-10: 32-bit guest-state fields (index 22 is not used)
    GUEST_ES_LIMIT = _guest32(0)
    GUEST_CS_LIMIT = _guest32(1)
    GUEST_SS_LIMIT = _guest32(2)
    GUEST_DS_LIMIT = _guest32(3)
    GUEST_FS_LIMIT = _guest32(4)
    GUEST_GS_LIMIT = _guest32(5)
    GUEST_LDTR_LIMIT = _guest32(6)
    GUEST_TR_LIMIT = _guest32(7)
    GUEST_GDTR_LIMIT = _guest32(8)
    GUEST_IDTR_LIMIT = _guest32(9)
    GUEST_ES_ACCESS_RIGHTS = _guest32(10)
    GUEST_CS_ACCESS_RIGHTS = _guest32(11)
    GUEST_SS_ACCESS_RIGHTS = _guest32(12)
    GUEST_DS_ACCESS_RIGHTS = _guest32(13)
    GUEST_FS_ACCESS_RIGHTS = _guest32(14)
    GUEST_GS_ACCESS_RIGHTS = _guest32(15)
    GUEST_LDTR_ACCESS_RIGHTS = _guest32(16)
    GUEST_TR_ACCESS_RIGHTS = _guest32(17)
    GUEST_INTERRUPTIBILITY_STATE = _guest32(18)
    GUEST_ACTIVITY_STATE = _guest32(19)
    GUEST_SMBASE = _guest32(20)
    GUEST_IA32_SYSENTER_CS = _guest32(21)
    VMX_PREEMPTION_TIMER_VALUE = _guest32(23)

    # Table B-11: 32-bit host-state field
    HOST_IA32_SYSENTER_CS = _host32(0)

    # Table B-12: natural-width control fields
    CR0_GUEST_HOST_MASK = _control_natural(0)
    CR4_GUEST_HOST_MASK = _control_natural(1)
    CR0_READ_SHADOW = _control_natural(2)
    CR4_READ_SHADOW = _control_natural(3)
    CR3_TARGET_VALUE_0 = _control_natural(4)
    CR3_TARGET_VALUE_1 = _control_natural(5)
    CR3_TARGET_VALUE_2 = _control_natural(6)
    CR3_TARGET_VALUE_3 = _control_natural(7)

    # Table B-13: natural-width read-only data fields
    EXIT_QUALIFICATION = _exit_natural(0)
    IO_RCX = _exit_natural(1)
    IO_RSI = _exit_natural(2)
    IO_RDI = _exit_natural(3)
    IO_RIP = _exit_natural(4)
    GUEST_LINEAR_ADDRESS = _exit_natural(5)

    # Table B-14: natural-width guest-state fields
    GUEST_CR0 = _guest_natural(0)
    GUEST_CR3 = _guest_natural(1)
    GUEST_CR4 = _guest_natural(2)
    GUEST_ES_BASE = _guest_natural(3)
    GUEST_CS_BASE = _guest_natural(4)
    GUEST_SS_BASE = _guest_natural(5)
    GUEST_DS_BASE = _guest_natural(6)
    GUEST_FS_BASE = _guest_natural(7)
    GUEST_GS_BASE = _guest_natural(8)
    GUEST_LDTR_BASE = _guest_natural(9)
    GUEST_TR_BASE = _guest_natural(10)
    GUEST_GDTR_BASE = _guest_natural(11)
    GUEST_IDTR_BASE = _guest_natural(12)
    GUEST_DR7 = _guest_natural(13)
    GUEST_RSP = _guest_natural(14)
    GUEST_RIP = _guest_natural(15)
    GUEST_RFLAGS = _guest_natural(16)
    GUEST_PENDING_DEBUG_EXCEPTIONS = _guest_natural(17)
    GUEST_IA32_SYSENTER_ESP = _guest_natural(18)
    GUEST_IA32_SYSENTER_EIP = _guest_natural(19)
    GUEST_IA32_S_CET = _guest_natural(20)
    GUEST_SSP = _guest_natural(21)
    GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR = _guest_natural(22)

    # Table B-15: natural-width host-state fields
    HOST_CR0 = _host_natural(0)
    HOST_CR3 = _host_natural(1)
    HOST_CR4 = _host_natural(2)
    HOST_FS_BASE = _host_natural(3)
    HOST_GS_BASE = _host_natural(4)
    HOST_TR_BASE = _host_natural(5)
    HOST_GDTR_BASE = _host_natural(6)
    HOST_IDTR_BASE = _host_natural(7)
    HOST_IA32_SYSENTER_ESP = _host_natural(8)
    HOST_IA32_SYSENTER_EIP = _host_natural(9)
    HOST_RSP = _host_natural(10)
    HOST_RIP = _host_natural(11)
    HOST_IA32_S_CET = _host_natural(12)
    HOST_SSP = _host_natural(13)
    HOST_IA32_INTERRUPT_SSP_TABLE_ADDR = _host_natural(14)

    # Aliases: what editions since FRED call the event fields. Same fields, same encodings.
    INJECTED_EVENT_IDENTIFICATION = ENTRY_INTERRUPTION_INFORMATION
    INJECTED_EVENT_ERROR_CODE = ENTRY_EXCEPTION_ERROR_CODE
    EXITING_EVENT_IDENTIFICATION = EXIT_INTERRUPTION_INFORMATION
    EXITING_EVENT_ERROR_CODE = EXIT_INTERRUPTION_ERROR_CODE
    ORIGINAL_EVENT_IDENTIFICATION = IDT_VECTORING_INFORMATION
    ORIGINAL_EVENT_ERROR_CODE = IDT_VECTORING_ERROR_CODE

    @property
    def width(self) -> FieldWidth:
        """Bits 14:13 of the encoding."""
        return FieldWidth(self >> 13 & 3)

    @property
    def type(self) -> FieldType:
        """Bits 11:10 of the encoding."""
        return FieldType(self >> 10 & 3)

    @property
    def index(self) -> int:
        """Bits 9:1 of the encoding."""
        return self >> 1 & _MAX_INDEX

    @property
    def bits(self) -> int:
        """How many bits the field has: 16, 32 or 64 (natural width is 64)."""
        return _BITS[self.width]

    @property
    def max(self) -> int:
        """The largest value that fits the field."""
        return (1 << self.bits) - 1

    @property
    def high_encoding(self) -> int:
        """The encoding that accesses bits 63:32 alone; OutOfRange for a field that is not 64 bits wide."""
        return encode(True, self.type, self.width, self.index)

    @classmethod
    def parse(cls, text: str) -> Field:
        """A field by its name (any case; '-' and blanks count as '_') or by its encoding ("0x681e", "26654").

        Raises UnknownField, with the closest names.
        """
        name = text.strip().replace("-", "_").replace(" ", "_").upper()
        if name in cls.__members__:
            return cls.__members__[name]
        try:
            encoding = int(text, 0)
        except ValueError:
            raise UnknownField(text, _close_names(name)) from None
        try:
            return cls(encoding)
        except ValueError:
            raise UnknownField(text, _close_encodings(encoding)) from None


def _close_names(name: str) -> list[str]:
    import difflib  # costs some milliseconds, and only a mistake needs it

    return difflib.get_close_matches(name, Field.__members__, n=3, cutoff=0.6)


def _close_encodings(encoding: int) -> list[str]:
    full = encoding & ~1
    if encoding & 1 and full in Field._value2member_map_ and Field(full).width is FieldWidth.U64:
        return [f"{Field(full).name} ({full:#x}; {encoding:#x} is its high half)"]
    return []
