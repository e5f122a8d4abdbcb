"""The VMX instructions in VMX root operation: how each of them ends (SDM Vol. 3C, 31.3).

`Root` is the processor as L1 sees it: in VMX operation or not, its VMXON pointer, its current VMCS, the
launch state of each VMCS. Every method gives a `PredictedOutcome`, or raises CannotTell.
"""

from __future__ import annotations

from dataclasses import replace

from vmxlab.oracle.entry_checks import NotEntered
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.prediction import PredictedOutcome
from vmxlab.oracle.values import CannotTell, Rule, as_value
from vmxlab.oracle.vmcs import ModelVmcs, exists, field_of, is_read_only
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError as E
from vmxlab.sdm.registers import CR0, CR4, Vector
from vmxlab.structures import Capabilities, EPTPointer
from vmxlab.structures.region import SHADOW_INDICATOR

_CONVENTIONS = Rule("VMsucceed, VMfailInvalid, VMfailValid", "Vol. 3C, 31.2")


_FIXED_BITS = Rule("restrictions on VMX operation", "Vol. 3C, 24.8")
TYPE_HAS_64_BITS = Rule("in 64-bit mode the type has 64 bits", "Vol. 3C, 31.3, INVEPT and INVVPID")
SHADOW_IS_NOT_ENTERED = Rule("there is no VM entry with a shadow VMCS", "Vol. 3C, 27.1")


def _rule(operation: str) -> tuple[Rule, ...]:
    return (Rule(operation.upper(), f"Vol. 3C, 31.3, {operation.upper()}"), _CONVENTIONS)


class Root:
    """The state of VMX operation, and what the VMX instructions do to it."""

    def __init__(self, capabilities: Capabilities, width: int, memory: MachineMemory) -> None:
        self.capabilities = capabilities
        self.memory = memory
        # IA32_VMX_BASIC[48]: VMX structures below 4 GiB only (A.1).
        self.width = 32 if capabilities.basic.is_32bit_address else width
        self.vmxon_pointer: int | None = None
        self.pointer: int | None = None
        self.vmcss: dict[int, ModelVmcs] = {}
        self.cr0, self.cr4 = _monitor_control_registers(capabilities)
        self._forgotten_regions: set[int] = set()

    # --- how instructions end ----------------------------------------------------------------------------

    @property
    def current(self) -> ModelVmcs | None:
        """The current VMCS."""
        return None if self.pointer is None else self.vmcss[self.pointer]

    def succeed(self, operation: str, **more: object) -> PredictedOutcome:
        """VMsucceed."""
        return PredictedOutcome(operation, "ok", rules=_rule(operation), **more)  # type: ignore[arg-type]

    def fault(self, operation: str, vector: Vector, **more: object) -> PredictedOutcome:
        """A fault with error code 0."""
        return PredictedOutcome(
            operation,
            "fault",
            vector=int(vector),
            error_code=0,
            rules=_rule(operation),
            **more,  # type: ignore[arg-type]
        )

    def fail_invalid(self, operation: str, **more: object) -> PredictedOutcome:
        """VMfailInvalid."""
        return PredictedOutcome(operation, "invalid", rules=_rule(operation), **more)  # type: ignore[arg-type]

    def fail(self, operation: str, error: E, **more: object) -> PredictedOutcome:
        """VMfail: VMfailValid with a current VMCS, VMfailInvalid without one (31.2)."""
        if self.current is None:
            return self.fail_invalid(operation, **more)
        self.current.put(Field.VM_INSTRUCTION_ERROR, int(error))
        return PredictedOutcome(
            operation,
            "valid",
            error=int(error),
            rules=_rule(operation),
            **more,  # type: ignore[arg-type]
        )

    # --- VMXON, VMXOFF -------------------------------------------------------------------------------------

    def vmxon(self, region: int) -> PredictedOutcome:
        """VMXON (31.3): #UD, #GP(0), VMfailInvalid, success; VMfail(15) in VMX operation."""
        if not self.cr4 & CR4.VMXE:
            return self.fault("vmxon", Vector.UD)
        if self.vmxon_pointer is not None:
            return self.fail("vmxon", E.VMXON_IN_VMX_ROOT_OPERATION)
        if not (self._fits_fixed(self.cr0, cr4=False) and self._fits_fixed(self.cr4, cr4=True)):
            return self.fault("vmxon", Vector.GP)
        if not self._is_address(region) or self._revision(region) != self.capabilities.basic.revision_id:
            return self.fail_invalid("vmxon")
        self.vmxon_pointer = region
        self.pointer = None
        return self.succeed("vmxon")

    def vmxoff(self) -> PredictedOutcome:
        """VMXOFF (31.3)."""
        if self.vmxon_pointer is None:
            return self.fault("vmxoff", Vector.UD)
        if self.capabilities.basic.dual_monitor:
            pass  # no SMM-transfer monitor is ever set up here: nothing in an image enters SMM
        self.vmxon_pointer = None
        self.pointer = None
        # 31.3, VMXOFF, and 25.11.1: a VMCS that was active is of no use without VMCLEAR.
        self._forgotten_regions |= set(self.vmcss)
        return self.succeed("vmxoff")

    # --- VMCLEAR, VMPTRLD, VMPTRST -------------------------------------------------------------------------

    def vmclear(self, region: int) -> PredictedOutcome:
        """VMCLEAR (31.3)."""
        if self.vmxon_pointer is None:
            return self.fault("vmclear", Vector.UD)
        if not self._is_address(region):
            return self.fail("vmclear", E.VMCLEAR_INVALID_PHYSICAL_ADDRESS)
        if region == self.vmxon_pointer:
            return self.fail("vmclear", E.VMCLEAR_VMXON_POINTER)
        if region in self.vmcss:
            self.vmcss[region].launched = False
        else:
            self.vmcss[region] = ModelVmcs(self.capabilities)
        self._forgotten_regions.discard(region)
        self._scribble(region)
        if self.pointer == region:
            self.pointer = None
        return self.succeed("vmclear")

    def vmptrld(self, region: int) -> PredictedOutcome:
        """VMPTRLD (31.3)."""
        if self.vmxon_pointer is None:
            return self.fault("vmptrld", Vector.UD)
        if not self._is_address(region):
            return self.fail("vmptrld", E.VMPTRLD_INVALID_PHYSICAL_ADDRESS)
        if region == self.vmxon_pointer:
            return self.fail("vmptrld", E.VMPTRLD_VMXON_POINTER)
        revision = self._revision(region)
        is_shadow = bool(revision & SHADOW_INDICATOR)
        may_be_shadow = self.capabilities.supports(SecondaryControls.VMCS_SHADOWING)
        if revision & ~SHADOW_INDICATOR != self.capabilities.basic.revision_id or (
            is_shadow and not may_be_shadow
        ):
            return self.fail("vmptrld", E.VMPTRLD_INCORRECT_REVISION_ID)
        if region in self._forgotten_regions:
            raise CannotTell("a VMCS that was active at VMXOFF, and not cleared since (25.11.1)")
        if region not in self.vmcss:
            raise CannotTell("a VMCS that no VMCLEAR has made ready (25.11.3)")
        self.vmcss[region].shadow = is_shadow
        self.pointer = region
        self._scribble(region)
        return self.succeed("vmptrld")

    def vmptrst(self) -> PredictedOutcome:
        """VMPTRST (31.3): the current-VMCS pointer, all ones where there is none."""
        if self.vmxon_pointer is None:
            return self.fault("vmptrst", Vector.UD)
        return self.succeed("vmptrst", value=(1 << 64) - 1 if self.pointer is None else self.pointer)

    # --- VMREAD, VMWRITE -----------------------------------------------------------------------------------

    def vmread(self, encoding: int) -> PredictedOutcome:
        """VMREAD (31.3)."""
        if self.vmxon_pointer is None:
            return self.fault("vmread", Vector.UD, field=encoding)
        if self.current is None:
            return self.fail_invalid("vmread", field=encoding)
        if not exists(encoding, self.capabilities):
            return self.fail("vmread", E.UNSUPPORTED_COMPONENT, field=encoding)
        found = field_of(encoding)
        name = found.name if found is not None else f"{encoding:#x}"
        value = as_value(self.current.read(encoding), 64, f"{name} was not written, or is not known")
        return self.succeed("vmread", field=encoding, value=value)

    def vmwrite(self, encoding: int, value: int) -> PredictedOutcome:
        """VMWRITE (31.3); what it names in a failure is the field."""
        if self.vmxon_pointer is None:
            return self.fault("vmwrite", Vector.UD, field=encoding)
        if self.current is None:
            return self.fail_invalid("vmwrite", field=encoding)
        if not exists(encoding, self.capabilities):
            return self.fail("vmwrite", E.UNSUPPORTED_COMPONENT, field=encoding)
        if is_read_only(encoding) and not self.capabilities.misc.vmwrite_any_field:
            return self.fail("vmwrite", E.VMWRITE_READ_ONLY_COMPONENT, field=encoding)
        self.current.write(encoding, value)
        return self.succeed("vmwrite", count=1)

    # --- INVEPT, INVVPID, VMCALL ---------------------------------------------------------------------------

    def invept(self, kind: int, eptp: int) -> PredictedOutcome:
        """INVEPT (31.3) with a descriptor whose upper half is 0."""
        cap = self.capabilities.ept_vpid
        if self.vmxon_pointer is None or not cap.invept:
            return self.fault("invept", Vector.UD)
        supported = {1: cap.invept_single_context, 2: cap.invept_all_context}
        if not supported.get(kind, False):
            return self._fail_by_type("invept", supported.get(kind & 0xFFFF_FFFF, False))
        if kind == 1 and EPTPointer.from_bits(eptp).check(cap, self.width):
            return self.fail("invept", E.INVALID_OPERAND_TO_INVEPT_INVVPID)
        return self.succeed("invept")

    def invvpid(self, kind: int, vpid: int, linear_address: int) -> PredictedOutcome:
        """INVVPID (31.3); `vpid` is the whole lower half of the descriptor."""
        cap = self.capabilities.ept_vpid
        if self.vmxon_pointer is None or not cap.invvpid:
            return self.fault("invvpid", Vector.UD)
        supported = {
            0: cap.invvpid_individual_address,
            1: cap.invvpid_single_context,
            2: cap.invvpid_all_context,
            3: cap.invvpid_single_context_retaining_globals,
        }
        if not supported.get(kind, False):
            return self._fail_by_type("invvpid", supported.get(kind & 0xFFFF_FFFF, False))
        bad = vpid >> 16 or (kind != 2 and not vpid)
        if not bad and kind == 0 and not _canonical_in_48_bits(linear_address):
            if _canonical_in_57_bits(linear_address):
                raise CannotTell("whether the processor has 57-bit linear addresses")
            bad = True
        if bad:
            return self.fail("invvpid", E.INVALID_OPERAND_TO_INVEPT_INVVPID)
        return self.succeed("invvpid")

    def _fail_by_type(self, operation: str, lower_half_is_good: bool) -> PredictedOutcome:
        """INVEPT or INVVPID of a type that is not supported."""
        outcome = self.fail(operation, E.INVALID_OPERAND_TO_INVEPT_INVVPID)
        return replace(outcome, rules=(*outcome.rules, TYPE_HAS_64_BITS)) if lower_half_is_good else outcome

    def vmcall(self) -> PredictedOutcome:
        """VMCALL in VMX root operation without an SMM-transfer monitor: VMfail(1) (31.3)."""
        if self.vmxon_pointer is None:
            return self.fault("vmcall", Vector.UD)
        return self.fail("vmcall", E.VMCALL_IN_VMX_ROOT_OPERATION)

    # --- VM entry ------------------------------------------------------------------------------------------

    def may_enter(self, *, resume: bool) -> PredictedOutcome | None:
        """The checks that VMLAUNCH and VMRESUME make before all others (27.1); None where they pass."""
        operation = "vmresume" if resume else "vmlaunch"
        if self.vmxon_pointer is None:
            return self.fault(operation, Vector.UD)
        if self.current is None:
            return self.fail_invalid(operation)
        if self.current.shadow:
            return replace(self.fail_invalid(operation), rules=(SHADOW_IS_NOT_ENTERED, _CONVENTIONS))
        if resume and not self.current.launched:
            return self.fail(operation, E.VMRESUME_NON_LAUNCHED_VMCS)
        if not resume and self.current.launched:
            return self.fail(operation, E.VMLAUNCH_NON_CLEAR_VMCS)
        return None

    def fail_entry(self, operation: str, how: NotEntered) -> PredictedOutcome:
        """VMfailValid of a VM entry whose checks on controls or host state fail (27.2)."""
        assert how.error is not None
        outcome = self.fail(operation, E(how.error))
        return replace(outcome, rules=how.rules)

    # --- control registers ---------------------------------------------------------------------------------

    def set_control_register(self, value: int, *, cr4: bool) -> PredictedOutcome:
        """MOV to CR0 or CR4 in L1 (23.8: in VMX operation the fixed bits are enforced)."""
        operation = "mov-cr4" if cr4 else "mov-cr0"
        have = self.cr4 if cr4 else self.cr0
        if self.vmxon_pointer is not None and not self._fits_fixed(value, cr4=cr4):
            return self.fault(operation, Vector.GP)
        harmless = int(CR4.VMXE | CR4.TSD | CR4.DE | CR4.PCE if cr4 else CR0.TS | CR0.MP | CR0.EM | CR0.NE)
        if (value ^ have) & ~harmless:
            raise CannotTell(f"what MOV of {value:#x} to {operation[-3:].upper()} does to L1")
        if cr4:
            self.cr4 = value
        else:
            self.cr0 = value
        return PredictedOutcome(
            operation, "ok", rules=(Rule("restrictions on VMX operation", "Vol. 3C, 24.8"),)
        )

    def _fits_fixed(self, value: int, *, cr4: bool) -> bool:
        return (self.capabilities.cr4 if cr4 else self.capabilities.cr0).allows(value)

    # --- memory --------------------------------------------------------------------------------------------

    def _is_address(self, region: int) -> bool:
        return not region & 0xFFF and not region >> self.width

    def _revision(self, region: int) -> int:
        revision = self.memory.read(region, 4)
        if revision is None:
            raise CannotTell(f"the first word of the memory at {region:#x}")
        return revision

    def _scribble(self, region: int) -> None:
        """VMCS data is in an implementation-specific format (25.2): only the first word is known."""
        self.memory.forget(region + 4, 4096 - 4)


def _monitor_control_registers(capabilities: Capabilities) -> tuple[int, int]:
    """CR0 and CR4 of L1: what guest/vmx/operation.c makes of the fixed bits."""
    cr0 = (CR0.PG | CR0.WP | CR0.NE | CR0.ET | CR0.PE | capabilities.cr0_fixed0) & capabilities.cr0_fixed1
    cr4 = (CR4.PAE | CR4.VMXE | capabilities.cr4_fixed0) & capabilities.cr4_fixed1
    return int(cr0), int(cr4)


def _canonical_in_48_bits(address: int) -> bool:
    return address >> 47 in (0, (1 << 17) - 1)


def _canonical_in_57_bits(address: int) -> bool:
    return address >> 56 in (0, (1 << 8) - 1)
