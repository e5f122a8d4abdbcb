"""What an engine's VM entry does otherwise than SDM Vol. 3C, chapter 27, says: the minimal case of each."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, MsrArea, on
from vmxlab.cases.controls import compute_controls
from vmxlab.console.entries import SeenEntry, seen_entry
from vmxlab.oracle.entry import EntryOutcome
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    SecondaryControls,
)
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4
from vmxlab.structures import VmxBasic

HLT = b"\xf4"
ENTERS = SeenEntry(EntryOutcome.ENTERS)
INVALID_CONTROLS = SeenEntry(EntryOutcome.INVALID_CONTROLS)
INVALID_HOST_STATE = SeenEntry(EntryOutcome.INVALID_HOST_STATE)
INVALID_GUEST_STATE = SeenEntry(EntryOutcome.INVALID_GUEST_STATE, 0)
UNRESTRICTED = (SecondaryControls.UNRESTRICTED_GUEST, SecondaryControls.ENABLE_EPT)


def entry(vmxlab, **case) -> SeenEntry:
    return seen_entry(vmxlab.run(Case(program=HLT, **case)))


@pytest.mark.vmx_known_difference("entry-cs-dpl-against-its-rpl")
def test_rpl_of_cs_is_free_for_an_unrestricted_guest(vmxlab):
    """Vol. 3C, 27.3.1.2: DPL of CS is that of SS; its RPL is held against SS only of a restricted guest."""
    assert entry(vmxlab, enable=UNRESTRICTED, fields={Field.GUEST_CS_SELECTOR: 0x0B}) == ENTERS


@pytest.mark.vmx_known_difference("entry-data-segment-dpl-of-readable-code")
@pytest.mark.parametrize("register", ["DS", "ES", "FS", "GS"])
def test_dpl_of_readable_code_in_a_data_segment_is_not_below_rpl(vmxlab, register):
    """Vol. 3C, 27.3.1.2: DPL is at least RPL for each type from 0 to 11."""
    fields = {
        Field[f"GUEST_{register}_SELECTOR"]: 0x13,
        Field[f"GUEST_{register}_ACCESS_RIGHTS"]: 0xC09B,
    }
    assert entry(vmxlab, disable=SecondaryControls.UNRESTRICTED_GUEST, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-debugctl-not-checked")
@pytest.mark.parametrize("bit", [3, 5, 16, 63])
def test_reserved_bits_of_debugctl_are_0(vmxlab, bit):
    """Vol. 3C, 27.3.1.1: with "load debug controls", bits reserved in IA32_DEBUGCTL must be 0."""
    case = {"enable": EntryControls.LOAD_DEBUG_CONTROLS, "fields": {Field.GUEST_IA32_DEBUGCTL: 1 << bit}}
    assert entry(vmxlab, **case) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-failure-writes-instruction-length")
def test_failed_entry_leaves_the_instruction_length_alone(vmxlab):
    """Vol. 3C, 27.8: but for exit reason and qualification, it is that of the exit before: CPUID's, 2."""
    break_it = on(ExitReason.CPUID).vmwrite("GUEST_RFLAGS", 0).resume()
    run = vmxlab.run(Case(program="cpuid", reactions=[break_it]))
    assert run.reasons == [ExitReason.CPUID, ExitReason.ENTRY_FAILURE_GUEST_STATE]
    assert [exit_.instruction_length for exit_ in run.exits] == [2, 2]


@pytest.mark.vmx_known_difference("entry-error-code-of-any-event")
def test_an_error_code_goes_only_with_a_hardware_exception(vmxlab):
    """Vol. 3C, 27.2.1.3: of another type "deliver error code" is 0; IA32_VMX_BASIC[56] is about vectors."""
    vmxlab.require(VmxBasic.error_code_any_vector)
    assert entry(vmxlab, fields={Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0A02}) == INVALID_CONTROLS


@pytest.mark.vmx_known_difference("entry-host-cet-without-wp")
def test_cet_of_the_host_needs_wp(vmxlab):
    """Vol. 3C, 27.2.2: where CR4.CET of the host is 1, CR0.WP is 1."""
    vmxlab.require(CR4.CET)
    cr0 = int(CR0.PG | CR0.NE | CR0.ET | CR0.PE)
    fields = {Field.HOST_CR0: cr0, Field.HOST_CR4: int(CR4.PAE | CR4.VMXE | CR4.CET)}
    assert entry(vmxlab, fields=fields) == INVALID_HOST_STATE


@pytest.mark.vmx_known_difference("entry-ia32e-guest-without-paging")
def test_ia32e_mode_needs_paging(vmxlab):
    """Vol. 3C, 27.3.1.1: with "IA-32e mode guest" CR0.PG must be 1, of an unrestricted guest as well."""
    fields = {Field.GUEST_CR0: int(CR0.NE | CR0.ET | CR0.PE)}
    assert entry(vmxlab, enable=UNRESTRICTED, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-nmi-over-virtual-nmi-blocking")
def test_no_nmi_is_injected_over_virtual_nmi_blocking(vmxlab):
    """Vol. 3C, 27.3.1.5: with "virtual NMIs", where an NMI is injected blocking by NMI must be 0."""
    fields = {Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0202, Field.GUEST_INTERRUPTIBILITY_STATE: 8}
    controls = (PinControls.VIRTUAL_NMIS, PinControls.NMI_EXITING)
    assert entry(vmxlab, enable=controls, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-pending-debug-upper-half")
@pytest.mark.parametrize("bit", [32, 63])
def test_the_upper_half_of_pending_debug_exceptions_is_0(vmxlab, bit):
    """Vol. 3C, 27.3.1.5: bits 63:17 of the pending debug exceptions must be 0."""
    assert entry(vmxlab, fields={Field.GUEST_PENDING_DEBUG_EXCEPTIONS: 1 << bit}) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-pending-single-step-not-checked")
@pytest.mark.parametrize(("flags", "pending"), [(0x302, 0), (0x202, 1 << 14)])
def test_a_pending_single_step_goes_with_tf(vmxlab, flags, pending):
    """Vol. 3C, 27.3.1.5: with blocking by STI, BS of the pending debug exceptions is 1 if TF is, else 0."""
    fields = {
        Field.GUEST_RFLAGS: flags,
        Field.GUEST_INTERRUPTIBILITY_STATE: 1,
        Field.GUEST_PENDING_DEBUG_EXCEPTIONS: pending,
    }
    assert entry(vmxlab, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-perf-global-ctrl-not-checked")
def test_reserved_bits_of_perf_global_ctrl_of_the_guest_are_0(vmxlab):
    """Vol. 3C, 27.3.1.1: with "load IA32_PERF_GLOBAL_CTRL", bits reserved in that MSR must be 0."""
    controls = EntryControls.LOAD_IA32_PERF_GLOBAL_CTRL
    fields = {Field.GUEST_IA32_PERF_GLOBAL_CTRL: 1 << 63}
    assert entry(vmxlab, enable=controls, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("entry-perf-global-ctrl-not-checked")
def test_reserved_bits_of_perf_global_ctrl_of_the_host_are_0(vmxlab):
    """Vol. 3C, 27.2.2: the same of the host's field, with the VM-exit control."""
    controls = ExitControls.LOAD_IA32_PERF_GLOBAL_CTRL
    assert (
        entry(vmxlab, enable=controls, fields={Field.HOST_IA32_PERF_GLOBAL_CTRL: 1 << 63})
        == INVALID_HOST_STATE
    )


@pytest.mark.vmx_known_difference("entry-to-smm-as-guest-state")
def test_entry_to_smm_outside_smm_is_an_invalid_control(vmxlab):
    """Vol. 3C, 27.2.1.3: outside of SMM "entry to SMM" must be 0; 27.2: VMfailValid(7) where it is not."""
    value = compute_controls(Case(program=HLT), vmxlab.capabilities)[ControlSet.ENTRY]
    raw = {ControlSet.ENTRY: value | EntryControls.ENTRY_TO_SMM}
    assert entry(vmxlab, raw_controls=raw) == INVALID_CONTROLS


@pytest.mark.vmx_known_difference("entry-virtual-8086-without-protection")
def test_virtual_8086_mode_needs_protection(vmxlab):
    """Vol. 3C, 27.3.1.4: RFLAGS.VM must be 0 where CR0.PE is 0."""
    fields = {Field.GUEST_RFLAGS: 0x2_0002}
    for register in ("ES", "CS", "SS", "DS", "FS", "GS"):
        fields[Field[f"GUEST_{register}_ACCESS_RIGHTS"]] = 0xF3
    assert entry(vmxlab, mode=Mode.REAL, fields=fields) == INVALID_GUEST_STATE


@pytest.mark.vmx_known_difference("kvm-loads-noncanonical-sysenter")
@pytest.mark.parametrize("msr", [Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP])
def test_loading_a_noncanonical_sysenter_address_fails(vmxlab, msr):
    """Vol. 3C, 27.4: loading an MSR fails where WRMSR would be #GP(0)."""
    seen = entry(vmxlab, entry_msr_load=MsrArea([(msr, 1 << 63)]))
    assert seen == SeenEntry(EntryOutcome.MSR_LOADING_FAILS, 1)


@pytest.mark.vmx_known_difference("kvm-vmwrite-drops-access-rights-bits")
@pytest.mark.parametrize("bit", [8, 11, 17, 31])
def test_reserved_access_rights_bits_of_a_usable_segment_are_0(vmxlab, bit):
    """Vol. 3C, 27.3.1.2: bits 11:8 and 31:17 of the access rights must be 0."""
    assert entry(vmxlab, fields={Field.GUEST_DS_ACCESS_RIGHTS: 0xC093 | 1 << bit}) == INVALID_GUEST_STATE
