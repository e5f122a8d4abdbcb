"""What may differ between two runs of a case that did the same: each with its reason and its section.

The SDM leaves a field of the VM-exit information undefined wherever it does not say what VM exits of that
kind write there (Vol. 3C, 28.2). Other values are the processor's clock, or where the monitor lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vmxlab.console.run import Exit, Outcome
from vmxlab.reports.disassembly import Code
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.instruction_information import InstructionInformation
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.qualifications import EptViolationQualification, IoQualification, TaskSwitchQualification
from vmxlab.sdm.qualifications.dispatch import ControlRegisterQualification, TaskSwitchSource
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector


@dataclass(frozen=True, slots=True)
class MayDiffer:
    """A reason why a value says nothing, and the section of the SDM it comes from."""

    why: str
    section: str

    def __str__(self) -> str:
        return f"{self.why} ({self.section})"


LENGTH = MayDiffer("undefined for a VM exit that no instruction caused", "Vol. 3C, 28.2.5")
INFORMATION = MayDiffer("undefined for this instruction", "Vol. 3C, 28.2.5")
INFORMATION_BITS = MayDiffer("only bits that its format leaves undefined differ", "Vol. 3C, 28.2.5")
LINEAR = MayDiffer("undefined: this VM exit has no guest-linear address", "Vol. 3C, 28.2.1")
PHYSICAL = MayDiffer("undefined: this VM exit has no guest-physical address", "Vol. 3C, 28.2.1")
QUALIFICATION_BITS = MayDiffer("only bits that are undefined here differ", "Vol. 3C, Table 28-7")
NOT_VALID = MayDiffer("bit 31 is clear: the rest is undefined", "Vol. 3C, 28.2.2 and 28.2.4")
NO_ERROR_CODE = MayDiffer("undefined: the event has no error code", "Vol. 3C, 28.2.2 and 28.2.4")
UNBLOCKING = MayDiffer("bit 12 is undefined here", "Vol. 3C, 28.2.2 and 28.2.4")
NOT_MODIFIED = MayDiffer("a VM entry that fails leaves it as it was", "Vol. 3C, 27.8")
RESUME_FLAG = MayDiffer("which RF is saved is not said for this VM exit", "Vol. 3C, 28.3.3")
ASYNCHRONOUS = MayDiffer("the event comes when it comes, wherever L2 is then", "Vol. 3C, 26.5.1 and 28.1")
TSC = MayDiffer("the time-stamp counter", "Vol. 3B, 18.17")
TIMER = MayDiffer("counts down with the time-stamp counter", "Vol. 3C, 26.5.1")
APIC_TIMER = MayDiffer("counts down with time", "Vol. 3A, 11.5.4")
COUNTER = MayDiffer("a performance counter", "Vol. 3B, 20.2")
RANDOM = MayDiffer("a random number", "Vol. 1, 7.3.17")
DEVICE = MayDiffer("what a device answers", "no rule of the SDM")
MONITOR = MayDiffer("an address of the monitor, which is another build", "no rule of the SDM")
COUNT = MayDiffer("not every processor has all fields", "Vol. 3D, Appendix B")

TABLE: tuple[MayDiffer, ...] = (
    LENGTH,
    INFORMATION,
    INFORMATION_BITS,
    LINEAR,
    PHYSICAL,
    QUALIFICATION_BITS,
    NOT_VALID,
    NO_ERROR_CODE,
    UNBLOCKING,
    NOT_MODIFIED,
    RESUME_FLAG,
    ASYNCHRONOUS,
    TSC,
    TIMER,
    APIC_TIMER,
    COUNTER,
    RANDOM,
    DEVICE,
    MONITOR,
    COUNT,
)
"""Everything that is left out, for who wants to know."""

# --- fields of VM exits -------------------------------------------------------------------------------------

# The instruction length is that of the instruction; these VM exits have none, or come after it (28.2.5).
_NO_LENGTH = frozenset(
    {
        ExitReason.EXTERNAL_INTERRUPT,
        ExitReason.TRIPLE_FAULT,
        ExitReason.INIT_SIGNAL,
        ExitReason.SIPI,
        ExitReason.IO_SMI,
        ExitReason.OTHER_SMI,
        ExitReason.INTERRUPT_WINDOW,
        ExitReason.NMI_WINDOW,
        ExitReason.ENTRY_FAILURE_GUEST_STATE,
        ExitReason.ENTRY_FAILURE_MSR_LOADING,
        ExitReason.ENTRY_FAILURE_MACHINE_CHECK,
        ExitReason.MONITOR_TRAP_FLAG,
        ExitReason.TPR_BELOW_THRESHOLD,
        ExitReason.VIRTUALIZED_EOI,
        ExitReason.EPT_MISCONFIGURATION,
        ExitReason.PREEMPTION_TIMER,
        ExitReason.APIC_WRITE,
        ExitReason.PML_FULL,
        ExitReason.SPP,
        ExitReason.BUS_LOCK,
        ExitReason.INSTRUCTION_TIMEOUT,
    }
)
_BY_DELIVERY_ONLY = frozenset(
    {ExitReason.EXCEPTION_OR_NMI, ExitReason.APIC_ACCESS, ExitReason.EPT_VIOLATION, *_NO_LENGTH}
)
_SOFTWARE = frozenset(
    {
        InterruptionType.SOFTWARE_INTERRUPT,
        InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION,
        InterruptionType.SOFTWARE_EXCEPTION,
    }
)
_WITH_PHYSICAL = frozenset({ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION, ExitReason.SPP})
_WHENEVER = frozenset(
    {
        ExitReason.EXTERNAL_INTERRUPT,
        ExitReason.INIT_SIGNAL,
        ExitReason.SIPI,
        ExitReason.PREEMPTION_TIMER,
        ExitReason.INSTRUCTION_TIMEOUT,
    }
)
_NMI_UNBLOCKING = 1 << 12
_RF = 1 << 16
_EPT_BIT_8 = 1 << 8
_EPT_ADVANCED = 7 << 9


def length_is_defined(exit: Exit) -> bool:
    """Whether the VM-exit instruction length is (28.2.5)."""
    if exit.idt_vectoring.valid and exit.idt_vectoring.type in _SOFTWARE:
        return True
    if exit.interruption.valid and exit.interruption.type in _SOFTWARE:
        return True
    if isinstance(exit.qualification, TaskSwitchQualification):
        return exit.qualification.source is not TaskSwitchSource.TASK_GATE
    return exit.reason not in _BY_DELIVERY_ONLY


def information_is_defined(exit: Exit) -> bool:
    """Whether the VM-exit instruction information is (28.2.5)."""
    if isinstance(exit.qualification, IoQualification):
        return exit.qualification.string
    return type(exit.instruction_information) is not InstructionInformation


def linear_is_defined(exit: Exit) -> bool:
    """Whether the guest-linear address is (28.2.1)."""
    match exit.qualification:
        case EptViolationQualification(guest_linear_valid=valid):
            return valid
        case IoQualification(string=string):
            return string
        case ControlRegisterQualification(lmsw_memory_operand=memory):
            return memory
    return exit.reason in (ExitReason.IO_SMI, ExitReason.SPP)


def _length(one: Exit, other: Exit) -> MayDiffer | None:
    return None if length_is_defined(one) or length_is_defined(other) else LENGTH


def _information(one: Exit, other: Exit) -> MayDiffer | None:
    if not (information_is_defined(one) or information_is_defined(other)):
        return INFORMATION
    same = one.instruction_information.describe() == other.instruction_information.describe()
    return INFORMATION_BITS if same else None


def _linear(one: Exit, other: Exit) -> MayDiffer | None:
    return None if linear_is_defined(one) or linear_is_defined(other) else LINEAR


def _physical(one: Exit, other: Exit) -> MayDiffer | None:
    return None if one.reason in _WITH_PHYSICAL else PHYSICAL


def _qualification(one: Exit, other: Exit) -> MayDiffer | None:
    """Bit 8 of an EPT violation needs bit 7, and bits 11:9 need both (and a processor that has them)."""
    if one.reason is not ExitReason.EPT_VIOLATION:
        return None
    undefined = 0
    for exit in (one, other):
        qualification = exit.qualification
        assert isinstance(qualification, EptViolationQualification)
        if not qualification.guest_linear_valid:
            undefined |= _EPT_BIT_8 | _EPT_ADVANCED
        elif not qualification.translated:
            undefined |= _EPT_ADVANCED
    same = not (one.raw_qualification ^ other.raw_qualification) & ~undefined
    return QUALIFICATION_BITS if same else None


def _event(one: InterruptionInformation, other: InterruptionInformation, undefined: int) -> MayDiffer | None:
    if not one.valid and not other.valid:
        return NOT_VALID
    return UNBLOCKING if not (one.bits ^ other.bits) & ~undefined else None


def _interruption(one: Exit, other: Exit) -> MayDiffer | None:
    """Bit 12 is undefined for a double fault, and for a VM exit during event delivery (28.2.3)."""
    undefined = any(e.idt_vectoring.valid or e.interruption.vector == Vector.DF for e in (one, other))
    return _event(one.interruption, other.interruption, _NMI_UNBLOCKING if undefined else 0)


def _vectoring(one: Exit, other: Exit) -> MayDiffer | None:
    return _event(one.idt_vectoring, other.idt_vectoring, _NMI_UNBLOCKING)


def _has_code(information: InterruptionInformation) -> bool:
    return information.valid and information.error_code_valid


def _interruption_code(one: Exit, other: Exit) -> MayDiffer | None:
    return None if _has_code(one.interruption) or _has_code(other.interruption) else NO_ERROR_CODE


def _vectoring_code(one: Exit, other: Exit) -> MayDiffer | None:
    return None if _has_code(one.idt_vectoring) or _has_code(other.idt_vectoring) else NO_ERROR_CODE


def _rflags(one: Exit, other: Exit) -> MayDiffer | None:
    unclear = one.reason is ExitReason.TRIPLE_FAULT
    return RESUME_FLAG if unclear and not (one.rflags ^ other.rflags) & ~_RF else None


_EXIT_RULES: Mapping[str, Callable[[Exit, Exit], MayDiffer | None]] = {
    "raw_qualification": _qualification,
    "instruction_length": _length,
    "raw_instruction_information": _information,
    "guest_linear_address": _linear,
    "guest_physical_address": _physical,
    "raw_interruption_information": _interruption,
    "interruption_error_code": _interruption_code,
    "raw_idt_vectoring_information": _vectoring,
    "idt_vectoring_error_code": _vectoring_code,
    "rflags": _rflags,
}
_BY_FIELD: Mapping[Field, str] = {
    Field.EXIT_QUALIFICATION: "raw_qualification",
    Field.EXIT_INSTRUCTION_LENGTH: "instruction_length",
    Field.EXIT_INSTRUCTION_INFORMATION: "raw_instruction_information",
    Field.GUEST_LINEAR_ADDRESS: "guest_linear_address",
    Field.GUEST_PHYSICAL_ADDRESS: "guest_physical_address",
    Field.EXIT_INTERRUPTION_INFORMATION: "raw_interruption_information",
    Field.EXIT_INTERRUPTION_ERROR_CODE: "interruption_error_code",
    Field.IDT_VECTORING_INFORMATION: "raw_idt_vectoring_information",
    Field.IDT_VECTORING_ERROR_CODE: "idt_vectoring_error_code",
    Field.GUEST_RFLAGS: "rflags",
    Field.GUEST_RIP: "rip",
    Field.GUEST_RSP: "rsp",
}


def of_exit(attribute: str | Field | int, one: Exit, other: Exit) -> MayDiffer | None:
    """Why an attribute, a register or a watched field of two exits for the same reason may differ."""
    name = _BY_FIELD.get(attribute, attribute) if isinstance(attribute, Field) else attribute
    state = name in ("rip", "rflags") or name in GENERAL_REGISTERS
    if one.reason in _WHENEVER and state:
        return ASYNCHRONOUS
    if one.entry_failed and name != "raw_qualification" and (name in _EXIT_RULES) and not state:
        return NOT_MODIFIED
    rule = _EXIT_RULES.get(name) if isinstance(name, str) else None
    return rule(one, other) if rule is not None else of_timer(name)


def of_timer(name: str | Field | int) -> MayDiffer | None:
    """Why the value of the VMX-preemption timer may differ: it is so many ticks of that processor."""
    return TIMER if name is Field.VMX_PREEMPTION_TIMER_VALUE else None


# --- what L2 reads ------------------------------------------------------------------------------------------

_CLOCKS: Mapping[str, tuple[MayDiffer, tuple[str, ...]]] = {
    "rdtsc": (TSC, ("rax", "rdx")),
    "rdtscp": (TSC, ("rax", "rdx")),
    "rdpmc": (COUNTER, ("rax", "rdx")),
    "rdrand": (RANDOM, ()),
    "rdseed": (RANDOM, ()),
    "in": (DEVICE, ("rax",)),
}


@dataclass(frozen=True, slots=True)
class Clock:
    """An instruction of L2 that reads what is never the same: its linear address, and what it writes."""

    address: int
    why: MayDiffer
    registers: tuple[str, ...]


def clocks_of(code: Code | None) -> tuple[Clock, ...]:
    """All such instructions in a case's code, in whichever order L2 comes to them."""
    return tuple(_clocks(code)) if code is not None else ()


def _clocks(code: Code) -> Iterator[Clock]:
    for address, text in code.listing():
        mnemonic, _, operand = text.partition(" ")
        if mnemonic in _CLOCKS:
            why, registers = _CLOCKS[mnemonic]
            yield Clock(address, why, registers or tuple(_whole(operand)))


def _whole(operand: str) -> Iterator[str]:
    """The general register that one is a part of: rax for eax and ax, r9 for r9d."""
    for name in GENERAL_REGISTERS:
        parts = (name, f"{name}d", f"{name}w") if name[1].isdigit() else (name, f"e{name[1:]}", name[1:])
        if operand in parts:
            yield name


@dataclass(slots=True)
class ClockReader:
    """Follows L2 from exit to exit: which registers hold what such an instruction read.

    L2 counts as having come past an instruction where it lies between one exit's RIP and the next one's, or
    where L2 jumped back. A register that has changed since holds something else, perhaps made of it, and that
    is for a person to judge; one that has the same value as such a register, in both runs, is a copy.
    """

    clocks: tuple[Clock, ...]
    cs_base: int = 0
    holding: dict[str, MayDiffer] = field(default_factory=dict)
    _before: Exit | None = None
    _other_before: Exit | None = None

    def follow(self, one: Exit, other: Exit) -> None:
        """The next exit of both runs."""
        kept = {
            name: why
            for name, why in self.holding.items()
            if _keeps(name, self._before, one) and _keeps(name, self._other_before, other)
        }
        start = -1 if self._before is None else self._before.rip + self.cs_base
        end = one.rip + self.cs_base
        for clock in self.clocks:
            if start <= clock.address < end or (end <= start and clock.address != end):
                kept |= dict.fromkeys(clock.registers, clock.why)
        copies = {name: why for held, why in kept.items() for name in _copies(held, one, other)}
        self.holding, self._before, self._other_before = copies | kept, one, other


def _copies(held: str, one: Exit, other: Exit) -> Iterator[str]:
    values = [exit.registers.get(held) for exit in (one, other)]
    for name in one.registers:
        if [exit.registers.get(name) for exit in (one, other)] == values:
            yield name


def _keeps(register: str, before: Exit | None, now: Exit) -> bool:
    return before is not None and before.registers.get(register) == now.registers.get(register)


# --- what L1 reads ------------------------------------------------------------------------------------------

_CLOCK_MSRS: Mapping[int, MayDiffer] = {
    Msr.IA32_TSC: TSC,
    Msr.IA32_TSC_DEADLINE: TSC,
    Msr.IA32_MPERF: COUNTER,
    Msr.IA32_APERF: COUNTER,
}


def of_value_read(outcome: Outcome) -> MayDiffer | None:
    """Why the value that an instruction of L1 read may differ."""
    if outcome.field is Field.VMX_PREEMPTION_TIMER_VALUE:
        return TIMER
    if outcome.register is ApicRegister.CURRENT_COUNT:
        return APIC_TIMER
    return None if outcome.msr is None else of_msr(outcome.msr)


def of_msr(number: int) -> MayDiffer | None:
    """Why the value of an MSR may differ."""
    return _CLOCK_MSRS.get(number)


def of_address(name: Field | int) -> MayDiffer | None:
    """Why a field may differ where the monitors are two builds: it points into the monitor."""
    if not isinstance(name, Field) or name.type is not FieldType.HOST_STATE:
        return None
    names = ("HOST_RIP", "HOST_RSP", "HOST_CR3", "HOST_TR_BASE", "HOST_GDTR_BASE", "HOST_IDTR_BASE")
    return MONITOR if name.name in names else None
