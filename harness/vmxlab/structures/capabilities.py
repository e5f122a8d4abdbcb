"""What a processor's VMX can do, all capability MSRs together (SDM Vol. 3D, Appendix A).

`Capabilities` is made from MSRs as read on the machine that will run a case. It knows which MSR answers for
which controls: the TRUE variants where IA32_VMX_BASIC[55] is 1, and none at all for a set that the processor
doesn't have, so that its controls are all "must be 0" there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vmxlab.errors import CaseError, MissingCapability, VmxlabError
from vmxlab.sdm.controls import ControlSet, SecondaryControls
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4
from vmxlab.structures.capability_msrs import EptVpidCap, VmcsEnum, VmFunc, VmxBasic, VmxMisc
from vmxlab.structures.checks import require_bits
from vmxlab.structures.control_capability import ControlCapability
from vmxlab.structures.register import Bits, Register

__all__ = [
    "CAPABILITY_MSRS",
    "CAPABILITY_REGISTERS",
    "Capabilities",
    "ControlCapability",
    "EptVpidCap",
    "Need",
    "VmFunc",
    "VmcsEnum",
    "VmxBasic",
    "VmxMisc",
]

CAPABILITY_MSRS: tuple[Msr, ...] = tuple(msr for msr in Msr if msr.name.startswith("IA32_VMX_"))
"""The capability MSRs that Appendix A lists, in order of their addresses."""

Need = BitFlags | Bits
"""What a processor may be asked for: a control, a field of a capability MSR (`EptVpidCap.page_1g`), or a bit
of CR0 or CR4 that must be free to be 1 in VMX operation (`CR4.SMXE`)."""


CAPABILITY_REGISTERS: Mapping[type[Register], str] = MappingProxyType(
    {VmxBasic: "basic", VmxMisc: "misc", VmcsEnum: "vmcs_enum", EptVpidCap: "ept_vpid", VmFunc: "vmfunc"}
)
"""The MSRs with fields, and the property of `Capabilities` that reads each."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capability MSRs of one processor: `raw` maps MSR addresses to 64-bit values.

    MSRs that the processor doesn't have are left out. An empty mapping is a processor without VMX: it
    supports nothing, and asking it for a value raises MissingCapability. Other MSRs (IA32_FEATURE_CONTROL)
    may stand in it and are kept. Raises OutOfRange for an address over 32 bits or a value over 64.
    """

    raw: Mapping[int, int]
    # Asked for hundreds of times a case, always with the same answer.
    _controls: dict[ControlSet, ControlCapability] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Keep a sorted copy that nobody can change."""
        values = {
            require_bits("MSR address", msr, 32): require_bits(f"value of {_msr_name(msr)}", value, 64)
            for msr, value in sorted(self.raw.items())
        }
        object.__setattr__(self, "raw", MappingProxyType(values))

    def __hash__(self) -> int:
        """By the MSRs and their values."""
        return hash(tuple(self.raw.items()))

    def __reduce__(self) -> tuple[type[Capabilities], tuple[dict[int, int]]]:
        """For copy and pickle, which can't take a read-only mapping."""
        return Capabilities, (dict(self.raw),)

    def __repr__(self) -> str:
        """How many MSRs, and the revision identifier that tells processors apart."""
        basic = self.raw.get(Msr.IA32_VMX_BASIC)
        what = "no VMX" if basic is None else f"revision {VmxBasic(basic).revision_id:#x}"
        return f"<Capabilities: {len(self.raw)} MSRs, {what}>"

    # --- single MSRs ---

    @property
    def basic(self) -> VmxBasic:
        """IA32_VMX_BASIC."""
        return VmxBasic(self._read(Msr.IA32_VMX_BASIC))

    @property
    def misc(self) -> VmxMisc:
        """IA32_VMX_MISC."""
        return VmxMisc(self._read(Msr.IA32_VMX_MISC))

    @property
    def cr0_fixed0(self) -> int:
        """IA32_VMX_CR0_FIXED0: bits of CR0 that must be 1 in VMX operation (A.7)."""
        return self._read(Msr.IA32_VMX_CR0_FIXED0)

    @property
    def cr0_fixed1(self) -> int:
        """IA32_VMX_CR0_FIXED1: bits of CR0 that are 0 here must be 0 in VMX operation (A.7)."""
        return self._read(Msr.IA32_VMX_CR0_FIXED1)

    @property
    def cr4_fixed0(self) -> int:
        """IA32_VMX_CR4_FIXED0: bits of CR4 that must be 1 in VMX operation (A.8)."""
        return self._read(Msr.IA32_VMX_CR4_FIXED0)

    @property
    def cr4_fixed1(self) -> int:
        """IA32_VMX_CR4_FIXED1: bits of CR4 that are 0 here must be 0 in VMX operation (A.8)."""
        return self._read(Msr.IA32_VMX_CR4_FIXED1)

    @property
    def cr0(self) -> ControlCapability:
        """The values CR0 may have in VMX operation; its fixed bits follow the same rule as controls."""
        return ControlCapability(self.cr0_fixed0, self.cr0_fixed1, 64, CR0)

    @property
    def cr4(self) -> ControlCapability:
        """The values CR4 may have in VMX operation."""
        return ControlCapability(self.cr4_fixed0, self.cr4_fixed1, 64, CR4)

    @property
    def vmcs_enum(self) -> VmcsEnum:
        """IA32_VMX_VMCS_ENUM."""
        return VmcsEnum(self._read(Msr.IA32_VMX_VMCS_ENUM))

    @property
    def ept_vpid(self) -> EptVpidCap:
        """IA32_VMX_EPT_VPID_CAP; all zero on a processor without EPT and VPID, which lacks the MSR (A.10)."""
        if self.supports(SecondaryControls.ENABLE_EPT) or self.supports(SecondaryControls.ENABLE_VPID):
            return EptVpidCap(self._read(Msr.IA32_VMX_EPT_VPID_CAP))
        return EptVpidCap(0)

    @property
    def vmfunc(self) -> VmFunc:
        """IA32_VMX_VMFUNC; all zero on a processor without VM functions, which lacks the MSR (A.11)."""
        if self.supports(SecondaryControls.ENABLE_VM_FUNCTIONS):
            return VmFunc(self._read(Msr.IA32_VMX_VMFUNC))
        return VmFunc(0)

    # --- controls ---

    def control(self, controls: ControlSet) -> ControlCapability:
        """The values this set of controls may have, from its TRUE MSR where there is one.

        All zero (every control must be 0) for a set that the processor does not have.
        """
        capability = self._controls.get(controls)
        if capability is None:
            capability = self._controls[controls] = self._make_control(controls)
        return capability

    def _make_control(self, controls: ControlSet) -> ControlCapability:
        msr = self.control_msr(controls)
        if controls.activated_by is not None and not self.supports(controls.activated_by):
            return ControlCapability(0, 0, controls.bits, controls.flags, msr)
        raw = self._read(msr)
        if controls.allowed1_only:
            return ControlCapability.from_allowed1(raw, controls.flags, msr)
        return ControlCapability.from_bits(raw, controls.flags, msr)

    def control_msr(self, controls: ControlSet) -> Msr:
        """The MSR that answers for this set on this processor (A.2)."""
        if controls.true_msr is not None and self.basic.vmx_flex_controls:
            return controls.true_msr
        return controls.msr

    def supports(self, flag: BitFlags) -> bool:
        """Whether all controls in `flag` may be 1; False without VMX. TypeError if it is no control flag."""
        controls = ControlSet.of(flag)
        if Msr.IA32_VMX_BASIC not in self.raw:
            return False
        return not int(flag) & ~self.control(controls).allowed1

    def require(self, need: Need) -> None:
        """Nothing if all controls in `need` may be 1; else MissingCapability for the first that may not.

        The bit named is the reason: for a set that can't be activated at all it is the activating control's.
        Of a field of a capability MSR: that it is not 0. Of bits of CR0 or CR4: that they may be 1 in VMX
        operation (A.7, A.8). TypeError for anything else.
        """
        if isinstance(need, Bits):
            self._register(need.owner).require(need.name)
        elif isinstance(need, CR0 | CR4):
            self._require_register_bits(need)
        else:
            self._require_control(need)

    def _register(self, kind: type[Register]) -> Register:
        if kind not in CAPABILITY_REGISTERS:
            raise TypeError(f"{kind.__name__} is none of the capability MSRs")
        register: Register = getattr(self, CAPABILITY_REGISTERS[kind])
        return register

    def _require_register_bits(self, need: CR0 | CR4) -> None:
        name = type(need).__name__
        msr = Msr[f"IA32_VMX_{name}_FIXED1"]
        missing = int(need) & ~self._read(msr)
        if missing:
            bit = (missing & -missing).bit_length() - 1
            raise MissingCapability(f"{name}.{type(need)(1 << bit).describe()}", f"{msr.name}[{bit}]")

    def _require_control(self, flag: BitFlags) -> None:
        controls = ControlSet.of(flag)
        capability = self.control(controls)
        missing = int(flag) & ~capability.allowed1
        if not missing:
            return
        bit = (missing & -missing).bit_length() - 1
        feature = capability.name_of(bit)
        activator = controls.activated_by
        if activator is not None and not self.supports(activator):
            parent = self.control(ControlSet.of(activator))
            raise MissingCapability(feature, parent.bit_name(int(activator).bit_length() - 1))
        raise MissingCapability(feature, capability.bit_name(bit))

    def require_clear(self, flag: BitFlags) -> None:
        """Nothing if all controls in `flag` may be 0; else MissingCapability for the first that may not."""
        controls = ControlSet.of(flag)
        capability = self.control(controls)
        forced = capability.allowed0 & int(flag)
        if forced:
            bit = (forced & -forced).bit_length() - 1
            where = f"{self.control_msr(controls).name}[{bit}]"
            raise MissingCapability(f"the 0-setting of {capability.name_of(bit)}", where, value=1)

    def adjust(self, controls: ControlSet, wanted: int) -> int:
        """The allowed value of this set closest to `wanted`; see `ControlCapability.adjust`."""
        return self.control(controls).adjust(wanted)

    # --- as text, and together with another processor's ---

    def to_dict(self) -> dict[str, str]:
        """MSR names (or numbers as hex) to values as 16-digit hex, in order of the addresses."""
        return {_msr_name(msr): f"{value:#018x}" for msr, value in self.raw.items()}

    def to_json(self) -> str:
        """`to_dict` as JSON text: the same MSRs always give the same text."""
        import json

        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> Capabilities:
        """The reverse of `to_dict`; CaseError for a name or a value that it can't read."""
        raw: dict[int, int] = {}
        for name, value in values.items():
            try:
                msr = int(Msr[name]) if name in Msr.__members__ else int(name, 16)
                number = int(value, 16)
            except (TypeError, ValueError) as error:
                raise CaseError(
                    f"{name!r}: {value!r} is no MSR with a value",
                    advice='write "IA32_VMX_BASIC": "0x00d8100000000004", an MSR without a name as "0x9a"',
                ) from error
            if msr in raw:
                raise CaseError(f"{_msr_name(msr)} stands there twice")
            raw[msr] = number
        return cls(raw)

    @classmethod
    def from_json(cls, text: str) -> Capabilities:
        """The reverse of `to_json`; CaseError if the text is not such JSON."""
        import json

        try:
            values = json.loads(text)
        except ValueError as error:
            raise CaseError(f"the capabilities are no JSON: {error}") from error
        if not isinstance(values, dict):
            raise CaseError("the capabilities must be a JSON object of MSR names and hex values")
        return cls.from_dict(values)

    def intersection(self, other: Capabilities, *, ignore_revision_ids: bool = False) -> Capabilities:
        """What both processors can do, for an image that must run on either; see `intersection.intersect`."""
        from vmxlab.structures.intersection import intersect

        return Capabilities(intersect(self.raw, other.raw, ignore_revision_ids=ignore_revision_ids))

    def _read(self, msr: Msr) -> int:
        value = self.raw.get(msr)
        if value is not None:
            return value
        if Msr.IA32_VMX_BASIC not in self.raw:
            raise MissingCapability("VMX", "CPUID.01H:ECX[5]")
        raise VmxlabError(
            f"{msr.name} ({int(msr):#x}) is not among the capability MSRs that were read",
            advice="by its other capability MSRs the processor has it: read all of 0x480 to 0x493 that exist",
        )


def _msr_name(msr: int) -> str:
    try:
        return Msr(msr).name
    except ValueError:
        return f"{msr:#x}"
