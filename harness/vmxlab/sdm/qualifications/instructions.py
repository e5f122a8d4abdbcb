"""Exit qualifications of instructions: I/O, control and debug registers, MSRs, displacements, and others.

SDM Vol. 3C, 28.2.1, with Tables 28-3 (control registers), 28-4 (MOV DR), 28-5 (I/O).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmxlab.sdm.qualifications.base import Qualification, bit, bits, register_name, signed64, with_notes


@dataclass(frozen=True, slots=True)
class IoQualification(Qualification):
    """Table 28-5.

    `size` is in bytes: 1, 2 or 4. The field holds it less one, and the manual uses no other value; a
    processor that gives one anyway shows up here as an impossible size, not as a plausible one.
    `immediate_operand` tells IN AL, 60H from IN AL, DX.
    """

    size: int
    direction_in: bool
    string: bool
    rep: bool
    immediate_operand: bool
    port: int

    @classmethod
    def decode(cls, raw: int) -> IoQualification:
        """From the field."""
        return cls(
            raw,
            size=bits(raw, 2, 0) + 1,
            direction_in=bit(raw, 3),
            string=bit(raw, 4),
            rep=bit(raw, 5),
            immediate_operand=bit(raw, 6),
            port=bits(raw, 31, 16),
        )

    @property
    def is_in(self) -> bool:
        """Whether it is IN or INS, not OUT or OUTS."""
        return self.direction_in

    def describe(self) -> str:
        """Such as "IN port 0x60, 1 byte" or "REP OUTS port 0x3f8, 4 bytes"."""
        name = ("REP " if self.rep else "") + ("IN" if self.is_in else "OUT") + ("S" if self.string else "")
        return f"{name} port {self.port:#x}, {self.size} byte{'' if self.size == 1 else 's'}"


class CrAccessType(IntEnum):
    """Bits 5:4 of Table 28-3."""

    MOV_TO_CR = 0
    MOV_FROM_CR = 1
    CLTS = 2
    LMSW = 3


@dataclass(frozen=True, slots=True)
class ControlRegisterQualification(Qualification):
    """Table 28-3. `cr` is the number of the control register (0 for CLTS and LMSW), `register` the index into
    GENERAL_REGISTERS (for MOV), `lmsw_source` the 16-bit operand of LMSW."""

    cr: int
    access_type: CrAccessType
    lmsw_memory_operand: bool
    register: int
    lmsw_source: int

    @classmethod
    def decode(cls, raw: int) -> ControlRegisterQualification:
        """From the field."""
        return cls(
            raw,
            cr=bits(raw, 3, 0),
            access_type=CrAccessType(bits(raw, 5, 4)),
            lmsw_memory_operand=bit(raw, 6),
            register=bits(raw, 11, 8),
            lmsw_source=bits(raw, 31, 16),
        )

    def describe(self) -> str:
        """Such as "MOV to CR0 from rax" or "LMSW 0x1, memory operand"."""
        match self.access_type:
            case CrAccessType.MOV_TO_CR:
                return f"MOV to CR{self.cr} from {register_name(self.register)}"
            case CrAccessType.MOV_FROM_CR:
                return f"MOV from CR{self.cr} to {register_name(self.register)}"
            case CrAccessType.CLTS:
                return "CLTS"
            case _:
                return with_notes(f"LMSW {self.lmsw_source:#x}", (self.lmsw_memory_operand, "memory operand"))


@dataclass(frozen=True, slots=True)
class DebugRegisterQualification(Qualification):
    """Table 28-4. `dr` is the number of the debug register, `from_dr` the direction, `register` the index
    into GENERAL_REGISTERS."""

    dr: int
    from_dr: bool
    register: int

    @classmethod
    def decode(cls, raw: int) -> DebugRegisterQualification:
        """From the field."""
        return cls(raw, bits(raw, 2, 0), bit(raw, 4), bits(raw, 11, 8))

    def describe(self) -> str:
        """Such as "MOV to DR7 from rax"."""
        name = register_name(self.register)
        return f"MOV from DR{self.dr} to {name}" if self.from_dr else f"MOV to DR{self.dr} from {name}"


@dataclass(frozen=True, slots=True)
class InvlpgQualification(Qualification):
    """INVLPG: the linear address of its operand."""

    linear_address: int

    @classmethod
    def decode(cls, raw: int) -> InvlpgQualification:
        """From the field."""
        return cls(raw, raw)

    def describe(self) -> str:
        """Such as "linear address 0x401000"."""
        return f"linear address {self.linear_address:#x}"


@dataclass(frozen=True, slots=True)
class DisplacementQualification(Qualification):
    """An instruction with a memory operand: its displacement, sign-extended.

    For RIP-relative addressing the processor has added RIP of the next instruction. Bits beyond the
    instruction's address size are undefined.
    """

    displacement: int

    @classmethod
    def decode(cls, raw: int) -> DisplacementQualification:
        """From the field."""
        return cls(raw, signed64(raw))

    def describe(self) -> str:
        """Such as "displacement 0x10" or "displacement -0x8"."""
        return f"displacement {self.displacement:#x}"


@dataclass(frozen=True, slots=True)
class InvalidationQualification(DisplacementQualification):
    """INVEPT, INVPCID, INVVPID: the displacement of the descriptor's address."""

    @classmethod
    def decode(cls, raw: int) -> InvalidationQualification:
        """From the field."""
        return cls(raw, signed64(raw))


@dataclass(frozen=True, slots=True)
class MwaitQualification(Qualification):
    """MWAIT: whether address-range monitoring was armed."""

    armed: bool

    @classmethod
    def decode(cls, raw: int) -> MwaitQualification:
        """From the field."""
        return cls(raw, bit(raw, 0))

    def describe(self) -> str:
        """Either "monitoring armed" or "monitoring not armed"."""
        return "monitoring armed" if self.armed else "monitoring not armed"


@dataclass(frozen=True, slots=True)
class WbinvdQualification(Qualification):
    """WBINVD and WBNOINVD, which share a basic reason: 0 and 1."""

    no_invalidate: bool

    @classmethod
    def decode(cls, raw: int) -> WbinvdQualification:
        """From the field."""
        return cls(raw, raw == 1)

    def describe(self) -> str:
        """The instruction."""
        return "WBNOINVD" if self.no_invalidate else "WBINVD"


@dataclass(frozen=True, slots=True)
class WrmsrQualification(Qualification):
    """WRMSR and WRMSRNS, which share a basic reason: 0 and 1. The MSR's address is in ECX, not here."""

    non_serializing: bool

    @classmethod
    def decode(cls, raw: int) -> WrmsrQualification:
        """From the field."""
        return cls(raw, raw == 1)

    def describe(self) -> str:
        """The instruction."""
        return "WRMSRNS" if self.non_serializing else "WRMSR"


@dataclass(frozen=True, slots=True)
class MsrQualification(Qualification):
    """The address of the MSR, for RDMSRLIST and WRMSRLIST (0 where MSR bitmaps aren't used) and for the
    instructions that name their MSR in an operand other than ECX."""

    msr: int

    @classmethod
    def decode(cls, raw: int) -> MsrQualification:
        """From the field."""
        return cls(raw, raw)

    def describe(self) -> str:
        """Such as "MSR 0xc0000080"."""
        return f"MSR {self.msr:#x}"


@dataclass(frozen=True, slots=True)
class PasidQualification(Qualification):
    """ENQCMD (IA32_PASID[19:0]) and ENQCMDS (the low 32 bits of its source operand): the PASID that wasn't
    translated, which is bits 19:0 of both."""

    pasid: int

    @classmethod
    def decode(cls, raw: int) -> PasidQualification:
        """From the field."""
        return cls(raw, bits(raw, 19, 0))

    def describe(self) -> str:
        """Such as "PASID 0x12"."""
        return f"PASID {self.pasid:#x}"
