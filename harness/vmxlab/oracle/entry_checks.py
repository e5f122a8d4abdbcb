"""Whether a VM entry passes its checks: the rules of `vmxlab.oracle.entry`, asked about a model VMCS.

The rules are asked at the first entry, and again where a field has changed in a way that is not plainly
harmless since the last one: what a VM exit saves can be loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmxlab.oracle.entry import EntryOutcome, EntryVerdict, Environment, check_entry
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.values import Bits, CannotTell, Rule, Unknown, Value
from vmxlab.oracle.vmcs import ModelVmcs
from vmxlab.sdm.controls import ControlSet, EntryControls, PinControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.registers import CR4


@dataclass(frozen=True, slots=True)
class NotEntered:
    """How a VM entry fails: VMfailValid(`error`), or an exit with `reason` (33, 34) and `qualification`."""

    rules: tuple[Rule, ...]
    error: int | None = None
    reason: int | None = None
    qualification: Value = 0


_ERRORS = {EntryOutcome.INVALID_CONTROLS: 7, EntryOutcome.INVALID_HOST_STATE: 8}
_REASONS = {EntryOutcome.INVALID_GUEST_STATE: 33, EntryOutcome.MSR_LOADING_FAILS: 34}
_HARMLESS = frozenset({Field.GUEST_RSP, Field.EXCEPTION_BITMAP})


def entry_checks(
    vmcs: ModelVmcs, *, width: int, memory: MachineMemory, current: int, valid: Mapping[Field, Bits]
) -> NotEntered | None:
    """None where the entry passes all checks. Raises CannotTell where that is not known.

    `current`: the current-VMCS pointer. `valid`: fields as a VM exit has saved them; empty before the first.
    """
    if valid and not _changed(vmcs, valid) and not _reads_memory(vmcs):
        return None
    fields = {
        field: value.value
        for field, value in vmcs.values.items()
        if value.knows((1 << field.bits) - 1) or valid.get(field) == value
    }
    capabilities = vmcs.capabilities
    environment = Environment(
        capabilities=capabilities,
        maxphyaddr=width,
        linear_address_width=57 if capabilities.cr4_fixed1 & CR4.LA57 else 48,
        current_vmcs=current,
        read=memory.read_bytes,
    )
    return _failure(check_entry(fields, environment))


def _changed(vmcs: ModelVmcs, valid: Mapping[Field, Bits]) -> bool:
    """Whether a field is not as it was when it was known to be good."""
    for field, value in vmcs.values.items():
        if field.type == FieldType.EXIT_INFORMATION or field in _HARMLESS or valid.get(field) == value:
            continue
        if field is Field.GUEST_RIP and value.known and not value.value >> 31:
            continue  # good in any mode: canonical, and below 4 GiB
        return True
    return False


def _reads_memory(vmcs: ModelVmcs) -> bool:
    """Whether a check looks at memory, which may be another since: VTPR, PDPTEs, a shadow VMCS."""
    primary, secondary = vmcs.get(Field.PRIMARY_PROCESSOR_BASED_CONTROLS), vmcs.secondary()
    has_pdptes = vmcs.get(Field.GUEST_CR4) & CR4.PAE and not (
        secondary & SecondaryControls.ENABLE_EPT
        or vmcs.get(Field.ENTRY_CONTROLS) & EntryControls.IA32E_MODE_GUEST
    )
    return bool(
        primary & PrimaryControls.USE_TPR_SHADOW or secondary & SecondaryControls.VMCS_SHADOWING or has_pdptes
    )


def _failure(verdict: EntryVerdict) -> NotEntered | None:
    outcomes = verdict.outcomes
    if len(outcomes) != 1:
        why = str(verdict.unchecked[0]) if verdict.unchecked else "the SDM leaves the order of checks open"
        raise CannotTell(f"how VM entry ends: {why}")
    (outcome,) = outcomes
    if outcome is EntryOutcome.ENTERS:
        return None
    rules = tuple(Rule(broken.rule.name, broken.rule.section) for broken in verdict.broken)
    if outcome in _ERRORS:
        return NotEntered(rules, error=_ERRORS[outcome])
    is_msr = outcome is EntryOutcome.MSR_LOADING_FAILS
    possible = verdict.msr_qualifications if is_msr else verdict.qualifications
    qualification: Value = Unknown("several checks fail, in any order")
    if len(possible) == 1:
        (qualification,) = possible
    return NotEntered(rules, reason=_REASONS[outcome], qualification=qualification)


# --- controls whose effect on L2 is known ------------------------------------------------------------------

_P, _S = PrimaryControls, SecondaryControls
_KNOWN: dict[ControlSet, int] = {
    ControlSet.PIN: int(
        PinControls.EXTERNAL_INTERRUPT_EXITING
        | PinControls.NMI_EXITING
        | PinControls.VIRTUAL_NMIS
        | PinControls.ACTIVATE_PREEMPTION_TIMER
    ),
    ControlSet.PRIMARY: int(
        _P.INTERRUPT_WINDOW_EXITING | _P.USE_TSC_OFFSETTING | _P.HLT_EXITING | _P.INVLPG_EXITING
        | _P.MWAIT_EXITING | _P.RDPMC_EXITING | _P.RDTSC_EXITING | _P.CR3_LOAD_EXITING | _P.CR3_STORE_EXITING
        | _P.CR8_LOAD_EXITING | _P.CR8_STORE_EXITING | _P.USE_TPR_SHADOW | _P.NMI_WINDOW_EXITING
        | _P.MOV_DR_EXITING | _P.UNCONDITIONAL_IO_EXITING | _P.USE_IO_BITMAPS | _P.MONITOR_TRAP_FLAG
        | _P.USE_MSR_BITMAPS | _P.MONITOR_EXITING | _P.PAUSE_EXITING | _P.ACTIVATE_SECONDARY_CONTROLS
    ),
    ControlSet.SECONDARY: int(
        _S.ENABLE_EPT | _S.DESCRIPTOR_TABLE_EXITING | _S.ENABLE_RDTSCP | _S.WBINVD_EXITING
        | _S.UNRESTRICTED_GUEST | _S.RDRAND_EXITING | _S.ENABLE_INVPCID | _S.RDSEED_EXITING
        | _S.ENABLE_USER_WAIT_AND_PAUSE | _S.MODE_BASED_EXECUTE_CONTROL_FOR_EPT
        | _S.ENABLE_VPID | _S.ENABLE_VM_FUNCTIONS | _S.VMCS_SHADOWING | _S.PAUSE_LOOP_EXITING
        | _S.ENABLE_XSAVES | _S.ENABLE_PML | _S.USE_TSC_SCALING | _S.CONCEAL_VMX_FROM_PT
        # What they do is asked for where an access would show it (`vmxlab.oracle.ept`, `processor.paging`).
        | _S.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT | _S.EPT_VIOLATION_VE
    ),
    ControlSet.TERTIARY: 0,
}  # fmt: skip


def refuse_unknown_controls(vmcs: ModelVmcs) -> None:
    """CannotTell for controls that change what L2 does in a way that is not modelled."""
    for controls, known in _KNOWN.items():
        field = controls.field
        if not vmcs.has(field) or field not in vmcs.values:
            continue
        if controls is ControlSet.SECONDARY and not vmcs.secondary():
            continue
        unknown = vmcs.get(field) & ~known & ~controls.default1
        if unknown:
            raise CannotTell(f"{controls.flags(unknown).describe()} is 1")
