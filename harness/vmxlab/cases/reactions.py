"""What a case tells the monitor to do on an exit.

    on(ExitReason.CPUID).set("rax", 0x16).skip()
    on(ExitReason.EPT_VIOLATION).write(entry_address, entry).invept().resume()
    on(ExitReason.IO_INSTRUCTION, qualification=port_is(0x60)).stop()

A reaction is for one exit reason, optionally narrowed by bits of the exit qualification and by which matches
it is for. On an exit the first reaction that matches is carried out; where none does, the default of the exit
reason is (`DEFAULT_ACTIONS`). Reactions are values: each method returns a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vmxlab.errors import CaseError, OutOfRange
from vmxlab.sdm.apic import ApicRegister, require_apic_register
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS

U64_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SetRegister:
    """Set a general register of L2."""

    name: str
    value: int

    def __post_init__(self) -> None:
        if self.name not in GENERAL_REGISTERS:
            raise CaseError(
                f"there is no general register {self.name!r}", advice=f"one of {', '.join(GENERAL_REGISTERS)}"
            )
        if not 0 <= self.value <= U64_MAX:
            raise OutOfRange(f"register {self.name}", self.value, "64 bits")


@dataclass(frozen=True, slots=True)
class SetField:
    """VMWRITE a field of the VMCS."""

    field: Field
    value: int

    def __post_init__(self) -> None:
        require_field_value(self.field, self.value)


@dataclass(frozen=True, slots=True)
class SetMemory:
    """Write to the machine's memory, by its (L1-physical) address."""

    address: int
    data: bytes

    def __post_init__(self) -> None:
        _require_width("machine address", self.address, 64)


@dataclass(frozen=True, slots=True)
class InveptAction:
    """Execute INVEPT: a changed EPT entry is seen only after it (SDM Vol. 3C, 29.4.3.1)."""

    type: int
    eptp: int | None = None

    def __post_init__(self) -> None:
        _require_width("INVEPT type", self.type, 64)
        _require_width("EPTP", self.eptp or 0, 64)


@dataclass(frozen=True, slots=True)
class WriteApic:
    """Write a register of L1's local APIC."""

    register: int
    value: int

    def __post_init__(self) -> None:
        require_apic_register(self.register)
        _require_width("value of an APIC register", self.value, 32)


@dataclass(frozen=True, slots=True)
class Skip:
    """Go on behind the instruction that exited."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on at the guest RIP as it is."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the entry; the case's next step follows."""


Act = SetRegister | SetField | SetMemory | InveptAction | WriteApic | Skip | Resume | Stop


def _require_width(what: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise OutOfRange(what, value, f"{bits} bits")


def require_field_value(field: Field, value: int) -> None:
    """Raise OutOfRange where `value` has more bits than `field`."""
    if not 0 <= value <= field.max:
        raise OutOfRange(f"VMCS field {field.name}", value, f"the field has {field.bits} bits")


@dataclass(frozen=True, slots=True)
class Reaction:
    """For which exits, and what then. Made with `on`."""

    reason: int
    qualification_mask: int = 0
    qualification_value: int = 0
    from_match: int = 0
    match_count: int = 0
    actions: tuple[Act, ...] = field(default=())

    def __post_init__(self) -> None:
        _require_width("basic exit reason", self.reason, 16)
        _require_width("exit qualification mask", self.qualification_mask, 64)
        _require_width("exit qualification", self.qualification_value, 64)
        _require_width("first match", self.from_match, 32)
        _require_width("number of matches", self.match_count, 32)
        if self.qualification_value & ~self.qualification_mask:
            raise CaseError(
                f"qualification value {self.qualification_value:#x} has bits outside its mask "
                f"{self.qualification_mask:#x}: it could never match"
            )

    def _and(self, action: Act) -> Reaction:
        if self.actions and isinstance(self.actions[-1], Stop):
            raise CaseError("a reaction does nothing after stop()")
        return replace(self, actions=(*self.actions, action))

    def set(self, register: str, value: int) -> Reaction:
        """Set a general register of L2 ("rax" to "r15"; 64 bits)."""
        return self._and(SetRegister(register, value))

    def vmwrite(self, field: Field | str, value: int) -> Reaction:
        """Write a VMCS field, by name or as a Field."""
        return self._and(SetField(Field.parse(field) if isinstance(field, str) else field, value))

    def write(self, address: int, data: bytes) -> Reaction:
        """Write `data` at the machine's address `address`."""
        return self._and(SetMemory(address, bytes(data)))

    def invept(self, type: int = 1, eptp: int | None = None) -> Reaction:
        """INVEPT, single-context on the case's EPTP unless said otherwise."""
        return self._and(InveptAction(type, eptp))

    def apic_write(self, register: ApicRegister | int, value: int) -> Reaction:
        """Write a 32-bit register of L1's local APIC, such as its EOI; undone at the end of the case."""
        return self._and(WriteApic(int(register), value))

    def inject(
        self, interruption: int, *, error_code: int | None = None, length: int | None = None
    ) -> Reaction:
        """Have the next VM entry inject an event, by its raw VM-entry interruption information."""
        reaction = self.vmwrite(Field.ENTRY_INTERRUPTION_INFORMATION, interruption)
        if error_code is not None:
            reaction = reaction.vmwrite(Field.ENTRY_EXCEPTION_ERROR_CODE, error_code)
        if length is not None:
            reaction = reaction.vmwrite(Field.ENTRY_INSTRUCTION_LENGTH, length)
        return reaction

    def skip(self) -> Reaction:
        """Go on behind the instruction."""
        return self._and(Skip())

    def resume(self) -> Reaction:
        """Go on where L2 is."""
        return self._and(Resume())

    def stop(self) -> Reaction:
        """End here."""
        return self._and(Stop())


def on(
    reason: ExitReason | int,
    *,
    qualification: tuple[int, int] | None = None,
    first: int = 0,
    times: int = 0,
) -> Reaction:
    """Start a reaction to exits of `reason`.

    `qualification` is (mask, value): only exits whose qualification has these bits. `first` and `times`
    choose among the exits that match, counted from 0 whether or not another reaction answered them: it is
    for those from `first` on, and for `times` of them; 0 is all.
    """
    mask, value = qualification or (0, 0)
    return Reaction(int(reason), mask, value, first, times)


def port_is(port: int) -> tuple[int, int]:
    """The (mask, value) of an I/O exit's qualification for one port (SDM Vol. 3C, table 28-5, bits 31:16)."""
    if not 0 <= port <= 0xFFFF:
        raise OutOfRange("I/O port", port, "0 to 0xffff")
    return 0xFFFF_0000, port << 16


_SKIPPED = (
    ExitReason.CPUID,
    ExitReason.GETSEC,
    ExitReason.INVD,
    ExitReason.INVLPG,
    ExitReason.RDPMC,
    ExitReason.RDTSC,
    ExitReason.VMCALL,
    ExitReason.VMCLEAR,
    ExitReason.VMLAUNCH,
    ExitReason.VMPTRLD,
    ExitReason.VMPTRST,
    ExitReason.VMREAD,
    ExitReason.VMRESUME,
    ExitReason.VMWRITE,
    ExitReason.VMXOFF,
    ExitReason.VMXON,
    ExitReason.CONTROL_REGISTER_ACCESS,
    ExitReason.MOV_DR,
    ExitReason.IO_INSTRUCTION,
    ExitReason.RDMSR,
    ExitReason.WRMSR,
    ExitReason.MWAIT,
    ExitReason.MONITOR,
    ExitReason.PAUSE,
    ExitReason.GDTR_IDTR_ACCESS,
    ExitReason.LDTR_TR_ACCESS,
    ExitReason.INVEPT,
    ExitReason.RDTSCP,
    ExitReason.INVVPID,
    ExitReason.WBINVD,
    ExitReason.XSETBV,
    ExitReason.RDRAND,
    ExitReason.INVPCID,
    ExitReason.VMFUNC,
    ExitReason.RDSEED,
    ExitReason.XSAVES,
    ExitReason.XRSTORS,
    ExitReason.UMWAIT,
    ExitReason.TPAUSE,
)

DEFAULT_ACTIONS: Mapping[int, type[Skip] | type[Resume] | type[Stop]] = {
    int(reason): Skip for reason in _SKIPPED
}
"""Instructions that exit are skipped: L2 goes on with its registers as they were. HLT and all else stop."""
