"""Virtual-interrupt delivery: interrupts that L2 takes without an exit.

SDM Vol. 3C, 30.1.2 and 30.1.3 (TPR and PPR virtualization), 30.2 (evaluation and delivery), 27.3.2.5 (VM
entry). RVI, the vector requested, and SVI, the one in service, stand in the guest interrupt status.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Limits, PrimaryControls, guest_ept, on
from vmxlab.cases.memory import IDT, PROGRAM, STACK_TOP
from vmxlab.sdm.registers import ActivityState

from .virtual_apic_cases import (
    APIC,
    DELIVERY,
    IDT_LIMIT,
    INTERRUPTS_ENABLED,
    and_report,
    page_after,
    status,
)
from .virtual_interrupt_cases import (
    FRAME,
    PPR,
    STATUS,
    TPR,
    check_handler,
    page,
    run_case,
)

SOON = Limits(l2_tsc=20_000_000)
"""Where nothing wakes L2."""
pytestmark = pytest.mark.vmx_needs(*DELIVERY)


# --- at VM entry -------------------------------------------------------------------------------------------


def test_a_request_is_delivered_before_the_first_instruction(vmxlab):
    """Vol. 3C, 30.2.2: VISR, SVI and VPPR take the vector, VIRR loses it, RVI is the next one of VIRR."""
    run = run_case(
        vmxlab, "inc ecx; hlt", rvi=0x41, virtual_apic_page=page(0x31, 0x41), steps=(*and_report(), FRAME)
    )
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    check_handler(run, interrupted=PROGRAM)
    assert run.exits[0].registers["rsp"] == STACK_TOP - 5 * 8
    assert run.exits[0].watched[STATUS] == status(0x31, 0x41)
    # The one in service keeps the lower one back, behind the handler's IRETQ, too.
    assert run.exits[1].registers["rcx"] == 1
    after = page_after(run)
    assert (after.requests, after.in_service, after[PPR]) == ((0x31,), (0x41,), 0x40)


def test_vm_entry_looks_at_rvi_and_not_at_virr(vmxlab):
    """Vol. 3C, 27.3.2.5 and 30.2.1: what is in VIRR alone is not recognized; what RVI says is."""
    run = run_case(vmxlab, "hlt", virtual_apic_page=page(0x41))
    assert run.reasons == [ExitReason.HLT]
    assert page_after(run).requests == (0x41,)
    run = run_case(vmxlab, "hlt", rvi=0x41, virtual_apic_page=page())
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0, 0x41)


@pytest.mark.parametrize(
    ("rvi", "tpr", "svi", "ppr"),
    [
        (0x41, 0x4F, 0x00, 0x4F),  # VPPR is VTPR where VTPR[7:4] is not less than SVI[7:4]
        (0x41, 0x45, 0x4A, 0x45),
        (0x41, 0x3F, 0x42, 0x40),  # else SVI & F0H
        (0x41, 0x00, 0xF3, 0xF0),
        (0x0F, 0x00, 0x00, 0x00),  # RVI[7:4] is not greater than 0
    ],
)
def test_a_priority_not_above_vppr_waits(vmxlab, rvi, tpr, svi, ppr):
    """Vol. 3C, 30.1.3 and 30.2.1: VM entry computes VPPR of VTPR and SVI, and recognizes what is above it."""
    run = run_case(vmxlab, "hlt", rvi=rvi, svi=svi, virtual_apic_page=page(rvi, tpr=tpr, in_service=(svi,)))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(rvi, svi)
    after = page_after(run)
    assert (after[PPR], after.requests, after.in_service) == (ppr, (rvi,), (svi,))


@pytest.mark.vmx_known_difference("virtual-interrupt-does-not-wake")
def test_l2_entered_in_the_hlt_state_is_woken(vmxlab):
    """Vol. 3C, 30.2.2: delivery wakes a processor that VM entry put into HLT."""
    if ActivityState.HLT not in vmxlab.capabilities.misc.activity_states:
        pytest.skip("the processor lacks the HLT activity state (IA32_VMX_MISC[6] is 0)")
    fields = {Field.GUEST_ACTIVITY_STATE: ActivityState.HLT}
    run = run_case(vmxlab, "inc ecx; hlt", rvi=0x41, virtual_apic_page=page(0x41), fields=fields, limits=SOON)
    check_handler(run)
    assert run.exits[0].registers["rcx"] == 0


@pytest.mark.vmx_known_difference("virtual-interrupt-does-not-wake")
def test_l2_is_woken_from_its_hlt(vmxlab):
    """Vol. 3C, 30.2.2: HLT without "HLT exiting"; STI held the interrupt back for that one instruction."""
    run = run_case(
        vmxlab,
        "sti; hlt; inc ecx; vmcall",
        rvi=0x41,
        virtual_apic_page=page(0x41),
        fields={Field.GUEST_RFLAGS: 0x2},
        disable=PrimaryControls.HLT_EXITING,
        limits=SOON,
        reactions=[on(ExitReason.VMCALL, first=1).stop()],
        steps=(*and_report(), FRAME),
    )
    assert run.reasons == [ExitReason.VMCALL] * 2
    check_handler(run, interrupted=PROGRAM + 2)
    assert run.exits[1].registers["rcx"] == 1


def test_interrupts_off_or_blocked_hold_delivery_back(vmxlab):
    """Vol. 3C, 30.2.2: RFLAGS.IF = 0, and blocking by STI or MOV SS for the instruction behind it."""
    blocking = Field.GUEST_INTERRUPTIBILITY_STATE
    for fields, program, interrupted in (
        ({Field.GUEST_RFLAGS: 0x2}, "nop; nop; sti; nop; hlt", PROGRAM + 4),
        ({blocking: 1}, "nop; hlt", PROGRAM + 1),
        ({blocking: 2}, "nop; hlt", PROGRAM + 1),
        ({}, "hlt", PROGRAM),
    ):
        run = run_case(
            vmxlab,
            program,
            rvi=0x41,
            virtual_apic_page=page(0x41),
            fields=fields,
            steps=(*and_report(), FRAME),
        )
        assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
        check_handler(run, interrupted=interrupted)
    run = run_case(vmxlab, "hlt", rvi=0x41, virtual_apic_page=page(0x41), fields={Field.GUEST_RFLAGS: 0x2})
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0x41)


def test_an_injected_event_comes_first(vmxlab):
    """Vol. 3C, 27.6 and 30.2.2: VM entry delivers the injected interrupt; the virtual one waits for IF."""
    fields = {Field.ENTRY_INTERRUPTION_INFORMATION: 1 << 31 | 0x31}
    run = run_case(vmxlab, "hlt", rvi=0x41, virtual_apic_page=page(0x41), fields=fields)
    # The handler's VMCALL, then, as soon as its IRETQ has set IF, that of the virtual interrupt.
    assert run.reasons == [ExitReason.VMCALL, ExitReason.VMCALL, ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0x41)
    assert run.exits[1].watched[STATUS] == status(0, 0x41)


def test_interrupt_window_exiting_keeps_it_back(vmxlab):
    """Vol. 3C, 30.2.1 and 30.2.2: with "interrupt-window exiting" nothing is recognized, the window exits."""
    window = PrimaryControls.INTERRUPT_WINDOW_EXITING
    run = run_case(vmxlab, "hlt", rvi=0x41, virtual_apic_page=page(0x41), enable=(window,))
    assert [exit_.full_reason for exit_ in run.exits] == [ExitReason.INTERRUPT_WINDOW]
    assert (run.exits[0].rip, run.exits[0].watched[STATUS]) == (PROGRAM, status(0x41))
    assert page_after(run).requests == (0x41,)


@pytest.mark.vmx_known_difference("virtual-interrupt-idt-vectoring")
def test_an_exit_during_delivery_names_the_vector(vmxlab):
    """Vol. 3C, 28.2.4 and 30.2.2: the event is an external interrupt; it is in service already."""
    ept = guest_ept()
    ept.unmap(IDT, 0x1000)
    run = vmxlab.run(
        Case(
            enable=DELIVERY,
            ept=ept,
            virtual_apic_page=page(0x41),
            fields={**IDT_LIMIT, STATUS: status(0x41), Field.GUEST_RFLAGS: INTERRUPTS_ENABLED},
            watch=[STATUS],
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    assert (run.exits[0].rip, run.exits[0].watched[STATUS]) == (PROGRAM, status(0, 0x41))
    assert run.exits[0].raw_idt_vectoring_information == 1 << 31 | 0x41


def test_lowering_the_tpr_delivers(vmxlab):
    """Vol. 3C, 30.1.2: TPR virtualization evaluates what is pending, behind MOV CR8 or a write of the TPR."""
    for write in ("mov cr8, rax", f"mov [{APIC + TPR}], eax"):
        request = page(0x41, tpr=0x40)
        run = run_case(
            vmxlab, f"{write}; nop; hlt", rvi=0x41, virtual_apic_page=request, steps=(*and_report(), FRAME)
        )
        assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
        length = 4 if "cr8" in write else 7
        check_handler(run, interrupted=PROGRAM + length)
        assert page_after(run)[PPR] == 0x40
