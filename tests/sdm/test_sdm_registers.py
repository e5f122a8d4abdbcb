"""Registers, vectors, MSR addresses."""

from __future__ import annotations

import pytest

from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import (
    CR0,
    CR4,
    DR6,
    DR7,
    EFER,
    GENERAL_REGISTERS,
    RFLAGS,
    FeatureControlFlags,
    MemoryType,
    Vector,
)


@pytest.mark.parametrize(
    ("flag", "position"),
    [
        (CR0.PE, 0),
        (CR0.NE, 5),
        (CR0.WP, 16),
        (CR0.AM, 18),
        (CR0.NW, 29),
        (CR0.CD, 30),
        (CR0.PG, 31),
        (CR4.PAE, 5),
        (CR4.OSFXSR, 9),
        (CR4.LA57, 12),
        (CR4.VMXE, 13),
        (CR4.SMXE, 14),
        (CR4.PCIDE, 17),
        (CR4.OSXSAVE, 18),
        (CR4.SMEP, 20),
        (CR4.CET, 23),
        (CR4.UINTR, 25),
        (CR4.FRED, 32),
        (EFER.SCE, 0),
        (EFER.LME, 8),
        (EFER.LMA, 10),
        (EFER.NXE, 11),
        (RFLAGS.CF, 0),
        (RFLAGS.ZF, 6),
        (RFLAGS.TF, 8),
        (RFLAGS.IF, 9),
        (RFLAGS.RF, 16),
        (RFLAGS.VM, 17),
        (RFLAGS.ID, 21),
        (DR6.BS, 14),
        (DR7.GD, 13),
        (FeatureControlFlags.LOCKED, 0),
        (FeatureControlFlags.VMXON_ENABLED_OUTSIDE_SMX, 2),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_register_bit_is_where_the_manual_prints_it(flag: int, position: int) -> None:
    assert flag == 1 << position


def test_the_values_after_reset_are_made_of_named_bits() -> None:
    assert CR0.CD | CR0.NW | CR0.ET == 0x6000_0010
    assert int(RFLAGS.FIXED1) == 2
    assert int(DR7.FIXED1) == 0x400


def test_general_registers_are_numbered_as_instructions_encode_them() -> None:
    assert GENERAL_REGISTERS[:8] == ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
    assert GENERAL_REGISTERS[8:] == tuple(f"r{number}" for number in range(8, 16))


@pytest.mark.parametrize(
    ("vector", "number", "has_error_code"),
    [
        (Vector.DE, 0, False),
        (Vector.DB, 1, False),
        (Vector.BP, 3, False),
        (Vector.UD, 6, False),
        (Vector.DF, 8, True),
        (Vector.TS, 10, True),
        (Vector.GP, 13, True),
        (Vector.PF, 14, True),
        (Vector.MF, 16, False),
        (Vector.AC, 17, True),
        (Vector.MC, 18, False),
        (Vector.VE, 20, False),
        (Vector.CP, 21, True),
    ],
)
def test_an_exception_has_its_vector_and_may_have_an_error_code(
    vector: Vector, number: int, has_error_code: bool
) -> None:
    assert vector == number
    assert vector.has_error_code is has_error_code


def test_memory_types_are_those_an_ept_entry_encodes() -> None:
    assert {member.name: int(member) for member in MemoryType} == {
        "UC": 0,
        "WC": 1,
        "WT": 4,
        "WP": 5,
        "WB": 6,
    }


@pytest.mark.parametrize(
    ("msr", "address"),
    [
        (Msr.IA32_TSC, 0x10),
        (Msr.IA32_APIC_BASE, 0x1B),
        (Msr.IA32_FEATURE_CONTROL, 0x3A),
        (Msr.IA32_SYSENTER_CS, 0x174),
        (Msr.IA32_MISC_ENABLE, 0x1A0),
        (Msr.IA32_DEBUGCTL, 0x1D9),
        (Msr.IA32_PAT, 0x277),
        (Msr.IA32_PERF_GLOBAL_CTRL, 0x38F),
        (Msr.IA32_VMX_BASIC, 0x480),
        (Msr.IA32_VMX_MISC, 0x485),
        (Msr.IA32_VMX_CR4_FIXED1, 0x489),
        (Msr.IA32_VMX_VMCS_ENUM, 0x48A),
        (Msr.IA32_VMX_EPT_VPID_CAP, 0x48C),
        (Msr.IA32_VMX_VMFUNC, 0x491),
        (Msr.IA32_VMX_EXIT_CTLS2, 0x493),
        (Msr.IA32_BNDCFGS, 0xD90),
        (Msr.IA32_XSS, 0xDA0),
        (Msr.IA32_EFER, 0xC000_0080),
        (Msr.IA32_STAR, 0xC000_0081),
        (Msr.IA32_LSTAR, 0xC000_0082),
        (Msr.IA32_FMASK, 0xC000_0084),
        (Msr.IA32_FS_BASE, 0xC000_0100),
        (Msr.IA32_KERNEL_GS_BASE, 0xC000_0102),
        (Msr.IA32_TSC_AUX, 0xC000_0103),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_msr_has_the_address_that_the_manual_prints(msr: Msr, address: int) -> None:
    assert msr == address


def test_the_vmx_capability_msrs_leave_no_gap() -> None:
    assert [msr for msr in Msr if 0x480 <= msr < 0x500] == list(range(0x480, 0x494))
