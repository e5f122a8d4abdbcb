"""The VMX instructions of a case, in order.

A case has a standard sequence (`STANDARD`): VMXON, VMCLEAR, VMPTRLD, the VMWRITEs, VMLAUNCH. One that asks
something else says its own. Each step reports one outcome; a step that fails ends the case, unless it is told
to `go_on`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.errors import OutOfRange
from vmxlab.sdm.apic import ApicRegister, require_apic_register
from vmxlab.sdm.fields import Field


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step; with `go_on` its failure does not end the case."""

    go_on: bool = False

    def __post_init__(self) -> None:
        """Raise OutOfRange for an operand that is wider than the instruction's."""
        for name, bits in _OPERAND_BITS.items():
            value = getattr(self, name, None)
            if value is not None and not 0 <= value < 1 << bits:
                raise OutOfRange(f"{type(self).__name__}: {name}", value, f"the operand has {bits} bits")


_OPERAND_BITS = {
    "region": 64,
    "field": 32,
    "value": 64,
    "type": 64,
    "eptp": 64,
    "vpid": 64,
    "linear_address": 64,
    "msr": 32,
    "address": 64,
    "length": 32,
}


@dataclass(frozen=True, slots=True)
class Vmxon(Step):
    """VMXON with the case's VMXON region, or with another physical address."""

    region: int | None = None


@dataclass(frozen=True, slots=True)
class Vmxoff(Step):
    """VMXOFF. (At the end of a case the monitor leaves VMX operation by itself.)"""


@dataclass(frozen=True, slots=True)
class Vmclear(Step):
    """VMCLEAR of the case's VMCS region, or of another physical address."""

    region: int | None = None


@dataclass(frozen=True, slots=True)
class Vmptrld(Step):
    """VMPTRLD of the case's VMCS region, or of another physical address."""

    region: int | None = None


@dataclass(frozen=True, slots=True)
class Vmptrst(Step):
    """VMPTRST; the outcome shows the pointer."""


@dataclass(frozen=True, slots=True)
class Vmread(Step):
    """VMREAD of a field, or of any 32-bit encoding; the outcome shows the value."""

    field: Field | int


@dataclass(frozen=True, slots=True)
class Vmwrite(Step):
    """VMWRITE of a field, or of any 32-bit encoding."""

    field: Field | int
    value: int


@dataclass(frozen=True, slots=True)
class WriteVmcs(Step):
    """All VMWRITEs of the case: controls, host state, guest state, and its own `fields`."""


@dataclass(frozen=True, slots=True)
class Invept(Step):
    """INVEPT; `eptp` None is the case's own EPTP (SDM Vol. 3C, 31.3)."""

    type: int = 1
    eptp: int | None = None


@dataclass(frozen=True, slots=True)
class Invvpid(Step):
    """INVVPID (SDM Vol. 3C, 31.3)."""

    type: int
    vpid: int = 0
    linear_address: int = 0


@dataclass(frozen=True, slots=True)
class Vmcall(Step):
    """VMCALL in VMX root operation."""


@dataclass(frozen=True, slots=True)
class Rdmsr(Step):
    """RDMSR in L1; the outcome shows the value."""

    msr: int


@dataclass(frozen=True, slots=True)
class Wrmsr(Step):
    """WRMSR in L1. Nothing undoes it at the end of the case."""

    msr: int
    value: int


@dataclass(frozen=True, slots=True)
class ApicRead(Step):
    """Read a 32-bit register of L1's local APIC; the outcome shows the value."""

    register: ApicRegister | int

    def __post_init__(self) -> None:
        require_apic_register(self.register)


@dataclass(frozen=True, slots=True)
class ApicWrite(Step):
    """Write a 32-bit register of L1's local APIC, such as the interrupt command register.

    At the end of the case the monitor takes all interrupts and NMIs that are left, and an INIT, too, which
    comes with VMXOFF; then it sets the APIC up as it was. An INIT or a SIPI outside of VMX operation, before
    the end, resets the machine.

    Under KVM the monitor itself runs the APIC timer, masked (guest/cpu/heartbeat.c). A case may take the
    timer for itself. It then must not let L2 or a loop of L1 wait for anything else but this timer, as a KVM
    in Bochs may not get the processor back without one.
    """

    register: ApicRegister | int
    value: int

    def __post_init__(self) -> None:
        require_apic_register(self.register)
        if not 0 <= self.value < 1 << 32:
            raise OutOfRange("value of an APIC register", self.value, "32 bits")


@dataclass(frozen=True, slots=True)
class SetCr0(Step):
    """MOV to CR0 in L1; undone at the end of the case."""

    value: int


@dataclass(frozen=True, slots=True)
class SetCr4(Step):
    """MOV to CR4 in L1; undone at the end of the case."""

    value: int


@dataclass(frozen=True, slots=True)
class Store(Step):
    """Put bytes into the machine's memory."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ReportMemory(Step):
    """Have the machine's memory reported: `run.memory[address]`."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Enter(Step):
    """VMLAUNCH (or VMRESUME), and all exits and reactions until one stops.

    `report_vmcs`: the log of an entry that fails holds the whole VMCS.
    """

    resume: bool = False
    report_vmcs: bool = True


STANDARD: tuple[Step, ...] = (Vmxon(), Vmclear(), Vmptrld(), WriteVmcs(), Enter())
