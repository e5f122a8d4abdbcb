"""IA32_FEATURE_CONTROL, the MSR that lets VMXON work or not (SDM Vol. 3C, 24.7; Vol. 4, Table 2-2)."""

from __future__ import annotations

from dataclasses import dataclass

from vmxlab.errors import GeneralProtection
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.checks import require_bits


class FeatureControlFlags(BitFlags):
    """The bits of IA32_FEATURE_CONTROL.

    All but the first three exist only on processors with the feature named; setting one elsewhere is #GP.
    `SENTER_LOCAL_FUNCTIONS` is the seven bits 14:8, which go with the functions of GETSEC[SENTER].
    """

    LOCKED = 1 << 0
    VMXON_ENABLED_INSIDE_SMX = 1 << 1
    VMXON_ENABLED_OUTSIDE_SMX = 1 << 2
    SENTER_LOCAL_FUNCTIONS = 0x7F << 8
    SENTER_GLOBAL_ENABLE = 1 << 15
    SGX_LAUNCH_CONTROL_ENABLE = 1 << 17
    SGX_GLOBAL_ENABLE = 1 << 18
    LMCE_ON = 1 << 20


_F = FeatureControlFlags
_DEFINED = int(
    _F.LOCKED
    | _F.VMXON_ENABLED_INSIDE_SMX
    | _F.VMXON_ENABLED_OUTSIDE_SMX
    | _F.SENTER_LOCAL_FUNCTIONS
    | _F.SENTER_GLOBAL_ENABLE
    | _F.SGX_LAUNCH_CONTROL_ENABLE
    | _F.SGX_GLOBAL_ENABLE
    | _F.LMCE_ON
)
# What a write for VMX decides. Everything else belongs to the firmware and to other features.
_VMX = int(_F.LOCKED | _F.VMXON_ENABLED_INSIDE_SMX | _F.VMXON_ENABLED_OUTSIDE_SMX)


@dataclass(frozen=True, slots=True)
class FeatureControl:
    """The value of IA32_FEATURE_CONTROL; 0 after reset. OutOfRange if it is over 64 bits."""

    raw: int = 0

    def __post_init__(self) -> None:
        """Check that it fits 64 bits."""
        require_bits(Msr.IA32_FEATURE_CONTROL.name, self.raw, 64)

    @property
    def bits(self) -> int:
        """The 64-bit value."""
        return self.raw

    @property
    def flags(self) -> FeatureControlFlags:
        """The value as flags; bits that the manual doesn't define are kept."""
        return FeatureControlFlags(self.raw)

    @property
    def locked(self) -> bool:
        """Whether the register can't be written until the next reset."""
        return FeatureControlFlags.LOCKED in self.flags

    @classmethod
    def read(cls, raw: int) -> FeatureControlFlags:
        """The flags in a value that RDMSR gave."""
        return cls(raw).flags

    @classmethod
    def write(cls, old: int, flags: int, clear: int = 0) -> int:
        """The value that a WRMSR leaves in the register which makes the flags for VMX exactly `flags`.

        `old` is what the register holds. LOCKED and the two VMXON bits become what `flags` says; any further
        bit in `flags` is set too, any bit in `clear` is cleared, and every other bit is kept from `old`.
        GeneralProtection where WRMSR would answer with #GP(0): `old` is locked, or a reserved bit would be
        set. OutOfRange for values over 64 bits.
        """
        before = cls(old)
        wanted = require_bits("flags for IA32_FEATURE_CONTROL", flags, 64)
        cleared = require_bits("flags to clear in IA32_FEATURE_CONTROL", clear, 64)
        if before.locked:
            raise GeneralProtection(
                f"WRMSR of IA32_FEATURE_CONTROL is #GP(0): it is locked at {old:#x} until the next reset",
                advice="use what the firmware locked in, or change the setting there",
            )
        reserved = wanted & ~_DEFINED
        if reserved:
            raise GeneralProtection(
                f"WRMSR of IA32_FEATURE_CONTROL is #GP(0): bits {reserved:#x} are reserved"
            )
        return old & ~(_VMX | cleared) | wanted

    def vmxon_allowed(self, in_smx: bool = False) -> bool:
        """Whether VMXON works: the register is locked and has the bit for inside or outside SMX operation.

        Otherwise VMXON is #GP(0) (SDM Vol. 3C, 24.7).
        """
        enable = _F.VMXON_ENABLED_INSIDE_SMX if in_smx else _F.VMXON_ENABLED_OUTSIDE_SMX
        return self.locked and enable in self.flags
