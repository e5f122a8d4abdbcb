"""The time-stamp counter in L2: offset, multiplier and IA32_TSC_AUX (SDM Vol. 3C, 25.6.5 and 26.3)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, MsrBitmap, PrimaryControls, SecondaryControls
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.steps import STANDARD, Rdmsr, Wrmsr
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR4, Vector

from .guest_setups import merged, user_mode

P, S = PrimaryControls, SecondaryControls

READERS = {
    "rdtsc": "rdtsc",
    "rdtscp": "rdtscp",
    "rdmsr": f"mov ecx, {int(Msr.IA32_TSC):#x}; rdmsr",
}
EVERY_WAY = pytest.mark.parametrize("reader", READERS)
WRAP = 1 << 64


def tsc_case(reader: str, *, enable=(), disable=(), fields=None, **more) -> Case:
    """L2 reads its TSC once; L1 reads its own before and after."""
    enable = (*enable, *((S.ENABLE_RDTSCP,) if reader == "rdtscp" else ()))
    program = f"{READERS[reader]}; shl rdx, 32; or rax, rdx; hlt"
    return Case(
        program=program,
        enable=enable,
        disable=(P.RDTSC_EXITING, *disable),
        msr_bitmap=MsrBitmap.passthrough_all(),
        fields=fields or {},
        steps=(Rdmsr(Msr.IA32_TSC), *STANDARD, Rdmsr(Msr.IA32_TSC)),
        **more,
    )


def times(run) -> tuple[int, int, int]:
    """L1's TSC before, L2's in between, L1's after."""
    assert run.reasons == [ExitReason.HLT]
    before, after = (outcome.value for outcome in run.outcomes if outcome.operation == "rdmsr")
    return before, run.exits[0].registers["rax"], after


@EVERY_WAY
def test_without_offsetting_l2_reads_the_processors_counter(vmxlab, reader):
    """Vol. 3C, 26.3: with "use TSC offsetting" 0 the offset is not used, whatever it is."""
    case = tsc_case(reader, disable=(P.USE_TSC_OFFSETTING,), fields={Field.TSC_OFFSET: 1 << 62})
    before, seen, after = times(vmxlab.run(case))
    assert before < seen < after


@EVERY_WAY
@pytest.mark.parametrize("offset", [1 << 50, WRAP - (1 << 50), 0x8000_0000_0000_0000])
def test_the_offset_is_added(vmxlab, reader, offset):
    """Vol. 3C, 25.6.5 and 26.3: RDTSC, RDTSCP and RDMSR give the sum of TSC and TSC offset, modulo 2^64."""
    case = tsc_case(reader, enable=(P.USE_TSC_OFFSETTING,), fields={Field.TSC_OFFSET: offset})
    before, seen, after = times(vmxlab.run(case))
    assert before < (seen - offset) % WRAP < after


@pytest.mark.vmx_needs(S.USE_TSC_SCALING)
@EVERY_WAY
@pytest.mark.parametrize("multiplier", [1 << 48, 1 << 47, 3 << 47, 1 << 52, 1 << 40])
def test_the_counter_is_multiplied_before_the_offset_is_added(vmxlab, reader, multiplier):
    """Vol. 3C, 25.6.5 and 26.3: TSC times multiplier, shifted right by 48 bits, plus the offset."""
    offset = 1 << 55
    case = tsc_case(
        reader,
        enable=(P.USE_TSC_OFFSETTING, S.USE_TSC_SCALING),
        fields={Field.TSC_OFFSET: offset, Field.TSC_MULTIPLIER: multiplier},
    )
    before, seen, after = times(vmxlab.run(case))
    assert (before * multiplier >> 48) <= (seen - offset) % WRAP <= (after * multiplier >> 48)


@pytest.mark.vmx_needs(S.USE_TSC_SCALING)
def test_scaling_is_part_of_offsetting(vmxlab):
    """Vol. 3C, 26.3: with "use TSC offsetting" 0 the multiplier is not used either."""
    case = tsc_case(
        "rdtsc",
        enable=(S.USE_TSC_SCALING,),
        disable=(P.USE_TSC_OFFSETTING,),
        fields={Field.TSC_OFFSET: 1 << 62, Field.TSC_MULTIPLIER: 1 << 60},
    )
    before, seen, after = times(vmxlab.run(case))
    assert before < seen < after


def test_two_reads_go_on(vmxlab):
    """Vol. 3C, 26.3: the counter runs in L2, offset or not, and across exits."""
    read = "rdtsc; shl rdx, 32; or rax, rdx; mov {}, rax"
    program = f"{read.format('rsi')}; vmcall; {read.format('rdi')}; hlt"
    case = Case(program=program, enable=P.USE_TSC_OFFSETTING, fields={Field.TSC_OFFSET: 1 << 40})
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    registers = run.exits[1].registers
    assert 1 << 40 < registers["rsi"] < registers["rdi"]


def test_rdtscp_reads_tsc_aux(vmxlab):
    """Vol. 2B, RDTSCP: ECX is IA32_TSC_AUX; no VMCS field holds it, so that it is what L1 wrote."""
    vmxlab.require(S.ENABLE_RDTSCP)
    run = vmxlab.run(
        Case(
            program="rdtscp; hlt",
            registers={"rcx": WRAP - 1},
            enable=S.ENABLE_RDTSCP,
            disable=P.RDTSC_EXITING,
            steps=(Wrmsr(Msr.IA32_TSC_AUX, 0x1234_5678), *STANDARD, Wrmsr(Msr.IA32_TSC_AUX, 0)),
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rcx"] == 0x1234_5678


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.parametrize("instruction", ["rdtsc", "rdtscp"])
@pytest.mark.parametrize("exiting", [False, True])
def test_cr4_tsd_comes_before_the_exit(vmxlab, instruction, exiting):
    """Vol. 3C, 26.1.1: at CPL 3 with CR4.TSD set they are #GP(0), and do not exit by "RDTSC exiting"."""
    enable = (
        *((S.ENABLE_RDTSCP,) if instruction == "rdtscp" else ()),
        *((P.RDTSC_EXITING,) if exiting else ()),
    )
    cr4 = int(CR4.PAE | CR4.TSD | vmxlab.capabilities.cr4_fixed0)
    parts = merged(user_mode(), fields={Field.GUEST_CR4: cr4})
    run = vmxlab.run(Case(program=f"nop; {instruction}; hlt", enable=enable, **parts))
    assert run.exits[0].full_reason == ExitReason.EXCEPTION_OR_NMI
    assert run.exits[0].interruption.vector == Vector.GP
    assert run.exits[0].interruption_error_code == 0
    assert run.exits[0].rip == PROGRAM + 1


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.parametrize("instruction", ["rdtsc", "rdtscp"])
def test_rdtsc_exits_at_privilege_level_3_too(vmxlab, instruction):
    """Vol. 3C, 26.1.3: "RDTSC exiting" is for any CPL."""
    enable = (P.RDTSC_EXITING, *((S.ENABLE_RDTSCP,) if instruction == "rdtscp" else ()))
    run = vmxlab.run(Case(program=f"nop; {instruction}", enable=enable, **user_mode()))
    assert run.exits[0].full_reason == ExitReason[instruction.upper()]
    assert run.exits[0].rip == PROGRAM + 1
