"""Posted interrupts: an interrupt with the notification vector moves requests to the virtual-APIC page.

SDM Vol. 3C, 30.6 (processing), table 30-1 (descriptor), 27.2.1.1 (checks). L2 sends the notification to its
own processor: its EPT maps the local APIC's registers, by which it interrupts "self".
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    ExitControls,
    ExitReason,
    Field,
    InstructionError,
    MemoryType,
    OutcomeKind,
    PinControls,
    PostedInterruptDescriptor,
    SecondaryControls,
    VirtualApicPage,
    guest_ept,
    on,
)
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.steps import ReportMemory
from vmxlab.image.layout import FREE_PAGES, POSTED_INTERRUPT_DESCRIPTOR
from vmxlab.sdm.apic import (
    APIC_DEFAULT_BASE,
    ApicDestinationShorthand,
    ApicRegister,
    InterruptCommandFlags,
    SpuriousVectorFlags,
)

from .virtual_apic_cases import (
    DELIVERY,
    HANDLER,
    IDT_LIMIT,
    INTERRUPTS_ENABLED,
    and_report,
    handlers,
    page_after,
    status,
)

POSTED = PinControls.PROCESS_POSTED_INTERRUPTS
ACKNOWLEDGE = ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT
CONTROLS = (*DELIVERY, POSTED, ACKNOWLEDGE)
STATUS, VECTOR = Field.GUEST_INTERRUPT_STATUS, Field.POSTED_INTERRUPT_NOTIFICATION_VECTOR
NOTIFICATION, OTHER = 0xF2, 0xF3
LOCAL_APIC = 0x20_0000
"""Where L2 finds the processor's own local APIC."""
SEND = (
    f"mov dword ptr [{LOCAL_APIC + ApicRegister.SPURIOUS_INTERRUPT_VECTOR}],"
    f" {SpuriousVectorFlags.SOFTWARE_ENABLE | 0xFF};"
    f"mov dword ptr [{LOCAL_APIC + ApicRegister.INTERRUPT_COMMAND_LOW}],"
    f" {ApicDestinationShorthand.SELF.bits | InterruptCommandFlags.LEVEL_ASSERT}+{{vector}};"
    # Interprocessor interrupts take their time to arrive.
    "mov ecx, 100000; again: pause; dec ecx; jnz again;"
    # Ends what no processing by the processor itself has ended.
    f"mov dword ptr [{LOCAL_APIC + ApicRegister.EOI}], 0; hlt"
)
pytestmark = pytest.mark.vmx_needs(*CONTROLS)


def posted_case(vector: int, descriptor: PostedInterruptDescriptor, **more) -> Case:
    """L2 with IF = 1 that sends itself `vector`."""
    ept = guest_ept()
    ept.map(LOCAL_APIC, APIC_DEFAULT_BASE, memory_type=MemoryType.UC)
    fields = {**IDT_LIMIT, Field.GUEST_RFLAGS: INTERRUPTS_ENABLED, VECTOR: NOTIFICATION}
    return Case(
        program=SEND.format(vector=vector),
        enable=CONTROLS,
        ept=ept,
        posted_interrupts=descriptor,
        data=handlers(0x31, 0x41, 0xFE),
        fields=fields | more.pop("fields", {}),
        watch=[STATUS],
        steps=(*and_report(), ReportMemory(POSTED_INTERRUPT_DESCRIPTOR, 64)),
        **more,
    )


def descriptor_after(run) -> PostedInterruptDescriptor:
    return PostedInterruptDescriptor.from_bytes(run.memory.pop(POSTED_INTERRUPT_DESCRIPTOR))


def test_a_notification_moves_the_requests_and_delivers_the_highest(vmxlab):
    """Vol. 3C, 30.6: no exit; PIR is cleared into VIRR, RVI is the highest, ON is cleared, the rest kept."""
    software = (1 << 255) - 1
    posted = PostedInterruptDescriptor((0x31, 0x41), outstanding_notification=True, software=software)
    run = vmxlab.run(posted_case(NOTIFICATION, posted, virtual_apic_page=VirtualApicPage(requests=[0x20])))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert run.exits[0].rip == HANDLER
    assert run.exits[0].watched[STATUS] == status(0x31, 0x41)
    assert descriptor_after(run) == PostedInterruptDescriptor(software=software)
    after = page_after(run)
    assert (after.requests, after.in_service) == ((0x20, 0x31), (0x41,))


def test_with_interrupts_off_the_requests_wait_on_the_page(vmxlab):
    """Vol. 3C, 30.6 and 30.2.2: RFLAGS.IF holds back the delivery, and not the notification's processing."""
    posted = PostedInterruptDescriptor((0xFE,), outstanding_notification=True)
    run = vmxlab.run(posted_case(NOTIFICATION, posted, fields={Field.GUEST_RFLAGS: 0x2}))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0xFE)
    assert descriptor_after(run) == PostedInterruptDescriptor()
    assert page_after(run).requests == (0xFE,)


def test_a_higher_request_than_the_posted_ones_stays_rvi(vmxlab):
    """Vol. 3C, 30.6: RVI is the greater of RVI and the highest vector in PIR."""
    run = vmxlab.run(
        posted_case(
            NOTIFICATION,
            PostedInterruptDescriptor((0x31,)),
            virtual_apic_page=VirtualApicPage(requests=[0x41]),
            fields={Field.GUEST_RFLAGS: 0x2, STATUS: status(0x41)},
        )
    )
    assert run.exits[0].watched[STATUS] == status(0x41)
    assert page_after(run).requests == (0x31, 0x41)


def test_another_vector_is_an_external_interrupt_exit(vmxlab):
    """Vol. 3C, 30.6: the interrupt is acknowledged, its vector is in the exit's information; PIR stays."""
    posted = PostedInterruptDescriptor((0x31,), outstanding_notification=True)
    run = vmxlab.run(posted_case(OTHER, posted, reactions=[on(ExitReason.EXTERNAL_INTERRUPT).resume()]))
    assert run.reasons == [ExitReason.EXTERNAL_INTERRUPT, ExitReason.HLT]
    assert run.exits[0].raw_interruption_information == 1 << 31 | OTHER
    assert run.exits[0].rip > PROGRAM
    assert descriptor_after(run) == posted


# --- VM entry ----------------------------------------------------------------------------------------------


def test_vm_entry_checks_what_posted_interrupts_need(vmxlab):
    """Vol. 3C, 27.2.1.1: interrupt delivery, acknowledgement, an 8-bit vector, an aligned descriptor."""
    address = Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS
    everything = {"enable": CONTROLS, "posted_interrupts": PostedInterruptDescriptor()}
    wrong: list[dict] = [
        {"enable": (POSTED, ACKNOWLEDGE), "disable": SecondaryControls.VIRTUAL_INTERRUPT_DELIVERY},
        {"enable": (*DELIVERY, POSTED), "disable": ACKNOWLEDGE},
        everything | {"fields": {VECTOR: 0x100}},
        everything | {"fields": {VECTOR: 0x8020}},
        *(everything | {"fields": {address: FREE_PAGES + offset}} for offset in (1, 0x20)),
        *(
            everything | {"fields": {address: FREE_PAGES | 1 << bit}}
            for bit in (vmxlab.physical_address_width, 63)
        ),
    ]
    for case in wrong:
        run = vmxlab.run(Case(**case))
        assert run.entry is not None
        assert run.entry.kind is OutcomeKind.FAIL_VALID, case
        assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
        assert run.exits == ()
    assert vmxlab.run(Case(**everything, fields={VECTOR: 0xFF})).reasons == [ExitReason.HLT]
