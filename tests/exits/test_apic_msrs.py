"""The APIC's registers as MSRs: "virtualize x2APIC mode".

SDM Vol. 3C, 30.5. L1's local APIC is in xAPIC mode, so that whatever is not virtualized is #GP(0).
"""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, ExitReason, Field, MsrBitmap, SecondaryControls, VirtualApicPage
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import VIRTUAL_APIC_PAGE
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.registers import Vector
from vmxlab.structures import x2apic_msr

from .virtual_apic_cases import (
    DELIVERY,
    TPR_SHADOW,
    and_report,
    check_trap_like,
    eoi_exits,
    page_after,
    status,
)

X2APIC = SecondaryControls.VIRTUALIZE_X2APIC_MODE
WITH_X2APIC = (TPR_SHADOW, X2APIC)
WITH_REGISTERS = (*WITH_X2APIC, SecondaryControls.APIC_REGISTER_VIRTUALIZATION)
WITH_DELIVERY = (*WITH_X2APIC, *DELIVERY)
STATUS = Field.GUEST_INTERRUPT_STATUS
VTPR = ApicRegister.TASK_PRIORITY
TPR_MSR, EOI_MSR, SELF_IPI_MSR = x2apic_msr(VTPR), x2apic_msr(ApicRegister.EOI), 0x83F
LVT_TIMER_MSR = x2apic_msr(ApicRegister.LVT_TIMER)
WRMSR_BEHIND = PROGRAM + 2
pytestmark = pytest.mark.vmx_needs(*WITH_X2APIC)


def wrmsr_case(msr: int, low: int, high: int = 0, *, enable=WITH_X2APIC, **more) -> Case:
    more.setdefault("msr_bitmap", MsrBitmap.passthrough_all())
    more.setdefault("steps", and_report())
    registers = {"rcx": msr, "rax": low, "rdx": high}
    return Case(program="wrmsr; hlt", registers=registers, enable=enable, watch=more.pop("watch", ()), **more)


READS = """
again: movzx ecx, word ptr [rsi]; mov eax, 0xdeadbeef; mov edx, 0xdeadbeef; rdmsr
mov [rdi], eax; mov [rdi + 4], edx; add rsi, 2; add rdi, 8; dec ebx; jnz again; hlt
"""
RESULTS = DATA + 0x1000


@pytest.mark.vmx_needs(*WITH_REGISTERS)
def test_with_register_virtualization_every_msr_of_the_range_is_read(vmxlab):
    """Vol. 3C, 30.5: RDMSR of 800H to 8FFH reads 8 bytes at offset (ECX & FFH) << 4, registers or not."""
    content = bytes(range(251)) * 17
    page = VirtualApicPage.from_bytes(content[:4096])
    msrs = range(0x800, 0x900)
    run = vmxlab.run(
        Case(
            program=READS,
            enable=WITH_REGISTERS,
            msr_bitmap=MsrBitmap.passthrough_all(),
            virtual_apic_page=page,
            data={DATA: struct.pack("<256H", *msrs)},
            registers={"rsi": DATA, "rdi": RESULTS, "rbx": len(msrs)},
            steps=(*STANDARD, ReportMemory(machine_address(RESULTS), 8 * len(msrs))),
        )
    )
    assert run.reasons == [ExitReason.HLT]
    offsets = [(msr & 0xFF) << 4 for msr in msrs]
    # VM entry without virtual-interrupt delivery changes nothing on the page.
    assert run.memory[machine_address(RESULTS)] == b"".join(content[o : o + 8] for o in offsets)


def check_gp(run, rip: int = PROGRAM) -> None:
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert (run.exits[0].interruption.vector, run.exits[0].interruption_error_code) == (Vector.GP, 0)
    assert run.exits[0].rip == rip


def test_without_register_virtualization_the_tpr_alone_is_read(vmxlab):
    """Vol. 3C, 30.5: RDMSR of 808H reads VTPR and the four bytes above it; others are the local APIC's."""
    page = VirtualApicPage({VTPR: 0x1234_5678, VTPR + 4: 0x9ABC_DEF0})
    passthrough = MsrBitmap.passthrough_all()
    for msr in (TPR_MSR, x2apic_msr(ApicRegister.ID), EOI_MSR, SELF_IPI_MSR, 0x8FF):
        run = vmxlab.run(
            Case(
                program="rdmsr; hlt",
                registers={"rcx": msr},
                enable=WITH_X2APIC,
                msr_bitmap=passthrough,
                virtual_apic_page=page,
            )
        )
        if msr == TPR_MSR:
            assert run.reasons == [ExitReason.HLT]
            registers = run.exits[0].registers
            assert (registers["rax"], registers["rdx"]) == (0x1234_5678, 0x9ABC_DEF0)
        else:
            check_gp(run)


def test_the_msr_bitmap_comes_first(vmxlab):
    """Vol. 3C, 30.5 and 26.1.3: what the bitmap intercepts exits; so does all without "use MSR bitmaps"."""
    bitmap = MsrBitmap.passthrough_all()
    bitmap.set_read_intercept(TPR_MSR, True)
    bitmap.set_write_intercept(TPR_MSR, True)
    page = VirtualApicPage({VTPR: 0x30})
    for used in (bitmap, None):
        run = vmxlab.run(
            Case(
                program="wrmsr; rdmsr; hlt",
                registers={"rcx": TPR_MSR, "rax": 0x50},
                enable=WITH_X2APIC,
                msr_bitmap=used,
                virtual_apic_page=page,
                steps=and_report(),
            )
        )
        assert run.reasons == [ExitReason.WRMSR, ExitReason.RDMSR, ExitReason.HLT]
        assert page_after(run) == page


def test_without_the_control_the_tpr_is_the_local_apics(vmxlab):
    """Vol. 3C, 30.5: "use TPR shadow" alone virtualizes no MSR."""
    check_gp(vmxlab.run(wrmsr_case(TPR_MSR, 0x50, enable=(TPR_SHADOW,), disable=X2APIC)))


def test_a_write_of_the_tpr(vmxlab):
    """Vol. 3C, 30.5: EDX:EAX goes to offset 80H; TPR virtualization and its exit follow."""
    page = VirtualApicPage({VTPR: 0xF0, VTPR + 4: 0xFFFF_FFFF})
    for value in (0x6F, 0x5F):
        fields = {Field.TPR_THRESHOLD: 6}
        run = vmxlab.run(wrmsr_case(TPR_MSR, value, virtual_apic_page=page, fields=fields))
        if value == 0x6F:
            assert run.reasons == [ExitReason.HLT]
        else:
            assert len(run.exits) == 1
            check_trap_like(run.exits[0], ExitReason.TPR_BELOW_THRESHOLD, 0, WRMSR_BEHIND)
        assert page_after(run) == VirtualApicPage({VTPR: value})


def test_reserved_bits_of_the_tpr_are_faults(vmxlab):
    """Vol. 3C, 30.5: WRMSR of 808H with EDX or EAX[31:8] is #GP(0), and VTPR stays."""
    page = VirtualApicPage({VTPR: 0xF0})
    for low, high in ((0x100, 0), (1 << 31, 0), (0x50, 1), (0x50, 1 << 31)):
        run = vmxlab.run(wrmsr_case(TPR_MSR, low, high, virtual_apic_page=page))
        check_gp(run)
        assert page_after(run) == page


def test_other_writes_are_the_local_apics(vmxlab):
    """Vol. 3C, 30.5: EOI and self-IPI are not virtualized without interrupt delivery, the rest never."""
    for msr in (EOI_MSR, SELF_IPI_MSR, LVT_TIMER_MSR, x2apic_msr(ApicRegister.INTERRUPT_COMMAND_LOW)):
        check_gp(vmxlab.run(wrmsr_case(msr, 0)))
        if msr not in (EOI_MSR, SELF_IPI_MSR):
            check_gp(vmxlab.run(wrmsr_case(msr, 0, enable=WITH_DELIVERY)))


@pytest.mark.vmx_needs(*WITH_DELIVERY)
def test_a_write_of_the_eoi(vmxlab):
    """Vol. 3C, 30.5 and 30.1.4: WRMSR of 80BH ends what is in service; a value other than 0 is #GP(0)."""
    page = VirtualApicPage(in_service=[0x41, 0x31])
    more = {
        "enable": WITH_DELIVERY,
        "virtual_apic_page": page,
        "watch": [STATUS],
        "fields": {STATUS: status(0, 0x41)},
    }
    run = vmxlab.run(wrmsr_case(EOI_MSR, 0, **more))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0, 0x31)
    assert page_after(run).in_service == (0x31,)
    for low, high in ((1, 0), (0, 1)):
        run = vmxlab.run(wrmsr_case(EOI_MSR, low, high, **more))
        check_gp(run)
        assert run.exits[0].watched[STATUS] == status(0, 0x41)


@pytest.mark.vmx_needs(*WITH_DELIVERY)
@pytest.mark.vmx_known_difference("kvm-eoi-exit-bitmap")
def test_a_write_of_the_eoi_may_exit(vmxlab):
    """Vol. 3C, 30.1.4: the EOI-exit bitmap is for the MSR as well."""
    case = wrmsr_case(
        EOI_MSR,
        0,
        enable=WITH_DELIVERY,
        virtual_apic_page=VirtualApicPage(in_service=[0x41]),
        fields={STATUS: status(0, 0x41), **eoi_exits(0x41)},
    )
    run = vmxlab.run(case)
    assert len(run.exits) == 1
    check_trap_like(run.exits[0], ExitReason.VIRTUALIZED_EOI, 0x41, WRMSR_BEHIND)


@pytest.mark.vmx_needs(*WITH_DELIVERY)
def test_a_write_of_the_self_ipi(vmxlab):
    """Vol. 3C, 30.5 and 30.1.5: WRMSR of 83FH requests EAX[7:0] of L2 itself; other bits are #GP(0)."""
    run = vmxlab.run(wrmsr_case(SELF_IPI_MSR, 0x41, enable=WITH_DELIVERY, watch=[STATUS]))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[STATUS] == status(0x41)
    assert page_after(run).requests == (0x41,)
    for low, high in ((0x141, 0), (0x41, 1)):
        check_gp(vmxlab.run(wrmsr_case(SELF_IPI_MSR, low, high, enable=WITH_DELIVERY)))


@pytest.mark.vmx_needs(*WITH_DELIVERY)
def test_a_self_ipi_below_16_is_an_apic_write_exit(vmxlab):
    """Vol. 3C, 30.5 and 28.2.1: with EAX[7:4] = 0 reason 56, offset 3F0H, behind the WRMSR that stored it."""
    for vector in (0, 0x0F):
        steps = (*and_report(), ReportMemory(VIRTUAL_APIC_PAGE + 0x3F0, 8))
        run = vmxlab.run(wrmsr_case(SELF_IPI_MSR, vector, enable=WITH_DELIVERY, watch=[STATUS], steps=steps))
        assert len(run.exits) == 1
        check_trap_like(run.exits[0], ExitReason.APIC_WRITE, 0x3F0, WRMSR_BEHIND)
        assert run.exits[0].watched[STATUS] == 0
        assert page_after(run) == VirtualApicPage({0x3F0: vector})
