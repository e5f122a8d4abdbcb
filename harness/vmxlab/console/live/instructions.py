"""Instructions of L1 on a live machine: VMX instructions, RDMSR, WRMSR, CPUID."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmxlab.cases.case import as_field
from vmxlab.cases.reactions import require_field_value
from vmxlab.console.live.link import LiveLink, last_outcome
from vmxlab.errors import InstructionFailed
from vmxlab.image import layout, script
from vmxlab.image.protocol import Op
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.registers import InveptType
from vmxlab.structures.checks import require_bits
from vmxlab.structures.vmcs_values import FieldValue

if TYPE_CHECKING:
    from vmxlab.console.run import Outcome, Run


class Cpuid(NamedTuple):
    """What CPUID gives, 32 bits each."""

    eax: int
    ebx: int
    ecx: int
    edx: int


class Instructions(ABC):
    """Each method is one instruction, and gives its Outcome: VMsucceed, VMfail or a fault.

    Those that read give the value, and raise InstructionFailed where there is none; so do `vmwrite` and
    `wrmsr`, whose failure must not pass unseen. Their `try_` forms give the Outcome.
    """

    link: LiveLink

    def __init__(self) -> None:
        self._in_vmx = False
        self._current: int | None = None
        """The address of the current VMCS."""
        self._launched: set[int] = set()
        """VMCSs whose launch state is "launched"."""

    @abstractmethod
    def _send(self, units: Sequence[bytes]) -> Run: ...

    @abstractmethod
    def _require_vmx(self) -> None: ...

    @abstractmethod
    def _eptp(self) -> int:
        """The EPTP that was set up. CaseError where there is none."""

    # --- VMX instructions ------------------------------------------------------------------------------

    def try_vmread(self, field: Field | str | int) -> Outcome:
        """VMREAD of a field, by name or as any 32-bit encoding; `Outcome.value` is what was read."""
        return self._vmx("vmread", script.with_u32(Op.VMREAD, _encoding(field)))

    def try_vmwrite(self, field: Field | str | int, value: int) -> Outcome:
        """VMWRITE of any 64-bit operand, also one that is wider than the field."""
        units = script.vmwrites([(_encoding(field), require_bits("operand of VMWRITE", value, 64))])
        return self._vmx("vmwrite", *units)

    def vmread(self, field: Field | str | int) -> FieldValue:
        """The value of a field: an int that shows what it says. Raises InstructionFailed."""
        outcome = self._succeeded(self.try_vmread(field))
        assert outcome.value is not None
        return FieldValue(outcome.field if outcome.field is not None else _encoding(field), outcome.value)

    def vmwrite(self, field: Field | str | int, value: int) -> None:
        """Write a field. OutOfRange for a value that is wider, InstructionFailed where VMWRITE fails."""
        encoding = _encoding(field)
        if encoding in Field._value2member_map_:
            require_field_value(Field(encoding), value)
        self._succeeded(self.try_vmwrite(field, value))

    def vmxon(self, region: int = layout.VMXON_REGION) -> Outcome:
        """VMXON, of the region that is set up or of another address."""
        return self._vmx("vmxon", script.with_u64(Op.VMXON, region), region=region)

    def vmxoff(self) -> Outcome:
        """VMXOFF."""
        return self._vmx("vmxoff", script.op(Op.VMXOFF))

    def vmclear(self, region: int = layout.VMCS_REGION) -> Outcome:
        """VMCLEAR: the VMCS at `region` is clear, and current no more."""
        return self._vmx("vmclear", script.with_u64(Op.VMCLEAR, region), region=region)

    def vmptrld(self, region: int = layout.VMCS_REGION) -> Outcome:
        """VMPTRLD: the VMCS at `region` is current."""
        return self._vmx("vmptrld", script.with_u64(Op.VMPTRLD, region), region=region)

    def vmptrst(self) -> Outcome:
        """VMPTRST; `Outcome.value` is the pointer."""
        return self._vmx("vmptrst", script.op(Op.VMPTRST))

    def invept(self, type: int = InveptType.SINGLE_CONTEXT, eptp: int | None = None) -> Outcome:
        """INVEPT; `eptp` None is the one that was set up."""
        eptp = self._eptp() if eptp is None else eptp
        return self._vmx("invept", script.with_u64(Op.INVEPT, type, eptp, 0))

    def invvpid(self, type: int, vpid: int = 0, linear_address: int = 0) -> Outcome:
        """INVVPID."""
        return self._vmx("invvpid", script.with_u64(Op.INVVPID, type, vpid, linear_address))

    def vmcall(self) -> Outcome:
        """VMCALL in VMX root operation."""
        return self._vmx("vmcall", script.op(Op.VMCALL))

    def _vmx(self, operation: str, *units: bytes, region: int = 0) -> Outcome:
        self._require_vmx()
        outcome = last_outcome(self._send(units), operation)
        self._follow(outcome, region)
        return outcome

    def _follow(self, outcome: Outcome, region: int | None = None) -> None:
        """What an instruction means for the VMCS that is current, and its launch state."""
        if not outcome.ok:
            return
        match outcome.operation:
            case "vmxon":
                self._in_vmx = True
            case "vmxoff":
                self._in_vmx, self._current = False, None
            case "vmclear":
                region = layout.VMCS_REGION if region is None else region
                self._launched.discard(region)
                if self._current == region:
                    self._current = None
            case "vmptrld":
                self._current = layout.VMCS_REGION if region is None else region

    # --- other instructions of L1 ----------------------------------------------------------------------

    def try_rdmsr(self, msr: int) -> Outcome:
        """RDMSR in L1; `Outcome.value` is what was read."""
        return last_outcome(self._send([script.with_u32(Op.RDMSR, require_bits("MSR", msr, 32))]), "rdmsr")

    def try_wrmsr(self, msr: int, value: int) -> Outcome:
        """WRMSR in L1. Nothing undoes it."""
        unit = script.wrmsr(require_bits("MSR", msr, 32), require_bits("value of an MSR", value, 64))
        return last_outcome(self._send([unit]), "wrmsr")

    def rdmsr(self, msr: int) -> int:
        """The value of an MSR. Raises InstructionFailed where RDMSR faults."""
        outcome = self._succeeded(self.try_rdmsr(msr))
        assert outcome.value is not None
        return outcome.value

    def wrmsr(self, msr: int, value: int) -> None:
        """Write an MSR. Raises InstructionFailed where WRMSR faults."""
        self._succeeded(self.try_wrmsr(msr, value))

    def cpuid(self, leaf: int, subleaf: int = 0) -> Cpuid:
        """CPUID in L1."""
        unit = script.cpuid(require_bits("CPUID leaf", leaf, 32), require_bits("CPUID subleaf", subleaf, 32))
        run = self._send([unit])
        record = next(record for record in run.records if record.values.get("op") == "cpuid")
        return Cpuid(*(record.number(name) for name in Cpuid._fields))

    def _succeeded(self, outcome: Outcome, advice: str | None = None) -> Outcome:
        if outcome.ok:
            return outcome
        if advice is None and outcome.error is InstructionError.UNSUPPORTED_COMPONENT:
            advice = "the processor has no such field; snapshot() shows those that it has"
        raise self.link.located(InstructionFailed(outcome, advice=advice))


def _encoding(field: Field | str | int) -> int:
    """Any 32-bit encoding; a name must be one of the SDM's."""
    if isinstance(field, str):
        return int(as_field(field))
    return require_bits("VMCS field encoding", field, 32)
