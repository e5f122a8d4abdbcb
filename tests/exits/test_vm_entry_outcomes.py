"""VM entry in VMX root operation: when VMLAUNCH and VMRESUME fail, how, and what they leave behind.

SDM Vol. 3C, chapter 27: 27.1 basic checks, 27.2 controls and host state, 27.3 guest state, 27.4 MSRs, 27.8
VM-entry failures during or after loading guest state.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Msr, Outcome, OutcomeKind, Run, on
from vmxlab import InstructionError as Error
from vmxlab.cases.steps import Enter, Step, Vmclear, Vmptrld, Vmread, Vmwrite, Vmxon, WriteVmcs
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.registers import CR4

READY = (Vmxon(), Vmclear(), Vmptrld(), WriteVmcs())


def succeeds(outcome: Outcome) -> bool:
    return outcome.kind is OutcomeKind.SUCCEED


def fails_invalid(outcome: Outcome) -> bool:
    return outcome.kind is OutcomeKind.FAIL_INVALID


def fails_valid(outcome: Outcome, error: Error) -> bool:
    return outcome.kind is OutcomeKind.FAIL_VALID and outcome.error == error


def steps(vmxlab, *sequence: Step, **case) -> Run:
    return vmxlab.run(Case(steps=sequence, **case))


# --- VMLAUNCH and VMRESUME ---------------------------------------------------------------------------------


def test_vm_entry_without_a_current_vmcs_fails_invalid(vmxlab):
    """Vol. 3C, 27.1: with no current VMCS, VM entry ends with CF set."""
    run = steps(vmxlab, Vmxon(), Enter(go_on=True), Enter(resume=True, go_on=True))
    assert fails_invalid(run.outcome("vmlaunch"))
    assert fails_invalid(run.outcome("vmresume"))


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vmlaunch_of_a_launched_vmcs_fails(vmxlab):
    """Vol. 3C, 27.1 and 31.3, VMLAUNCH: VMfail(4) where the launch state is not clear; VMRESUME goes on."""
    run = steps(vmxlab, *READY, Enter(), Enter(go_on=True), Enter(resume=True))
    first, second, third = run.outcomes[-3:]
    assert succeeds(first)
    assert fails_valid(second, Error.VMLAUNCH_NON_CLEAR_VMCS)
    assert succeeds(third)
    assert run.reasons == [ExitReason.HLT] * 2


def test_vmresume_of_a_clear_vmcs_fails(vmxlab):
    """Vol. 3C, 27.1 and 31.3, VMRESUME: VMfail(5) where the launch state is not launched; VMLAUNCH works."""
    run = steps(vmxlab, *READY, Enter(resume=True, go_on=True), Enter())
    assert fails_valid(run.outcome("vmresume"), Error.VMRESUME_NON_LAUNCHED_VMCS)
    assert succeeds(run.outcome("vmlaunch"))
    assert run.reasons == [ExitReason.HLT]


def test_vmclear_makes_a_launched_vmcs_clear_and_keeps_its_fields(vmxlab):
    """Vol. 3C, 25.11.3: VMCLEAR sets the launch state to clear; the data stay as they were."""
    run = steps(
        vmxlab, *READY, Enter(), Vmclear(), Vmptrld(), Enter(resume=True, go_on=True), Enter(), program="hlt"
    )
    assert fails_valid(run.outcome("vmresume"), Error.VMRESUME_NON_LAUNCHED_VMCS)
    assert run.reasons == [ExitReason.HLT] * 2
    assert run.exits[0].rip == run.exits[1].rip


def test_launch_state_is_checked_before_the_controls(vmxlab):
    """Vol. 3C, 27.1: the launch state is looked at before the checks of 27.2 on controls and host state."""
    run = steps(vmxlab, *READY, Enter(resume=True, go_on=True), fields={Field.CR3_TARGET_COUNT: 0xFFFF})
    assert fails_valid(run.outcome("vmresume"), Error.VMRESUME_NON_LAUNCHED_VMCS)


def invalid_controls(vmxlab) -> dict[str, dict[Field, int]]:
    """VM-execution, VM-exit and VM-entry control fields that SDM Vol. 3C, 27.2.1 refuses on any processor."""
    return {
        "reserved CR3-target count": {Field.CR3_TARGET_COUNT: vmxlab.capabilities.misc.cr3_target_count + 1},
        "pin-based default1 bit clear": {Field.PIN_BASED_CONTROLS: 0},
        "reserved pin-based bit": {Field.PIN_BASED_CONTROLS: 0xFFFF_FFFF},
        "primary default1 bit clear": {Field.PRIMARY_PROCESSOR_BASED_CONTROLS: 0},
        "exit default1 bit clear": {Field.EXIT_CONTROLS: 0},
        "entry default1 bit clear": {Field.ENTRY_CONTROLS: 0},
        "MSR-load area misaligned": {
            Field.EXIT_MSR_LOAD_COUNT: 1,
            Field.EXIT_MSR_LOAD_ADDRESS: FREE_PAGES + 8,
        },
        "reserved interruption type": {Field.ENTRY_INTERRUPTION_INFORMATION: 1 << 31 | 1 << 8},
    }


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vm_entry_with_invalid_controls_fails(vmxlab):
    """Vol. 3C, 27.2.1: each bad control field is VMfail(7); L2 does not run, the VMCS stays clear."""
    for name, fields in invalid_controls(vmxlab).items():
        launch, resume = (Enter(resume=r, go_on=True, report_vmcs=False) for r in (False, True))
        sequence = (*READY, launch, Vmread(Field.VM_INSTRUCTION_ERROR), resume)
        run = steps(vmxlab, *sequence, fields=fields)
        assert fails_valid(run.outcome("vmlaunch"), Error.ENTRY_INVALID_CONTROL_FIELDS), name
        assert run.outcome("vmread").value == Error.ENTRY_INVALID_CONTROL_FIELDS
        assert fails_valid(run.outcome("vmresume"), Error.VMRESUME_NON_LAUNCHED_VMCS), name
        assert run.exits == ()


def invalid_host_state(vmxlab) -> dict[str, dict[Field, int]]:
    """Host-state fields that SDM Vol. 3C, 27.2.2 to 27.2.4 refuse on any processor with 64-bit mode."""
    cr4 = CR4.PAE | CR4.VMXE | vmxlab.capabilities.cr4_fixed0
    return {
        "CR0 without fixed bits": {Field.HOST_CR0: 0},
        "CR4 without fixed bits": {Field.HOST_CR4: 0},
        "CR4 without PAE": {Field.HOST_CR4: cr4 & ~CR4.PAE},
        "CR3 beyond physical addresses": {Field.HOST_CR3: 1 << vmxlab.lab.target.physical_address_width},
        "CS selector null": {Field.HOST_CS_SELECTOR: 0},
        "TR selector null": {Field.HOST_TR_SELECTOR: 0},
        "TR selector with RPL 3": {Field.HOST_TR_SELECTOR: 0x1B},
        "CS selector with TI": {Field.HOST_CS_SELECTOR: 0x0C},
        "RIP not canonical": {Field.HOST_RIP: 1 << 63},
        "GDTR base not canonical": {Field.HOST_GDTR_BASE: 1 << 63},
        "IDTR base not canonical": {Field.HOST_IDTR_BASE: 1 << 63},
        "FS base not canonical": {Field.HOST_FS_BASE: 1 << 63},
        "GS base not canonical": {Field.HOST_GS_BASE: 1 << 63},
        "TR base not canonical": {Field.HOST_TR_BASE: 1 << 63},
        "SYSENTER_ESP not canonical": {Field.HOST_IA32_SYSENTER_ESP: 1 << 63},
        "SYSENTER_EIP not canonical": {Field.HOST_IA32_SYSENTER_EIP: 1 << 63},
    }


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_vm_entry_with_invalid_host_state_fails(vmxlab):
    """Vol. 3C, 27.2.2 to 27.2.4: each bad host-state field is VMfail(8), and L2 does not run."""
    states = invalid_host_state(vmxlab)
    sequence = (*READY, Enter(report_vmcs=False))  # 150 VMREADs each, which cost most of a second on KVM
    cases = [Case(steps=sequence, fields=fields) for fields in states.values()]
    for name, run in zip(states, vmxlab.run_all(cases), strict=True):
        assert run.entry is not None, name
        assert fails_valid(run.entry, Error.ENTRY_INVALID_HOST_STATE), name
        assert run.exits == (), name


def test_a_failed_entry_can_be_mended_and_tried_again(vmxlab):
    """Vol. 3C, 27.2: after VMfailValid the VMCS is as it was, but for the VM-instruction error field."""
    sequence = (*READY, Enter(go_on=True), Vmwrite(Field.CR3_TARGET_COUNT, 0), Enter())
    run = steps(vmxlab, *sequence, fields={Field.CR3_TARGET_COUNT: 0xFFFF})
    first, second = (outcome for outcome in run.outcomes if outcome.operation == "vmlaunch")
    assert fails_valid(first, Error.ENTRY_INVALID_CONTROL_FIELDS)
    assert succeeds(second)
    assert run.reasons == [ExitReason.HLT]


# --- VM-entry failures after the checks on controls and host state ----------------------------------------


INVALID_GUEST_STATE = {
    "RFLAGS bit 1 clear": {Field.GUEST_RFLAGS: 0},
    "RFLAGS reserved bit 3": {Field.GUEST_RFLAGS: 0xA},
    "activity state not assigned": {Field.GUEST_ACTIVITY_STATE: 4},
    "TR unusable": {Field.GUEST_TR_ACCESS_RIGHTS: 1 << 16},
    "CR4 without PAE": {Field.GUEST_CR4: int(CR4.VMXE)},
    "IDTR limit above 64K": {Field.GUEST_IDTR_LIMIT: 0x1_0000},
    "GDTR base not canonical": {Field.GUEST_GDTR_BASE: 1 << 63},
    "interruptibility reserved bit": {Field.GUEST_INTERRUPTIBILITY_STATE: 1 << 5},
}


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    "fields", INVALID_GUEST_STATE.values(), ids=[name.replace(" ", "-") for name in INVALID_GUEST_STATE]
)
def test_vm_entry_with_invalid_guest_state_exits(vmxlab, fields):
    """Vol. 3C, 27.3 and 27.8: the failure loads the host state; reason 33 with bit 31, qualification 0."""
    run = vmxlab.run(Case(fields=fields))
    assert [exit_.full_reason for exit_ in run.exits] == [1 << 31 | ExitReason.ENTRY_FAILURE_GUEST_STATE]
    assert run.exits[0].entry_failed
    assert run.exits[0].raw_qualification == 0


@pytest.mark.vmx_known_difference("guest-rip-upper-bits")
def test_vm_entry_wants_the_upper_bits_of_rip_to_be_identical(vmxlab):
    """Vol. 3C, 27.3.1.4: for 64-bit code, bits 63:N of RIP are equal, N the linear-address width."""
    run = vmxlab.run(Case(fields={Field.GUEST_RIP: 1 << 63}))
    assert [exit_.full_reason for exit_ in run.exits] == [1 << 31 | ExitReason.ENTRY_FAILURE_GUEST_STATE]


def test_a_vm_entry_failure_changes_neither_guest_state_nor_injection(vmxlab):
    """Vol. 3C, 27.8: of the VMCS a VM-entry failure writes the exit reason and qualification alone.

    The valid bit of the VM-entry interruption information is not cleared, and the launch state stays clear.
    """
    written = {
        Field.GUEST_RFLAGS: 0xA,  # reserved bit 3: what makes the entry fail
        Field.GUEST_RIP: 0x8123,
        Field.GUEST_RSP: 0x7654_3210,
        Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0306,  # inject #UD
    }
    kept = (
        *written,
        Field.GUEST_CR3,
        Field.GUEST_CS_ACCESS_RIGHTS,
        Field.EXIT_INSTRUCTION_LENGTH,
        Field.EXIT_INSTRUCTION_INFORMATION,
        Field.EXIT_INTERRUPTION_INFORMATION,
        Field.IDT_VECTORING_INFORMATION,
    )
    reads = tuple(Vmread(field) for field in kept)
    run = steps(
        vmxlab,
        *READY,
        Enter(),
        Vmclear(),
        Vmptrld(),
        *(Vmwrite(field, value) for field, value in written.items()),
        *reads,
        Enter(),
        *reads,
        Enter(resume=True),
        program="vmcall",
        reactions=[on(ExitReason.VMCALL).stop()],
    )
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.VMCALL, 0x8000_0021]
    values = [(outcome.field, outcome.value) for outcome in run.outcomes if outcome.operation == "vmread"]
    before, after = values[: len(kept)], values[len(kept) :]
    assert after == before
    assert written.items() <= dict(after).items()
    assert dict(after)[Field.EXIT_INSTRUCTION_LENGTH] == len(b"\x0f\x01\xc1")
    assert fails_valid(run.outcomes[-1], Error.VMRESUME_NON_LAUNCHED_VMCS)


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_loading_an_invalid_msr_fails_the_entry_with_its_number(vmxlab):
    """Vol. 3C, 27.4 and 27.8: reason 34 with bit 31; the qualification is the entry's number, from 1."""
    entry = int(Msr.IA32_SYSENTER_CS).to_bytes(4, "little") + bytes(12)
    bad = int(Msr.IA32_FS_BASE).to_bytes(4, "little") + bytes(12)  # 27.4 names it as not allowed
    run = vmxlab.run(
        Case(
            memory={FREE_PAGES: entry + bad + entry},
            fields={Field.ENTRY_MSR_LOAD_COUNT: 3, Field.ENTRY_MSR_LOAD_ADDRESS: FREE_PAGES},
        )
    )
    assert [exit_.full_reason for exit_ in run.exits] == [1 << 31 | ExitReason.ENTRY_FAILURE_MSR_LOADING]
    assert run.exits[0].raw_qualification == 2
