"""What came back from a case: outcomes of VMX instructions, exits, the end; and the verdict on it.

A run is made of records alone (`vmxlab.console.rebuild`): one that is read again from a log is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vmxlab.cases.case import Case
from vmxlab.console.records import Record
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason, basic_reason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.instruction_information import InstructionInformation, decode_instruction_information
from vmxlab.sdm.interruption import InterruptionInformation
from vmxlab.sdm.qualifications import PlainQualification, Qualification, decode_qualification
from vmxlab.sdm.registers import Vector

if TYPE_CHECKING:
    from vmxlab.console.check import Difference
    from vmxlab.image.compiler import CompiledCase
    from vmxlab.oracle.entry import Broken


class Verdict(Enum):
    """The five verdicts. Never mixed."""

    PASS = "pass"
    FAIL = "fail"
    """The target did something else than was expected."""
    SKIP = "skip"
    """The processor lacks what the case needs."""
    ERROR = "error"
    """Our own fault, or the case's."""
    CRASH = "crash"
    """The target died, or stopped answering."""


class OutcomeKind(Enum):
    """How a VMX instruction ended (SDM Vol. 3C, 31.2), or the fault that it raised."""

    SUCCEED = "ok"
    FAIL_INVALID = "invalid"
    FAIL_VALID = "valid"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one instruction of L1.

    `operation`: "vmxon", "vmwrite", ... `error`: the VM-instruction error of a VMfailValid. `vector` and
    `error_code`: of a fault. `field`, `msr`, `register` (of the local APIC): what was accessed, where it was
    one. `value`: what was read.
    `count`: of a batch of VMWRITEs, how many succeeded.
    """

    operation: str
    kind: OutcomeKind
    error: InstructionError | int | None = None
    vector: Vector | int | None = None
    error_code: int | None = None
    field: Field | int | None = None
    msr: int | None = None
    value: int | None = None
    count: int | None = None
    register: ApicRegister | int | None = None

    @property
    def ok(self) -> bool:
        """VMsucceed."""
        return self.kind is OutcomeKind.SUCCEED

    def __str__(self) -> str:
        what = self.operation.upper()
        if self.field is not None:
            what += f" {_name(self.field)}"
        if self.count is not None:
            what += f" of {self.count} fields"
        match self.kind:
            case OutcomeKind.SUCCEED:
                return f"{what}: VMsucceed"
            case OutcomeKind.FAIL_INVALID:
                return f"{what}: VMfailInvalid"
            case OutcomeKind.FAIL_VALID:
                text = self.error.description if isinstance(self.error, InstructionError) else "unknown"
                return f"{what}: VMfailValid({int(self.error or 0)}: {text})"
            case OutcomeKind.FAULT:
                return f"{what}: #{_name(self.vector)}({self.error_code or 0:#x})"


@dataclass(frozen=True)
class Exit:
    """One VM exit, as the VM-exit information fields and L2's registers describe it.

    `number` counts from 0 in the case. A field that the record left out is 0.
    """

    number: int
    full_reason: int
    raw_qualification: int = 0
    instruction_length: int = 0
    raw_instruction_information: int = 0
    guest_linear_address: int = 0
    guest_physical_address: int = 0
    raw_interruption_information: int = 0
    interruption_error_code: int = 0
    raw_idt_vectoring_information: int = 0
    idt_vectoring_error_code: int = 0
    rip: int = 0
    rflags: int = 0
    registers: Mapping[str, int] = field(default_factory=dict)
    """All sixteen general registers of L2."""
    watched: Mapping[Field | int, int] = field(default_factory=dict)
    """The fields that the case asked for."""

    @cached_property
    def reason(self) -> ExitReason | int:
        """The basic exit reason; a plain number where the SDM has no name for it."""
        return basic_reason(self.full_reason)

    @property
    def entry_failed(self) -> bool:
        """Bit 31 of the exit reason: this is a VM-entry failure, L2 did not run (SDM Vol. 3C, 27.8)."""
        return bool(self.full_reason & ENTRY_FAILURE_BIT)

    @cached_property
    def interruption(self) -> InterruptionInformation:
        """VM-exit interruption information."""
        return InterruptionInformation.from_bits(self.raw_interruption_information)

    @cached_property
    def idt_vectoring(self) -> InterruptionInformation:
        """IDT-vectoring information."""
        return InterruptionInformation.from_bits(self.raw_idt_vectoring_information)

    @cached_property
    def qualification(self) -> Qualification:
        """The exit qualification, decoded by the exit reason: the attributes are those of its class."""
        vector = self.interruption.vector if self.interruption.valid else None
        return decode_qualification(self.reason, self.raw_qualification, vector)

    @cached_property
    def instruction_information(self) -> InstructionInformation:
        """The VM-exit instruction information, decoded by the exit reason."""
        return decode_instruction_information(self.reason, self.raw_instruction_information)

    @property
    def reason_name(self) -> str:
        """ "IO_INSTRUCTION", or "reason 200"."""
        return _name(self.reason, "reason ")

    def __str__(self) -> str:
        failed = "VM-entry failure, " if self.entry_failed else ""
        words = self.describe()
        return f"exit {self.number}: {failed}{self.reason_name}{words and ', ' + words}, RIP {self.rip:#x}"

    def describe(self) -> str:
        """The exit qualification in words, with the event that caused the exit where there is one."""
        words = [self.interruption.describe()] if self.interruption.valid else []
        if self.raw_qualification or not isinstance(self.qualification, PlainQualification):
            words.append(self.qualification.describe())
        return "; ".join(words)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in L1 that no VMX instruction raised: the monitor reported it and lived on."""

    vector: Vector | int
    error_code: int
    rip: int
    cr2: int

    def __str__(self) -> str:
        return f"#{_name(self.vector)}({self.error_code:#x}) in L1 at {self.rip:#x}, CR2 {self.cr2:#x}"


class End(Enum):
    """Why a case ended, in the monitor's words; the last two are the host's."""

    STOP = "stop"
    """An exit whose reaction is to stop."""
    DONE = "done"
    """All steps were taken, and none was an entry."""
    LIMIT = "limit"
    """Limits.exits was reached."""
    VMFAIL = "vmfail"
    """A VMX instruction failed."""
    FAULT = "fault"
    """A fault in L1."""
    SCRIPT = "script"
    """The monitor could not read the case (our own fault)."""
    DIED = "died"
    """The machine died before the case's end."""
    HUNG = "hung"
    """Nothing arrived before the deadline."""


@dataclass(frozen=True)
class Run:
    """What a case did on a machine.

    `case` is None for a run read from a log. `error` is why there is no result, with verdicts SKIP, ERROR
    and CRASH.
    """

    case: Case | None
    number: int
    outcomes: tuple[Outcome, ...] = ()
    exits: tuple[Exit, ...] = ()
    memory: Mapping[int, bytes] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    end: End | None = None
    name: str = ""
    engine: str = ""
    log_path: Path | None = None
    records: tuple[Record, ...] = ()
    error: Exception | None = None
    verdict_on_error: Verdict | None = None
    failed_vmcs: Mapping[Field, int] = field(default_factory=dict)
    """What the VMCS held when the last VM entry failed that did; empty where none did."""
    by_need: str = ""
    """Why it ran on another processor model than the engine's default one; empty where it did not."""
    compiled: CompiledCase | None = field(default=None, compare=False, repr=False)
    """The case as the monitor got it; None for a run read from a log."""

    def check(self) -> tuple[Difference, ...]:
        """What is not as the SDM says, field by field; empty where all is (`vmxlab.console.check`).

        Raises CaseError for a run read from a log.
        """
        from vmxlab.console.check import check

        return check(self)

    def broken_rules(self) -> tuple[Broken, ...]:
        """The rules of VM entry that the VMCS of the last failed VM entry broke (SDM Vol. 3C, chapter 27).

        Empty where no VM entry failed, and for a run read from a log, which does not hold the processor.
        """
        from vmxlab.oracle.entry import check_entry
        from vmxlab.oracle.entry.of_case import environment_of

        if not self.failed_vmcs or self.compiled is None:
            return ()
        return check_entry(self.failed_vmcs, environment_of(self.compiled)).broken

    @property
    def reasons(self) -> list[ExitReason | int]:
        """The basic exit reasons, in order."""
        return [e.reason for e in self.exits]

    @property
    def entry(self) -> Outcome | None:
        """The outcome of the (last) VMLAUNCH or VMRESUME that was reported; None where there was none."""
        return next((o for o in reversed(self.outcomes) if o.operation in ("vmlaunch", "vmresume")), None)

    def outcome(self, operation: str) -> Outcome:
        """The first outcome of `operation` ("vmxon", "vmptrld", ...). KeyError where there is none."""
        for outcome in self.outcomes:
            if outcome.operation == operation:
                return outcome
        raise KeyError(
            f"the run has no outcome of {operation!r}; it has {[o.operation for o in self.outcomes]}"
        )

    @property
    def verdict(self) -> Verdict:
        """PASS or FAIL, where the case ran to an end (see `difference`); else what stopped it."""
        if self.verdict_on_error is not None:
            return self.verdict_on_error
        if self.end in (End.DIED, End.HUNG, None):
            return Verdict.CRASH
        if self.end is End.SCRIPT:
            return Verdict.ERROR
        return Verdict.FAIL if self.difference() else Verdict.PASS

    def difference(self) -> str | None:
        """What differs from the case's `expect`; None where nothing does.

        Of a case that expects nothing: that a VMX instruction failed which was not told to `go_on`, or that
        L1 took a fault.
        """
        if self.case is None or self.case.expect is None:
            return self._failure()
        expected, seen = list(self.case.expect), self.reasons
        for index in range(max(len(expected), len(seen))):
            want = _name(basic_reason(expected[index])) if index < len(expected) else "no more exits"
            have = (
                _name(seen[index])
                if index < len(seen)
                else f"the end ({self.end.value if self.end else '-'})"
            )
            if want != have:
                return f"exit {index}: expected {want}, seen {have}"
        return None

    def _failure(self) -> str | None:
        if self.end is End.VMFAIL:
            return next((str(outcome) for outcome in reversed(self.outcomes) if not outcome.ok), None)
        if self.end is End.FAULT and self.faults:
            return str(self.faults[-1])
        return None


def _name(value: object, prefix: str = "") -> str:
    name = getattr(value, "name", None)
    if name:
        return str(name)
    return f"{prefix}{value:#x}" if isinstance(value, int) else str(value)
