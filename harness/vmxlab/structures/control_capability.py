"""Which values one set of VMX controls may have (SDM Vol. 3D, A.2 to A.5).

The capability MSR of a 32-bit set gives two halves. Bits 31:0 are the allowed 0-settings: where bit X is 1,
control X must be 1. Bits 63:32 are the allowed 1-settings: where bit 32+X is 0, control X must be 0. The
MSRs of the two 64-bit sets have allowed 1-settings only, one for each of the 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.checks import BrokenRule, require_bits


@dataclass(frozen=True, slots=True)
class ControlCapability:
    """The values that a set of controls, or CR0 or CR4 in VMX operation, may have.

    `allowed0` has a 1 for each bit that must be 1, `allowed1` a 0 for each bit that must be 0. `width` is
    32 or 64 bits. `flags` and `msr` say whose bits these are, for messages; a capability without them just
    has numbers.
    """

    allowed0: int
    allowed1: int
    width: int = 32
    flags: type[BitFlags] | None = None
    msr: Msr | None = None

    def __post_init__(self) -> None:
        """Check that both halves fit."""
        require_bits("allowed 0-settings", self.allowed0, self.width)
        require_bits("allowed 1-settings", self.allowed1, self.width)

    @classmethod
    def from_bits(
        cls, raw: int, flags: type[BitFlags] | None = None, msr: Msr | None = None
    ) -> ControlCapability:
        """From the MSR of a 32-bit set: allowed 0-settings in bits 31:0, allowed 1-settings in bits 63:32."""
        require_bits("capability MSR", raw, 64)
        return cls(raw & 0xFFFF_FFFF, raw >> 32, 32, flags, msr)

    @classmethod
    def from_allowed1(
        cls, raw: int, flags: type[BitFlags] | None = None, msr: Msr | None = None
    ) -> ControlCapability:
        """From the MSR of a 64-bit set: any bit may be 0, and those that are 1 here may be 1."""
        return cls(0, raw, 64, flags, msr)

    @property
    def contradictions(self) -> int:
        """Bits that must be 0 and 1 at once; 0 on any real processor."""
        return self.allowed0 & ~self.allowed1

    @property
    def flexible(self) -> int:
        """Bits that may be 0 or 1."""
        return self.allowed1 & ~self.allowed0

    def adjust(self, wanted: int) -> int:
        """The allowed value closest to `wanted`: bits that must be 1 added, bits that must be 0 taken away.

        `forced_on` and `forced_off` say what was changed. OutOfRange if `wanted` is wider than the set.
        """
        return (self._value(wanted) | self.allowed0) & self.allowed1

    def forced_on(self, wanted: int) -> int:
        """The bits that `adjust` adds, because they must be 1."""
        return self.adjust(wanted) & ~self._value(wanted)

    def forced_off(self, wanted: int) -> int:
        """The bits that `adjust` takes away, because they must be 0."""
        return self._value(wanted) & ~self.adjust(wanted)

    def allows(self, value: int) -> bool:
        """Whether the processor accepts this value as it is."""
        return self.adjust(value) == self._value(value)

    def check(self, value: int) -> list[BrokenRule]:
        """Every bit of `value` that the processor does not allow, from bit 0 up; empty if it accepts it."""
        value = self._value(value)
        broken = []
        for bit in _bits_of(self.allowed0 & ~value):
            broken.append(BrokenRule(f"{self.name_of(bit)} must be 1 but is 0", self._source))
        for bit in _bits_of(value & ~self.allowed1):
            name = self.name_of(bit)
            broken.append(BrokenRule(f"{name} must be 0 but is 1", self._source, self.bit_name(bit), name))
        return broken

    def name_of(self, bit: int) -> str:
        """What control X is called: the manual's name, or "bit 17" where it has none."""
        if self.flags is not None:
            name = self.flags(1 << bit).name
            if name is not None:
                return name
        return f"bit {bit}"

    def bit_name(self, bit: int) -> str:
        """Where the processor says that control X may be 1: "IA32_VMX_PROCBASED_CTLS2[33]" for X = 1."""
        where = self.msr.name if self.msr is not None else "capability MSR"
        return f"{where}[{bit + 32 if self.width == 32 else bit}]"

    @property
    def _source(self) -> str:
        return (
            f"SDM Vol. 3D, Appendix A: {self.msr.name}" if self.msr is not None else "SDM Vol. 3D, Appendix A"
        )

    def _value(self, value: int) -> int:
        return require_bits("control value", value, self.width)


def _bits_of(mask: int) -> Iterator[int]:
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
