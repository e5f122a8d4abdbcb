"""XSAVES and XRSTORS with the XSS-exiting bitmap; XSETBV and privilege (SDM Vol. 3C, 26.1.3 and 26.3)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, MsrBitmap, SecondaryControls
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.cases.steps import STANDARD, Wrmsr
from vmxlab.sdm.instruction_information import MemoryOperand
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR4, GENERAL_REGISTERS, SEGMENT_REGISTERS, Vector

from .guest_setups import merged, user_mode

S = SecondaryControls
REASONS = {"xsaves": ExitReason.XSAVES, "xrstors": ExitReason.XRSTORS}
NAMES = pytest.mark.parametrize("name", REASONS)
AREA = DATA + 0x2000
ALL = (1 << 64) - 1
PT_STATE = 1 << 8
CET_USER = 1 << 11


@pytest.fixture(scope="module")
def xss(vmxlab) -> int:
    """A bit that IA32_XSS of this processor can have; left 0 in L1 when the module is done."""
    vmxlab.require(S.ENABLE_XSAVES)
    for candidate in (PT_STATE, CET_USER, 1 << 12, 1 << 10):
        steps = [Wrmsr(Msr.IA32_XSS, candidate, go_on=True), Wrmsr(Msr.IA32_XSS, 0, go_on=True)]
        run = vmxlab.run(Case(steps=steps))
        if run.outcomes[0].ok:
            return candidate
    pytest.skip("the processor supports no bit of IA32_XSS")


def with_osxsave(vmxlab) -> dict[Field, int]:
    vmxlab.require(CR4.OSXSAVE)
    return {Field.GUEST_CR4: int(CR4.PAE | CR4.OSXSAVE | vmxlab.capabilities.cr4_fixed0)}


def xsaves_case(vmxlab, program: str, *, bitmap: int = ALL, xss: int = 0, **more) -> Case:
    """L2 may execute both; IA32_XSS is `xss` while it runs."""
    fields = {**with_osxsave(vmxlab), Field.XSS_EXITING_BITMAP: bitmap, **more.pop("fields", {})}
    steps = (Wrmsr(Msr.IA32_XSS, xss), *STANDARD, Wrmsr(Msr.IA32_XSS, 0))
    return Case(program=program, enable=S.ENABLE_XSAVES, fields=fields, steps=steps, **more)


# --- exits -------------------------------------------------------------------------------------------------

OPERANDS = {
    "[rbx]": (("rbx", None, 1, "ds"), 0),
    "[rsp + rcx*8 + 0x40]": (("rsp", "rcx", 8, "ss"), 0x40),
    "fs:[r13 + r9*2 - 0x1000]": (("r13", "r9", 2, "fs"), -0x1000),
    "[r15*4 + 0x40]": ((None, "r15", 4, "ds"), 0x40),
}


def same_operand(seen: MemoryOperand, base, index, scale, segment, bits: int = 64) -> bool:
    def number(name):
        return None if name is None else GENERAL_REGISTERS.index(name)

    expected = (bits, SEGMENT_REGISTERS.index(segment), number(base), number(index))
    return (seen.address_size, seen.segment, seen.base, seen.index) == expected and (
        index is None or seen.scale == scale
    )


@NAMES
def test_a_bit_of_mask_xss_and_bitmap_makes_it_exit(vmxlab, name, xss):
    """Vol. 3C, 26.1.3 and table 28-14: reason, operand, displacement and length; it is not executed."""
    registers = {n: 0x40 * i for i, n in enumerate(GENERAL_REGISTERS)}
    registers |= {"rax": xss & 0xFFFF_FFFF, "rdx": xss >> 32, "rsp": 0x7000}
    program = "; ".join(f"{name} {text}" for text in OPERANDS)
    run = vmxlab.run(xsaves_case(vmxlab, f"{program}; hlt", xss=xss, registers=registers))
    assert run.reasons == [REASONS[name]] * len(OPERANDS) + [ExitReason.HLT]
    following = run.exits[1:]
    for (operand, displacement), exit_, after in zip(OPERANDS.values(), run.exits, following, strict=False):
        assert exit_.full_reason == REASONS[name]
        assert exit_.instruction_length == after.rip - exit_.rip
        assert exit_.qualification.displacement == displacement
        assert same_operand(exit_.instruction_information.memory, *operand), exit_
        assert exit_.registers == registers
        assert not exit_.interruption.valid
        assert not exit_.idt_vectoring.valid


@NAMES
def test_it_exits_outside_64_bit_mode_too(vmxlab, name, xss):
    """Vol. 3C, 26.1.3 and table 28-14: the address size is that of the instruction."""
    case = xsaves_case(
        vmxlab,
        f"{name} [ebx + 8]; hlt",
        xss=xss,
        mode=Mode.PROTECTED,
        registers={"rax": xss & 0xFFFF_FFFF, "rdx": xss >> 32},
        fields={Field.GUEST_CR4: int(CR4.OSXSAVE | vmxlab.capabilities.cr4_fixed0 | CR4.PSE)},
    )
    run = vmxlab.run(case)
    assert run.reasons == [REASONS[name], ExitReason.HLT]
    assert run.exits[0].qualification.displacement & 0xFFFF_FFFF == 8
    assert same_operand(run.exits[0].instruction_information.memory, "rbx", None, 1, "ds", bits=32)


def test_all_three_must_have_the_bit(vmxlab, xss):
    """Vol. 3C, 26.1.3: EDX:EAX, IA32_XSS and the XSS-exiting bitmap are ANDed; 0 lets it be executed."""
    program = "xsaves [rdi]; xrstors [rdi]; hlt"
    lacking = ((0, xss, ALL), (3, xss, ALL), (ALL, 0, ALL), (ALL, xss, 0), (ALL, xss, ~xss & ALL))
    for mask, xss_value, bitmap in lacking:
        registers = {"rdi": AREA, "rax": mask & 0xFFFF_FFFF, "rdx": mask >> 32}
        run = vmxlab.run(xsaves_case(vmxlab, program, bitmap=bitmap, xss=xss_value, registers=registers))
        assert run.reasons == [ExitReason.HLT], (mask, xss_value, bitmap)


def test_the_bitmap_is_for_the_bits_of_xss_alone(vmxlab, xss):
    """Vol. 3C, 26.1.3: bits of XCR0's own features in mask and bitmap make nothing exit."""
    registers = {"rdi": AREA, "rax": 3, "rdx": 0}
    run = vmxlab.run(xsaves_case(vmxlab, "xsaves [rdi]; hlt", bitmap=7, xss=xss, registers=registers))
    assert run.reasons == [ExitReason.HLT]


# --- faults ------------------------------------------------------------------------------------------------


def check_fault(exit_, vector: Vector, rip: int) -> None:
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.interruption.vector == vector
    assert exit_.interruption_error_code == 0
    assert exit_.rip == rip


@NAMES
def test_without_the_control_it_is_undefined(vmxlab, name, xss):
    """Vol. 3C, 26.3: with "enable XSAVES/XRSTORS" 0 it is #UD, whatever the bitmap says."""
    case = Case(
        program=f"nop; {name} [rdi]",
        disable=S.ENABLE_XSAVES,
        registers={"rax": xss},
        fields={**with_osxsave(vmxlab), Field.XSS_EXITING_BITMAP: ALL},
        steps=(Wrmsr(Msr.IA32_XSS, xss), *STANDARD, Wrmsr(Msr.IA32_XSS, 0)),
    )
    check_fault(vmxlab.run(case).exits[0], Vector.UD, PROGRAM + 1)


@NAMES
def test_privilege_comes_before_the_exit(vmxlab, name, xss):
    """Vol. 3C, 26.1.1: at CPL 3 it is #GP(0), not an exit."""
    parts = merged(user_mode(), fields=with_osxsave(vmxlab))
    case = xsaves_case(vmxlab, f"nop; {name} [rdi]", xss=xss, registers={"rax": xss, "rdi": AREA}, **parts)
    check_fault(vmxlab.run(case).exits[0], Vector.GP, PROGRAM + 1)


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.vmx_known_difference("exit-before-privilege-fault")
def test_xsetbv_at_privilege_level_3_faults(vmxlab):
    """Vol. 3C, 26.1.1 and 26.1.2: XSETBV exits unconditionally, but its #GP(0) for CPL 3 comes first."""
    parts = merged(user_mode(), fields=with_osxsave(vmxlab))
    check_fault(vmxlab.run(Case(program="nop; xsetbv", **parts)).exits[0], Vector.GP, PROGRAM + 1)


def test_xgetbv_does_not_exit(vmxlab):
    """Vol. 3C, 26.1: reading XCR0 is in no list of what exits; bit 0 of it is always 1 (Vol. 1, 13.3)."""
    run = vmxlab.run(Case(program="xgetbv; hlt", fields=with_osxsave(vmxlab)))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] & 1


def test_xss_is_an_ordinary_msr_to_l2(vmxlab, xss):
    """Vol. 3C, 26.1.3: with the MSR bitmap clear L2 itself writes IA32_XSS, and its XSAVES exits by it."""
    program = (
        f"mov ecx, {int(Msr.IA32_XSS):#x}; mov eax, {xss}; xor edx, edx; wrmsr; xsaves [rdi]; "
        f"xor eax, eax; wrmsr; mov eax, {xss}; xsaves [rdi]; hlt"
    )
    case = xsaves_case(vmxlab, program, registers={"rdi": AREA}, msr_bitmap=MsrBitmap.passthrough_all())
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.XSAVES, ExitReason.HLT]
