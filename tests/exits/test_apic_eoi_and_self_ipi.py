"""EOI and self-IPI virtualization: what L2's writes of the EOI and the ICR do, and when they exit.

SDM Vol. 3C, 30.1.4 (EOI), 30.1.5 (self-IPI), 30.4.3.2 (APIC-write emulation). Reason 45 is the EOI's.
"""

from __future__ import annotations

import pytest

from vmxlab import ExitReason, Field, Run, on
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.apic import ApicRegister

from .virtual_apic_cases import (
    APIC,
    DELIVERY,
    HANDLER,
    and_report,
    check_trap_like,
    eoi_exits,
    page_after,
    status,
)
from .virtual_interrupt_cases import (
    EOI,
    FRAME,
    PPR,
    STATUS,
    WRITE_EOI,
    case,
    check_handler,
    from_program,
    page,
    run_case,
)

IRETQ = b"\x48\xcf"
pytestmark = pytest.mark.vmx_needs(*DELIVERY)


def test_an_eoi_lets_the_next_one_through(vmxlab):
    """Vol. 3C, 30.1.4: SVI becomes the highest left in VISR, VPPR follows, and RVI is looked at again."""
    run = run_case(
        vmxlab,
        f"{WRITE_EOI}; hlt",
        rvi=0x41,
        svi=0x52,
        virtual_apic_page=page(0x31, 0x41, in_service=(0x52, 0x31)),
        steps=(*and_report(), FRAME),
    )
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    check_handler(run, interrupted=PROGRAM + 11)
    assert run.exits[0].watched[STATUS] == status(0x31, 0x41)
    after = page_after(run)
    assert (after.requests, after.in_service, after[PPR], after[EOI]) == ((0x31,), (0x31, 0x41), 0x40, 0)


def test_nested_interrupts_end_in_order(vmxlab):
    """Vol. 3C, 30.1.4 and 30.2: with an EOI in the handler each request is served once, highest first."""
    eoi_iretq = b"\x0f\x01\xc1\xc7\x04\x25" + (APIC + EOI).to_bytes(4, "little") + bytes(4) + IRETQ
    run = run_case(
        vmxlab,
        "nop; hlt",
        rvi=0xFE,
        virtual_apic_page=page(0x31, 0x41, 0x52, 0xFE),
        data={HANDLER: eoi_iretq},
    )
    assert run.reasons == [ExitReason.VMCALL] * 4 + [ExitReason.HLT]
    seen = [exit_.watched[STATUS] for exit_ in run.exits]
    assert seen == [status(0x52, 0xFE), status(0x41, 0x52), status(0x31, 0x41), status(0, 0x31), status(0, 0)]
    after = page_after(run)
    assert (after.requests, after.in_service, after[PPR]) == ((), (), 0)


def eoi_of(vmxlab, vector: int, marked: int) -> Run:
    """The run of an EOI of `vector`, with IF = 0 and the bit of `marked` in the EOI-exit bitmap."""
    run = run_case(
        vmxlab,
        f"{WRITE_EOI}; hlt",
        svi=vector,
        fields={**eoi_exits(marked), Field.GUEST_RFLAGS: 0x2},
        virtual_apic_page=page(0x31, in_service=(vector, 0x20)),
    )
    after = page_after(run)
    assert (after.in_service, after.requests, after[PPR]) == ((0x20,), (0x31,), 0x20)
    assert run.exits[0].watched[STATUS] == status(0, 0x20)
    return run


VECTORS = (0x31, 0x7F, 0x80, 0xFE)


@pytest.mark.vmx_known_difference("kvm-eoi-exit-bitmap")
def test_an_eoi_of_a_vector_in_the_exit_bitmap_exits(vmxlab):
    """Vol. 3C, 30.1.4 and 28.2.1: reason 45, the vector as qualification, behind the EOI that took effect."""
    for vector in VECTORS:
        run = eoi_of(vmxlab, vector, marked=vector)
        assert len(run.exits) == 1
        check_trap_like(run.exits[0], ExitReason.VIRTUALIZED_EOI, vector, PROGRAM + 11)


def test_an_eoi_of_another_vector_does_not_exit(vmxlab):
    """Vol. 3C, 30.1.4: the bit is that of the vector that was in service, in its quarter of the bitmap."""
    for vector in VECTORS:
        for marked in (vector ^ 0x40, vector ^ 1, 0x20, 0x31 if vector != 0x31 else 0x32):
            assert eoi_of(vmxlab, vector, marked).reasons == [ExitReason.HLT]


@pytest.mark.vmx_known_difference("kvm-eoi-exit-bitmap")
def test_a_virtualized_eoi_exit_comes_before_evaluation(vmxlab):
    """Vol. 3C, 30.1.4: with the exit nothing is recognized; the next VM entry does that, and delivers."""
    run = run_case(
        vmxlab,
        f"{WRITE_EOI}; hlt",
        rvi=0x41,
        svi=0x52,
        fields=eoi_exits(0x52),
        virtual_apic_page=page(0x41, in_service=(0x52,)),
        reactions=[on(ExitReason.VIRTUALIZED_EOI).resume()],
    )
    assert run.reasons == [ExitReason.VIRTUALIZED_EOI, ExitReason.VMCALL, ExitReason.HLT]
    check_trap_like(run.exits[0], ExitReason.VIRTUALIZED_EOI, 0x52, PROGRAM + 11)
    assert [exit_.watched[STATUS] for exit_ in run.exits[:2]] == [status(0x41), status(0, 0x41)]


SELF = 1 << 18


@pytest.mark.parametrize("extra", [0, 1 << 11, 1 << 14], ids=["plain", "destination-mode", "level"])
def test_a_self_ipi_by_the_icr_is_delivered(vmxlab, extra):
    """Vol. 3C, 30.4.3.2 and 30.1.5: VIRR gets the vector, RVI the higher one; then it is delivered."""
    value = SELF | 0x41 | extra
    icr = ApicRegister.INTERRUPT_COMMAND_LOW
    run = run_case(vmxlab, f"mov dword ptr [{APIC + icr}], {value}; hlt", steps=(*and_report(), FRAME))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    check_handler(run, interrupted=PROGRAM + 11)
    after = page_after(run)
    assert (after[icr], after.requests, after.in_service, after[PPR]) == (value, (), (0x41,), 0x40)


def test_a_self_ipi_keeps_a_higher_request(vmxlab):
    """Vol. 3C, 30.1.5: RVI is the greater of RVI and the vector; with IF = 0 both stay in VIRR."""
    program = (
        f"mov dword ptr [{APIC + 0x300}], {SELF | 0x41}; mov dword ptr [{APIC + 0x300}], {SELF | 0x31}; hlt"
    )
    run = run_case(vmxlab, program, fields={Field.GUEST_RFLAGS: 0x2})
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0x41)
    assert page_after(run).requests == (0x31, 0x41)


def test_any_other_interrupt_command_is_an_apic_write_exit(vmxlab):
    """Vol. 3C, 30.4.3.2: other bits, another shorthand, trigger or delivery mode, a vector below 16."""
    good = SELF | 0x41
    bits = [1 << bit for bit in (12, 13, 15, 16, 17, 20, 31, 8, 9, 10)]
    values = [*(good | bit for bit in bits), 0x41, 2 << 18 | 0x41, 3 << 18 | 0x41, SELF | 0x0F, SELF]
    icr = ApicRegister.INTERRUPT_COMMAND_LOW
    cases = [case(f"mov [{APIC + icr}], eax; hlt", registers={"rax": value}) for value in values]
    for value, run in zip(values, map(from_program, vmxlab.run_all(cases)), strict=True):
        assert run.reasons == [ExitReason.APIC_WRITE], hex(value)
        check_trap_like(run.exits[0], ExitReason.APIC_WRITE, icr, PROGRAM + 7)
        after = page_after(run)
        assert (after[icr], after.requests) == (value, ())
        assert run.exits[0].watched[STATUS] == 0
