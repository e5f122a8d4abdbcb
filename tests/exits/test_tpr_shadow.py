"""CR8 and the TPR shadow: VTPR on the virtual-APIC page, and exits where it falls below the TPR threshold.

SDM Vol. 3C, 30.3 (CR8), 30.1.2 (TPR virtualization), 27.7.7 (the threshold at VM entry), 27.2.1.1 (checks).
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    InstructionError,
    OutcomeKind,
    PrimaryControls,
    SecondaryControls,
    VirtualApicPage,
    on,
)
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.qualifications import CrAccessType
from vmxlab.sdm.registers import ActivityState

from .virtual_apic_cases import (
    ACCESSES,
    DELIVERY,
    HANDLER,
    IDT_LIMIT,
    TPR_SHADOW,
    and_report,
    check_trap_like,
    handlers,
    page_after,
)

VTPR = ApicRegister.TASK_PRIORITY
MOV_TO_CR8 = b"\x44\x0f\x22\xc1"  # mov cr8, rcx: four bytes
pytestmark = pytest.mark.vmx_needs(TPR_SHADOW)


def page_with(vtpr: int) -> VirtualApicPage:
    return VirtualApicPage({VTPR: vtpr})


def below(threshold: int) -> dict[Field, int]:
    return {Field.TPR_THRESHOLD: threshold}


def test_mov_from_cr8_reads_bits_7_to_4_of_vtpr(vmxlab):
    """Vol. 3C, 30.3: bits 3:0 of the destination are VTPR[7:4], the rest is 0; VTPR stays as it is."""
    pages = [page_with(vtpr) for vtpr in (0, 0x10, 0xF0, 0x5A, 0xFFFF_FF3F)]
    cases = [
        Case(program="mov rax, -1; mov rax, cr8; hlt", virtual_apic_page=page, steps=and_report())
        for page in pages
    ]
    for page, run in zip(pages, vmxlab.run_all(cases), strict=True):
        assert run.reasons == [ExitReason.HLT]
        assert run.exits[0].registers["rax"] == page[VTPR] >> 4 & 0xF
        assert page_after(run) == page


def test_mov_to_cr8_writes_vtpr_and_nothing_else(vmxlab):
    """Vol. 3C, 30.3: bits 3:0 of the source become VTPR[7:4]; the rest of VTPR is cleared."""
    before = VirtualApicPage.from_bytes(bytes(range(256)) * 16)
    case = Case(
        program="mov eax, 0xa; mov cr8, rax; mov rbx, cr8; hlt",
        virtual_apic_page=before,
        steps=and_report(whole=True),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rbx"] == 0xA
    after = page_after(run)
    assert after[VTPR] == 0xA0
    after[VTPR] = before[VTPR]
    assert after == before


def test_an_invalid_cr8_value_is_a_fault_and_leaves_vtpr(vmxlab):
    """Vol. 2B, MOV to CR: a source above 15 is #GP(0), with a TPR shadow too."""
    case = Case(
        program="mov eax, 0x10; mov cr8, rax; hlt", virtual_apic_page=page_with(0x30), steps=and_report()
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert (run.exits[0].interruption.vector, run.exits[0].interruption_error_code) == (13, 0)
    assert page_after(run)[VTPR] == 0x30


def test_cr8_exiting_comes_before_the_shadow(vmxlab):
    """Vol. 3C, 26.1.3 and 30.3: the shadow is for accesses that do not exit; an exit leaves VTPR alone."""
    case = Case(
        program="mov ecx, 1; mov cr8, rcx; mov r9, cr8; hlt",
        enable=(PrimaryControls.CR8_LOAD_EXITING, PrimaryControls.CR8_STORE_EXITING),
        fields=below(5),
        virtual_apic_page=page_with(0x70),
        steps=and_report(),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.CONTROL_REGISTER_ACCESS] * 2 + [ExitReason.HLT]
    load, store = (exit_.qualification for exit_ in run.exits[:2])
    assert (load.cr, load.access_type, load.register) == (8, CrAccessType.MOV_TO_CR, 1)
    assert (store.cr, store.access_type, store.register) == (8, CrAccessType.MOV_FROM_CR, 9)
    assert run.exits[2].registers["r9"] == 0
    assert page_after(run)[VTPR] == 0x70


# --- below the threshold -----------------------------------------------------------------------------------


def test_mov_to_cr8_below_the_threshold_exits(vmxlab):
    """Vol. 3C, 30.1.2 and 28.2.1: reason 43, qualification 0, behind the instruction; VTPR is written."""
    # From 15 down to 0, then HLT: the exit shows where it stopped.
    program = b"\xb9\x0f\0\0\0" + MOV_TO_CR8 + b"\xff\xc9\x79\xf8\xf4"
    cases = [
        Case(program=program, virtual_apic_page=page_with(0xF0), fields=below(threshold), steps=and_report())
        for threshold in range(16)
    ]
    for threshold, run in enumerate(vmxlab.run_all(cases)):
        if threshold == 0:
            assert run.reasons == [ExitReason.HLT]
            continue
        assert len(run.exits) == 1
        check_trap_like(run.exits[0], ExitReason.TPR_BELOW_THRESHOLD, 0, PROGRAM + 5 + len(MOV_TO_CR8))
        assert run.exits[0].registers["rcx"] == threshold - 1
        assert page_after(run)[VTPR] == threshold - 1 << 4


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_l2_goes_on_behind_a_tpr_exit(vmxlab):
    """Vol. 3C, 30.1.2: VTPR is compared with the threshold of the moment; equal to it is not below."""
    case = Case(
        program="mov ecx, 2; mov cr8, rcx; mov ecx, 5; mov cr8, rcx; mov cl, 2; mov cr8, rcx; hlt",
        virtual_apic_page=page_with(0x70),
        fields=below(5),
        # VM entry itself wants a threshold that is not above VTPR (27.2.1.1).
        reactions=[
            on(ExitReason.TPR_BELOW_THRESHOLD, times=1).vmwrite(Field.TPR_THRESHOLD, 2).resume(),
        ],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.TPR_BELOW_THRESHOLD, ExitReason.HLT]
    assert run.exits[0].registers["rcx"] == 2
    assert run.exits[1].registers["rcx"] == 2


@pytest.mark.vmx_needs(*DELIVERY)
def test_virtual_interrupt_delivery_has_no_threshold(vmxlab):
    """Vol. 3C, 30.1.2 and 27.2.1.1: with that control VTPR below the threshold is neither exit nor error."""
    case = Case(
        program="mov eax, 3; mov cr8, rax; hlt",
        enable=DELIVERY,
        virtual_apic_page=page_with(0),
        fields={Field.TPR_THRESHOLD: 0xFFFF_FFFF},
        steps=and_report(),
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert page_after(run)[VTPR] == 0x30
    assert page_after(run)[ApicRegister.PROCESSOR_PRIORITY] == 0x30  # PPR virtualization, 30.1.3


# --- the threshold at VM entry -----------------------------------------------------------------------------


def above_vtpr(state: dict[Field, int]) -> Case:
    """A VM entry into `state` with VTPR below the threshold."""
    return Case(
        enable=ACCESSES,
        fields={Field.TPR_THRESHOLD: 6, **state},
        virtual_apic_page=page_with(0x5F),
        watch=[Field.GUEST_INTERRUPTIBILITY_STATE],
    )


def test_a_threshold_above_vtpr_exits_right_after_vm_entry(vmxlab):
    """Vol. 3C, 27.7.7: with "virtualize APIC accesses" the entry succeeds, and exits before an instruction.

    Neither RFLAGS.IF = 0 nor blocking by STI or MOV SS holds it back.
    """
    blocking = Field.GUEST_INTERRUPTIBILITY_STATE
    states = [{}, {Field.GUEST_RFLAGS: 0x202, blocking: 1}, {blocking: 2}]
    for state, run in zip(states, vmxlab.run_all([above_vtpr(state) for state in states]), strict=True):
        assert len(run.exits) == 1, state
        check_trap_like(run.exits[0], ExitReason.TPR_BELOW_THRESHOLD, 0, PROGRAM)
        assert run.exits[0].watched[blocking] == state.get(blocking, 0)


@pytest.mark.vmx_known_difference("kvm-tpr-threshold-in-hlt")
def test_the_exit_after_vm_entry_wakes_from_hlt(vmxlab):
    """Vol. 3C, 27.7.7: the exit comes where VM entry put L2 into the HLT state."""
    if ActivityState.HLT not in vmxlab.capabilities.misc.activity_states:
        pytest.skip("the processor lacks the HLT activity state (IA32_VMX_MISC[6] is 0)")
    run = vmxlab.run(above_vtpr({Field.GUEST_ACTIVITY_STATE: ActivityState.HLT}))
    assert len(run.exits) == 1
    check_trap_like(run.exits[0], ExitReason.TPR_BELOW_THRESHOLD, 0, PROGRAM)


def test_a_threshold_up_to_vtpr_lets_l2_run(vmxlab):
    """Vol. 3C, 27.7.7 and 27.2.1.1: only a greater threshold counts, whichever bits 3:0 of VTPR there are."""
    for enable in ((), ACCESSES):
        run = vmxlab.run(Case(enable=enable, fields=below(6), virtual_apic_page=page_with(0x60)))
        assert run.reasons == [ExitReason.HLT]


def test_the_exit_after_vm_entry_follows_event_injection(vmxlab):
    """Vol. 3C, 27.7.7: the event is delivered first; the exit finds L2 at its handler."""
    case = Case(
        enable=ACCESSES,
        data=handlers(0x40),
        fields={
            **IDT_LIMIT,
            **below(6),
            Field.ENTRY_INTERRUPTION_INFORMATION: 1 << 31 | 0x40,
            Field.GUEST_RFLAGS: 0x202,
        },
        virtual_apic_page=page_with(0x50),
    )
    run = vmxlab.run(case)
    assert len(run.exits) == 1
    check_trap_like(run.exits[0], ExitReason.TPR_BELOW_THRESHOLD, 0, HANDLER)
    assert run.exits[0].registers["rsp"] == 0x7FF0 - 5 * 8


def fails_with_error_7(vmxlab, **case) -> bool:
    run = vmxlab.run(Case(**case))
    assert run.entry is not None
    assert run.exits == ()
    failed = run.entry.kind is OutcomeKind.FAIL_VALID
    return failed and run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS


def test_a_threshold_above_vtpr_fails_the_entry_without_apic_accesses(vmxlab):
    """Vol. 3C, 27.2.1.1: without "virtualize APIC accesses" the threshold is at most VTPR[7:4]."""
    for threshold, vtpr in ((1, 0x0F), (6, 0x5F), (15, 0xE0)):
        fields = below(threshold)
        assert fails_with_error_7(
            vmxlab,
            virtual_apic_page=page_with(vtpr),
            disable=SecondaryControls.VIRTUALIZE_APIC_ACCESSES,
            fields=fields,
        )


def test_bits_31_to_4_of_the_threshold_are_reserved(vmxlab):
    """Vol. 3C, 27.2.1.1: without virtual-interrupt delivery the entry fails with error 7."""
    for bit in (4, 5, 16, 31):
        assert fails_with_error_7(
            vmxlab, virtual_apic_page=page_with(0xF0), fields={Field.TPR_THRESHOLD: 1 << bit}
        )
