"""Checks on the rest of the guest state: descriptor tables, RIP and RFLAGS, non-register state, PDPTEs
(SDM Vol. 3C, 27.3.1.3 to 27.3.1.6).
"""

from __future__ import annotations

from vmxlab.oracle.entry import reserved
from vmxlab.oracle.entry.rule import Area, EntryQualification, NotChecked, RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import EntryControls, PinControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import CR0, CR4, RFLAGS, ActivityState, InterruptibilityState, Vector

DESCRIPTOR_TABLES = RuleTable(Area.GUEST_STATE, "27.3.1.3")
RIP_RFLAGS = RuleTable(Area.GUEST_STATE, "27.3.1.4")
NON_REGISTER = RuleTable(Area.GUEST_STATE, "27.3.1.5")
PDPTES = RuleTable(Area.GUEST_STATE, "27.3.1.6")
TABLES = (DESCRIPTOR_TABLES, RIP_RFLAGS, NON_REGISTER, PDPTES)

_NO_LINK = (1 << 64) - 1
_SHADOW_INDICATOR = 1 << 31
_L = 1 << 13
_RFLAGS_RESERVED = ~0x3F_FFFF | 1 << 15 | 1 << 5 | 1 << 3
_PENDING_RESERVED = ~0x1_580F  # 63:17, 15, 13 and 10:4; bit 11 is BLD, 16 is RTM
_PENDING_BLD, _PENDING_ENABLED, _PENDING_BS, _PENDING_RTM = 1 << 11, 1 << 12, 1 << 14, 1 << 16
_DEBUGCTL_BTF = 1 << 1
_State = InterruptibilityState


# --- 27.3.1.3 ----------------------------------------------------------------------------------------------


def _limit(register: str) -> None:
    field = Field[f"GUEST_{register}_LIMIT"]
    DESCRIPTOR_TABLES.add(
        f"guest-{register.lower()}-limit",
        f"Bits 31:16 of the limit of {register} are 0.",
        lambda vmcs: not vmcs[field] >> 16,
        [field],
    )


for _name in ("GDTR", "IDTR"):
    reserved.canonical_address(
        DESCRIPTOR_TABLES, Field[f"GUEST_{_name}_BASE"], f"The base of {_name} of the guest"
    )
    _limit(_name)


# --- 27.3.1.4 ----------------------------------------------------------------------------------------------


def _code_is_64_bit(vmcs: Vmcs) -> bool:
    return vmcs.ia32e and bool(vmcs[Field.GUEST_CS_ACCESS_RIGHTS] & _L)


@RIP_RFLAGS.rule(Field.GUEST_RIP, Field.GUEST_CS_ACCESS_RIGHTS)
def guest_rip_32_bit(vmcs: Vmcs) -> bool:
    """Outside of 64-bit mode (IA-32e mode with CS.L 1), bits 63:32 of RIP are 0."""
    return _code_is_64_bit(vmcs) or not vmcs[Field.GUEST_RIP] >> 32


@RIP_RFLAGS.rule(Field.GUEST_RIP, Field.GUEST_CS_ACCESS_RIGHTS)
def guest_rip_64_bit(vmcs: Vmcs) -> bool:
    """In 64-bit mode, the bits of RIP beyond the linear-address width are all the same."""
    # The check is of bits 63:N, N the width: bit N-1 may be another.
    upper = vmcs[Field.GUEST_RIP] >> vmcs.environment.linear_address_width
    same = upper in (0, (1 << 64 - vmcs.environment.linear_address_width) - 1)
    return not _code_is_64_bit(vmcs) or same


@RIP_RFLAGS.rule(Field.GUEST_RFLAGS)
def guest_rflags_reserved(vmcs: Vmcs) -> bool:
    """Bits 63:22, 15, 5 and 3 of RFLAGS are 0, and bit 1 is 1."""
    flags = vmcs[Field.GUEST_RFLAGS]
    return not flags & _RFLAGS_RESERVED and bool(flags & RFLAGS.FIXED1)


@RIP_RFLAGS.rule(Field.GUEST_RFLAGS, Field.GUEST_CR0)
def guest_rflags_vm(vmcs: Vmcs) -> bool:
    """RFLAGS.VM is 0 in IA-32e mode, and where CR0.PE is 0."""
    return not vmcs.virtual_8086 or (not vmcs.ia32e and vmcs.protected)


@RIP_RFLAGS.rule(Field.GUEST_RFLAGS, Field.ENTRY_INTERRUPTION_INFORMATION)
def guest_rflags_if(vmcs: Vmcs) -> bool:
    """RFLAGS.IF is 1 where an external interrupt is injected."""
    injects = vmcs.injects_type(InterruptionType.EXTERNAL_INTERRUPT)
    return not injects or bool(vmcs[Field.GUEST_RFLAGS] & RFLAGS.IF)


@RIP_RFLAGS.rule(Field.GUEST_SSP, when=[EntryControls.LOAD_CET_STATE])
def guest_ssp_alignment(vmcs: Vmcs) -> bool:
    """Bits 1:0 of SSP are 0."""
    return not vmcs[Field.GUEST_SSP] & 3


@RIP_RFLAGS.rule(Field.GUEST_SSP, Field.GUEST_CS_ACCESS_RIGHTS, when=[EntryControls.LOAD_CET_STATE])
def guest_ssp_address(vmcs: Vmcs) -> bool:
    """SSP is canonical in 64-bit mode; else its bits 63:32 are 0."""
    ssp = vmcs[Field.GUEST_SSP]
    return vmcs.canonical(ssp) if _code_is_64_bit(vmcs) else not ssp >> 32


# --- 27.3.1.5: activity state ------------------------------------------------------------------------------


@NON_REGISTER.rule(Field.GUEST_ACTIVITY_STATE)
def guest_activity_state_supported(vmcs: Vmcs) -> bool:
    """The activity state is 0 to 3, and one that IA32_VMX_MISC[8:6] names."""
    return vmcs[Field.GUEST_ACTIVITY_STATE] in vmcs.capability(lambda: vmcs.capabilities.misc.activity_states)


@NON_REGISTER.rule(Field.GUEST_ACTIVITY_STATE, Field.GUEST_SS_ACCESS_RIGHTS)
def guest_hlt_needs_cpl_0(vmcs: Vmcs) -> bool:
    """The activity state is not HLT where DPL of SS is not 0."""
    return vmcs[Field.GUEST_ACTIVITY_STATE] != ActivityState.HLT or not (
        vmcs[Field.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3
    )


@NON_REGISTER.rule(Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_inactive_excludes_blocking(vmcs: Vmcs) -> bool:
    """The activity state is active where there is blocking by STI or by MOV SS."""
    blocking = vmcs[Field.GUEST_INTERRUPTIBILITY_STATE] & (_State.BLOCKING_BY_STI | _State.BLOCKING_BY_MOV_SS)
    return not blocking or vmcs[Field.GUEST_ACTIVITY_STATE] == ActivityState.ACTIVE


@NON_REGISTER.rule(Field.GUEST_ACTIVITY_STATE, Field.ENTRY_INTERRUPTION_INFORMATION)
def guest_activity_state_takes_event(vmcs: Vmcs) -> bool:
    """An injected event is one that the activity state does not block: HLT takes external interrupts, NMIs,
    #DB, #MC and a pending MTF VM exit; shutdown NMIs and #MC; wait-for-SIPI none.
    """
    event = vmcs.injects
    if not event.valid:
        return True
    exception = event.vector if event.type is InterruptionType.HARDWARE_EXCEPTION else None
    match vmcs[Field.GUEST_ACTIVITY_STATE]:
        case ActivityState.HLT:
            return (
                event.type in (InterruptionType.EXTERNAL_INTERRUPT, InterruptionType.NMI)
                or exception in (Vector.DB, Vector.MC)
                or (event.type is InterruptionType.OTHER_EVENT and event.vector == 0)
            )
        case ActivityState.SHUTDOWN:
            return event.type is InterruptionType.NMI or exception == Vector.MC
        case ActivityState.WAIT_FOR_SIPI:
            return False
    return True


@NON_REGISTER.rule(Field.GUEST_ACTIVITY_STATE, when=[EntryControls.ENTRY_TO_SMM])
def guest_wait_for_sipi_outside_smm(vmcs: Vmcs) -> bool:
    """In SMM, with "entry to SMM", the activity state is not wait-for-SIPI."""
    # Outside of SMM the control itself is refused, and nothing of the guest state is looked at.
    return not vmcs.environment.in_smm or vmcs[Field.GUEST_ACTIVITY_STATE] != ActivityState.WAIT_FOR_SIPI


# --- 27.3.1.5: interruptibility state ----------------------------------------------------------------------


def _blocked(vmcs: Vmcs, state: InterruptibilityState) -> bool:
    return bool(vmcs[Field.GUEST_INTERRUPTIBILITY_STATE] & state)


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_interruptibility_reserved(vmcs: Vmcs) -> bool:
    """Bits 31:5 of the interruptibility state are 0."""
    return not vmcs[Field.GUEST_INTERRUPTIBILITY_STATE] >> 5


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_blocking_by_sti_and_mov_ss(vmcs: Vmcs) -> bool:
    """There is not blocking by STI and by MOV SS at once."""
    return not (_blocked(vmcs, _State.BLOCKING_BY_STI) and _blocked(vmcs, _State.BLOCKING_BY_MOV_SS))


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE, Field.GUEST_RFLAGS)
def guest_blocking_by_sti_needs_if(vmcs: Vmcs) -> bool:
    """There is no blocking by STI where RFLAGS.IF is 0."""
    return not _blocked(vmcs, _State.BLOCKING_BY_STI) or bool(vmcs[Field.GUEST_RFLAGS] & RFLAGS.IF)


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE, Field.ENTRY_INTERRUPTION_INFORMATION)
def guest_injected_interrupt_is_not_blocked(vmcs: Vmcs) -> bool:
    """Where an external interrupt is injected there is no blocking by STI or by MOV SS."""
    blocked = _blocked(vmcs, _State.BLOCKING_BY_STI | _State.BLOCKING_BY_MOV_SS)
    return not (blocked and vmcs.injects_type(InterruptionType.EXTERNAL_INTERRUPT))


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE, Field.ENTRY_INTERRUPTION_INFORMATION)
def guest_injected_nmi_is_not_blocked_by_mov_ss(vmcs: Vmcs) -> bool:
    """Where an NMI is injected there is no blocking by MOV SS."""
    return not (_blocked(vmcs, _State.BLOCKING_BY_MOV_SS) and vmcs.injects_type(InterruptionType.NMI))


@NON_REGISTER.rule(
    Field.GUEST_INTERRUPTIBILITY_STATE,
    Field.ENTRY_INTERRUPTION_INFORMATION,
    qualification=EntryQualification.NMI_INJECTION,
)
def guest_injected_nmi_is_not_blocked_by_sti(vmcs: Vmcs) -> bool:
    """Where an NMI is injected there is no blocking by STI, on processors that demand it."""
    if _blocked(vmcs, _State.BLOCKING_BY_STI) and vmcs.injects_type(InterruptionType.NMI):
        raise NotChecked("whether the processor lets an NMI be injected over blocking by STI is not known")
    return True


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_blocking_by_smi(vmcs: Vmcs) -> bool:
    """Outside of SMM there is no blocking by SMI."""
    return vmcs.environment.in_smm or not _blocked(vmcs, _State.BLOCKING_BY_SMI)


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE, when=[EntryControls.ENTRY_TO_SMM])
def guest_entry_to_smm_needs_blocking_by_smi(vmcs: Vmcs) -> bool:
    """In SMM, with "entry to SMM", there is blocking by SMI."""
    return not vmcs.environment.in_smm or _blocked(vmcs, _State.BLOCKING_BY_SMI)


@NON_REGISTER.rule(
    Field.GUEST_INTERRUPTIBILITY_STATE,
    Field.ENTRY_INTERRUPTION_INFORMATION,
    when=[PinControls.VIRTUAL_NMIS],
)
def guest_injected_nmi_is_not_blocked_by_nmi(vmcs: Vmcs) -> bool:
    """With "virtual NMIs", where an NMI is injected there is no blocking by NMI."""
    return not (_blocked(vmcs, _State.BLOCKING_BY_NMI) and vmcs.injects_type(InterruptionType.NMI))


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_enclave_interruption_excludes_mov_ss(vmcs: Vmcs) -> bool:
    """With enclave interruption there is no blocking by MOV SS."""
    both = _State.ENCLAVE_INTERRUPTION | _State.BLOCKING_BY_MOV_SS
    return vmcs[Field.GUEST_INTERRUPTIBILITY_STATE] & both != both


@NON_REGISTER.rule(Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_enclave_interruption_needs_sgx(vmcs: Vmcs) -> bool:
    """Enclave interruption is 0 on a processor without SGX."""
    if not _blocked(vmcs, _State.ENCLAVE_INTERRUPTION):
        return True
    if vmcs.capabilities.supports(SecondaryControls.ENABLE_ENCLS_EXITING):
        return True
    raise NotChecked("whether the processor has SGX (CPUID.07H.0:EBX[2]) is not known")


# --- 27.3.1.5: pending debug exceptions --------------------------------------------------------------------


@NON_REGISTER.rule(Field.GUEST_PENDING_DEBUG_EXCEPTIONS)
def guest_pending_debug_reserved(vmcs: Vmcs) -> bool:
    """Bits 63:17, 15, 13 and 10:4 of the pending debug exceptions are 0."""
    return not vmcs[Field.GUEST_PENDING_DEBUG_EXCEPTIONS] & _PENDING_RESERVED


@NON_REGISTER.rule(Field.GUEST_PENDING_DEBUG_EXCEPTIONS)
def guest_pending_debug_bus_lock(vmcs: Vmcs) -> bool:
    """Bit 11 (BLD) of the pending debug exceptions is 0 on a processor without bus-lock detection."""
    if vmcs[Field.GUEST_PENDING_DEBUG_EXCEPTIONS] & _PENDING_BLD:
        raise NotChecked("whether the processor has bus-lock detection (CPUID.07H.0:ECX[24]) is not known")
    return True


def _single_step_is_pending(vmcs: Vmcs) -> bool:
    """Whether the state is one in which bit 14 (BS) must say if there is a single-step trap."""
    blocking = _blocked(vmcs, _State.BLOCKING_BY_STI | _State.BLOCKING_BY_MOV_SS)
    return blocking or vmcs[Field.GUEST_ACTIVITY_STATE] == ActivityState.HLT


_STEP_FIELDS = (
    Field.GUEST_PENDING_DEBUG_EXCEPTIONS,
    Field.GUEST_INTERRUPTIBILITY_STATE,
    Field.GUEST_ACTIVITY_STATE,
    Field.GUEST_RFLAGS,
    Field.GUEST_IA32_DEBUGCTL,
)


def _steps(vmcs: Vmcs) -> bool:
    """RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is 0."""
    if not vmcs[Field.GUEST_RFLAGS] & RFLAGS.TF:
        return False
    return not vmcs[Field.GUEST_IA32_DEBUGCTL] & _DEBUGCTL_BTF


@NON_REGISTER.rule(*_STEP_FIELDS)
def guest_pending_single_step_missing(vmcs: Vmcs) -> bool:
    """With blocking by STI or MOV SS, or in HLT, bit 14 (BS) of the pending debug exceptions is 1 where
    RFLAGS.TF is 1 and IA32_DEBUGCTL.BTF is 0.
    """
    if not _single_step_is_pending(vmcs) or not _steps(vmcs):
        return True
    return bool(vmcs[Field.GUEST_PENDING_DEBUG_EXCEPTIONS] & _PENDING_BS)


@NON_REGISTER.rule(*_STEP_FIELDS)
def guest_pending_single_step_without_reason(vmcs: Vmcs) -> bool:
    """With blocking by STI or MOV SS, or in HLT, bit 14 (BS) of the pending debug exceptions is 0 where
    RFLAGS.TF is 0 or IA32_DEBUGCTL.BTF is 1.
    """
    if not vmcs[Field.GUEST_PENDING_DEBUG_EXCEPTIONS] & _PENDING_BS:
        return True
    return not _single_step_is_pending(vmcs) or _steps(vmcs)


@NON_REGISTER.rule(Field.GUEST_PENDING_DEBUG_EXCEPTIONS, Field.GUEST_INTERRUPTIBILITY_STATE)
def guest_pending_rtm(vmcs: Vmcs) -> bool:
    """With bit 16 (RTM) of the pending debug exceptions, bit 12 is 1, all others are 0, there is no blocking
    by MOV SS, and the processor has RTM.
    """
    pending = vmcs[Field.GUEST_PENDING_DEBUG_EXCEPTIONS]
    if not pending & _PENDING_RTM:
        return True
    if pending != _PENDING_RTM | _PENDING_ENABLED or _blocked(vmcs, _State.BLOCKING_BY_MOV_SS):
        return False
    raise NotChecked("whether the processor has RTM (CPUID.07H.0:EBX[11]) is not known")


# --- 27.3.1.5: VMCS link pointer ---------------------------------------------------------------------------

_LINK = EntryQualification.LINK_POINTER


def _link(vmcs: Vmcs) -> int | None:
    pointer = vmcs[Field.VMCS_LINK_POINTER]
    return None if pointer == _NO_LINK else pointer


@NON_REGISTER.rule(Field.VMCS_LINK_POINTER, qualification=_LINK)
def vmcs_link_pointer_alignment(vmcs: Vmcs) -> bool:
    """Bits 11:0 of the VMCS link pointer are 0, unless it is FFFFFFFF_FFFFFFFFH."""
    return not (_link(vmcs) or 0) & 0xFFF


@NON_REGISTER.rule(Field.VMCS_LINK_POINTER, qualification=_LINK)
def vmcs_link_pointer_width(vmcs: Vmcs) -> bool:
    """The VMCS link pointer, unless FFFFFFFF_FFFFFFFFH, sets no bit beyond the physical-address width."""
    return vmcs.fits(_link(vmcs) or 0)


def _linked_word(vmcs: Vmcs) -> int | None:
    """The first 4 bytes of the VMCS that is linked; None where there is none, or its address is wrong."""
    pointer = _link(vmcs)
    if pointer is None or pointer & 0xFFF or not vmcs.fits(pointer):
        return None
    return vmcs.read(pointer, 4)


@NON_REGISTER.rule(Field.VMCS_LINK_POINTER, qualification=_LINK)
def linked_vmcs_revision(vmcs: Vmcs) -> bool:
    """The linked VMCS begins with the processor's VMCS revision identifier."""
    word = _linked_word(vmcs)
    if word is None:
        return True
    revision = vmcs.capability(lambda: vmcs.capabilities.basic.revision_id)
    return word & ~_SHADOW_INDICATOR == revision


@NON_REGISTER.rule(Field.VMCS_LINK_POINTER, qualification=_LINK)
def linked_vmcs_shadow_indicator(vmcs: Vmcs) -> bool:
    """The linked VMCS is a shadow VMCS where "VMCS shadowing" is 1, and an ordinary one where it is 0."""
    word = _linked_word(vmcs)
    if word is None:
        return True
    return bool(word & _SHADOW_INDICATOR) == vmcs.on(SecondaryControls.VMCS_SHADOWING)


@NON_REGISTER.rule(Field.VMCS_LINK_POINTER, qualification=_LINK)
def linked_vmcs_is_not_current(vmcs: Vmcs) -> bool:
    """Outside of SMM the VMCS link pointer is not the current-VMCS pointer."""
    pointer = _link(vmcs)
    if pointer is None or vmcs.environment.in_smm:
        return True
    if vmcs.environment.current_vmcs is None:
        raise NotChecked("the address of the current VMCS is not known")
    return pointer != vmcs.environment.current_vmcs


# --- 27.3.1.6 ----------------------------------------------------------------------------------------------


def _pae_paging(vmcs: Vmcs) -> bool:
    return bool(vmcs[Field.GUEST_CR0] & CR0.PG and vmcs[Field.GUEST_CR4] & CR4.PAE and not vmcs.ia32e)


def _pdpte(number: int) -> None:
    field = Field[f"GUEST_PDPTE{number}"]

    def holds(vmcs: Vmcs) -> bool:
        if not _pae_paging(vmcs):
            return True
        if vmcs.on(SecondaryControls.ENABLE_EPT):
            entry = vmcs[field]
        else:
            entry = vmcs.read((vmcs[Field.GUEST_CR3] & 0xFFFF_FFE0) + 8 * number, 8)
        width = vmcs.environment.maxphyaddr or vmcs.physical_width
        return not entry & 1 or not (entry & 0x1E6 or entry >> width)

    PDPTES.add(
        f"guest-pdpte{number}-reserved",
        f"With PAE paging, reserved bits of PDPTE{number} (2:1, 8:5 and those beyond the physical-address "
        "width) are 0, if it is present.",
        holds,
        [field, Field.GUEST_CR0, Field.GUEST_CR4, Field.GUEST_CR3],
        qualification=EntryQualification.PDPTES,
    )


for _number in range(4):
    _pdpte(_number)
