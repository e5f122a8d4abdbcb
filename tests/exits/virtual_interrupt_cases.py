"""What the tests of virtual interrupts share: an L2 that takes them, from a VM entry on."""

from __future__ import annotations

from dataclasses import replace

from vmxlab import Case, ExitReason, Field, Run, VirtualApicPage, on
from vmxlab.cases.memory import GDT, IDT, PROGRAM, STACK_TOP, machine_address
from vmxlab.cases.steps import ReportMemory
from vmxlab.sdm.apic import ApicRegister

from .virtual_apic_cases import (
    ACCESSES,
    APIC,
    DELIVERY,
    HANDLER,
    IDT_LIMIT,
    INTERRUPTS_ENABLED,
    and_report,
    apic_ept,
    handlers,
    status,
)

STATUS = Field.GUEST_INTERRUPT_STATUS
TPR, PPR, EOI = ApicRegister.TASK_PRIORITY, ApicRegister.PROCESSOR_PRIORITY, ApicRegister.EOI
WITH_APIC = (*ACCESSES, *DELIVERY)
WRITE_EOI = f"mov dword ptr [{APIC + EOI}], 0"
"""Eleven bytes."""

WARM_UP_AT = 0x1_2000
TOUCHED = (GDT, IDT, HANDLER)
WARM_UP = b"".join(b"\x4c\x8b\x3c\x25" + at.to_bytes(4, "little") for at in TOUCHED)
WARM_UP += b"\x41\x57\x41\x5f\x45\x31\xff\x0f\xa2"
"""MOV R15 from each, PUSH, POP, XOR, CPUID: so that a delivery finds its pages mapped.

Else a hypervisor that emulates VMX has to map them during the delivery, and needs the IDT-vectoring
information of a virtual interrupt for that; a test of its own asks for it.
"""


def case(program: str, rvi: int = 0, svi: int = 0, **more) -> Case:
    """L2 with RFLAGS.IF = 1, handlers for some vectors, an APIC, and this RVI and SVI.

    It comes to `program` by a VM entry behind a first exit, which also sets the guest state in `fields`.
    """
    state = {
        Field.GUEST_RIP: PROGRAM,
        Field.GUEST_RFLAGS: INTERRUPTS_ENABLED,
        STATUS: status(rvi, svi),
        **more.pop("fields", {}),
    }
    start = on(ExitReason.CPUID)
    for field, value in state.items():
        start = start.vmwrite(field, value)
    return Case(
        program=program,
        enable=(*WITH_APIC, *more.pop("enable", ())),
        ept=apic_ept(),
        fields={**IDT_LIMIT, Field.GUEST_RIP: WARM_UP_AT},
        data=handlers(0x31, 0x41, 0x52, 0xFE) | {WARM_UP_AT: WARM_UP} | more.pop("data", {}),
        watch=[STATUS, Field.GUEST_INTERRUPTIBILITY_STATE],
        reactions=[start.resume(), *more.pop("reactions", ())],
        steps=more.pop("steps", and_report()),
        **more,
    )


def run_case(vmxlab, program: str, rvi: int = 0, svi: int = 0, **more) -> Run:
    """The run of such a case from its program on."""
    return from_program(vmxlab.run(case(program, rvi, svi, **more)))


def from_program(run: Run) -> Run:
    assert run.reasons[0] == ExitReason.CPUID
    return replace(run, exits=run.exits[1:])


def page(*requests: int, tpr: int = 0, in_service: tuple[int, ...] = ()) -> VirtualApicPage:
    return VirtualApicPage({TPR: tpr}, requests=requests, in_service=in_service)


def check_handler(run: Run, number: int = 0, *, interrupted: int | None = None) -> None:
    """The exit is the handler's VMCALL; it came by a delivery that was no exit."""
    exit_ = run.exits[number]
    assert (exit_.full_reason, exit_.rip) == (ExitReason.VMCALL, HANDLER)
    assert not exit_.idt_vectoring.valid
    assert not exit_.rflags & 0x200  # an interrupt gate clears IF
    if interrupted is not None:
        assert run.memory.pop(machine_address(STACK_TOP - 40))[:8] == interrupted.to_bytes(8, "little")


FRAME = ReportMemory(machine_address(STACK_TOP - 40), 16)
