"""A VMCS as the rules of VM entry look at it: fields, the processor's capabilities, what lies around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from vmxlab.errors import VmxlabError
from vmxlab.oracle.entry.rule import NotChecked
from vmxlab.sdm.controls import ControlSet, EntryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType
from vmxlab.sdm.registers import CR0, RFLAGS
from vmxlab.structures import Capabilities

_T = TypeVar("_T")
ReadMemory = Callable[[int, int], "bytes | None"]


_IA32E = EntryControls.IA32E_MODE_GUEST
_PE, _VM = int(CR0.PE), int(RFLAGS.VM)  # asked for hundreds of times a VMCS: plain numbers are quick


@cache
def _place(flag: BitFlags) -> tuple[Field, int, BitFlags | None]:
    """Where a control stands: field, bits, and the control that its set needs."""
    controls = ControlSet.of(flag)
    return controls.field, int(flag), controls.activated_by


def _no_memory(address: int, length: int) -> bytes | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a VM entry's checks depend on besides the VMCS.

    capabilities          the processor's capability MSRs
    maxphyaddr            its physical-address width in bits; None: not known
    linear_address_width  48, or 57 where the processor has 5-level paging
    efer_lma              IA32_EFER.LMA at the time of VM entry
    in_smm                whether VM entry is executed in SMM
    current_vmcs          the address of the current VMCS; None: not known
    read                  the machine's physical memory: `length` bytes at `address`, None where not known
    """

    capabilities: Capabilities
    maxphyaddr: int | None = None
    linear_address_width: int = 48
    efer_lma: bool = True
    in_smm: bool = False
    current_vmcs: int | None = None
    read: ReadMemory = _no_memory


class Vmcs:
    """Fields of a VMCS. A field that isn't there, where a rule asks for it, is `NotChecked`."""

    def __init__(self, fields: Mapping[Field, int], environment: Environment) -> None:
        self._fields = fields
        self.environment = environment
        self.capabilities = environment.capabilities
        self.was_read: dict[Field, int] = {}
        self.msr_entry: int | None = None
        """The number, from 1, of the entry of the MSR-load area that a rule looks at."""
        self.msr_loaded: int | None = None
        """The MSR that it loads."""

    # --- fields and controls ---------------------------------------------------------------------------

    def __getitem__(self, field: Field) -> int:
        """The field's value. NotChecked where it is missing."""
        value = self._fields.get(field)
        if value is None:
            raise NotChecked(f"{field.name} is missing")
        self.was_read[field] = value
        return value

    def on(self, flag: BitFlags) -> bool:
        """Whether a control is 1 and in effect: its set may need another control to count at all."""
        field, bits, activated_by = _place(flag)
        if activated_by is not None and not self.on(activated_by):
            return False
        if field not in self._fields and not self.capabilities.supports(flag):
            return False  # a field that this processor does not have
        return bool(self[field] & bits)

    def controls(self, controls: ControlSet) -> int:
        """All controls of a set as they are written."""
        return self[controls.field]

    # --- addresses ---------------------------------------------------------------------------------------

    @property
    def physical_width(self) -> int:
        """Bits that an address in the VMCS may have; less where IA32_VMX_BASIC[48] is 1 (A.1)."""
        if self.capability(lambda: self.capabilities.basic.is_32bit_address):
            return 32
        if self.environment.maxphyaddr is None:
            raise NotChecked("the physical-address width (MAXPHYADDR) is not known")
        return self.environment.maxphyaddr

    def fits(self, address: int) -> bool:
        """Whether a physical address sets no bit beyond the width."""
        return not address >> self.physical_width

    def canonical(self, address: int) -> bool:
        """Whether bits 63 down to the highest of the linear-address width are all the same."""
        upper = address >> self.environment.linear_address_width - 1
        return upper in (0, (1 << 65 - self.environment.linear_address_width) - 1)

    def read(self, address: int, length: int) -> int:
        """A little-endian number in memory. NotChecked where its content is not known."""
        content = self.environment.read(address, length)
        if content is None:
            raise NotChecked(f"the memory at {address:#x} is not known")
        return int.from_bytes(content, "little")

    def capability(self, ask: Callable[[], _T]) -> _T:
        """What a capability MSR says. NotChecked where it was not read."""
        try:
            return ask()
        except VmxlabError as error:
            raise NotChecked(str(error.message)) from None

    # --- what several rules ask for ------------------------------------------------------------------------

    @property
    def injects(self) -> InterruptionInformation:
        """The event to inject; not valid where there is none."""
        return InterruptionInformation.from_bits(self[Field.ENTRY_INTERRUPTION_INFORMATION] & 0xFFFF_FFFF)

    def injects_type(self, kind: InterruptionType) -> bool:
        """Whether an event of this type is to be injected."""
        event = self.injects
        return event.valid and event.type is kind

    @property
    def ia32e(self) -> bool:
        """Whether the guest will be in IA-32e mode."""
        return self.on(_IA32E)

    @property
    def protected(self) -> bool:
        """Guest CR0.PE."""
        return bool(self[Field.GUEST_CR0] & _PE)

    @property
    def virtual_8086(self) -> bool:
        """Whether the guest will be in virtual-8086 mode."""
        return bool(self[Field.GUEST_RFLAGS] & _VM)
