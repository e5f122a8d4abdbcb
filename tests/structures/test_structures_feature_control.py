"""IA32_FEATURE_CONTROL: what a write changes, keeps, and may not do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import GeneralProtection, OutOfRange
from vmxlab.structures import FeatureControl, FeatureControlFlags

properties = settings(derandomize=True, max_examples=60, deadline=None)
F = FeatureControlFlags
DEFINED = [0, 1, 2, *range(8, 15), 15, 17, 18, 20]
VMX_BITS = 0b111


@pytest.mark.parametrize(
    ("flag", "bits"),
    [
        (F.LOCKED, [0]),
        (F.VMXON_ENABLED_INSIDE_SMX, [1]),
        (F.VMXON_ENABLED_OUTSIDE_SMX, [2]),
        (F.SENTER_LOCAL_FUNCTIONS, [8, 9, 10, 11, 12, 13, 14]),
        (F.SENTER_GLOBAL_ENABLE, [15]),
        (F.SGX_LAUNCH_CONTROL_ENABLE, [17]),
        (F.SGX_GLOBAL_ENABLE, [18]),
        (F.LMCE_ON, [20]),
    ],
)
def test_flags_are_the_bits_of_the_manual(flag: FeatureControlFlags, bits: list[int]) -> None:
    assert int(flag) == sum(1 << bit for bit in bits)


@pytest.mark.parametrize("raw", range(8))
def test_vmxon_needs_the_lock_and_the_bit_for_where_it_runs(raw: int) -> None:
    control = FeatureControl(raw)
    assert control.vmxon_allowed() is (raw in (5, 7))
    assert control.vmxon_allowed(in_smx=True) is (raw in (3, 7))


def test_after_reset_a_write_sets_what_vmxon_needs() -> None:
    new = FeatureControl.write(0, F.LOCKED | F.VMXON_ENABLED_OUTSIDE_SMX)
    assert new == 0x5
    assert FeatureControl(new).vmxon_allowed()
    assert FeatureControl.read(new) == F.LOCKED | F.VMXON_ENABLED_OUTSIDE_SMX


@given(st.integers(0, 2**64 - 1), st.integers(0, 7), st.sets(st.sampled_from(DEFINED[3:])))
@properties
def test_a_write_keeps_what_its_flags_do_not_cover(old: int, vmx: int, others: set[int]) -> None:
    old &= ~1
    flags = vmx | sum(1 << bit for bit in others)
    new = FeatureControl.write(old, flags)
    for bit in range(64):
        if bit < 3:
            assert new >> bit & 1 == vmx >> bit & 1
        elif bit in others:
            assert new >> bit & 1
        else:
            assert new >> bit & 1 == old >> bit & 1, bit


def test_a_write_can_take_away_vmx_bits_and_others_by_name() -> None:
    old = int(F.VMXON_ENABLED_INSIDE_SMX | F.SGX_GLOBAL_ENABLE | F.LMCE_ON)
    assert FeatureControl.write(old, 0) == F.SGX_GLOBAL_ENABLE | F.LMCE_ON
    assert FeatureControl.write(old, 0, clear=F.LMCE_ON) == F.SGX_GLOBAL_ENABLE


@pytest.mark.parametrize("old", [0x1, 0x5, 0xFFFF])
@pytest.mark.parametrize("flags", [0, 0x1, 0x5])
def test_a_write_to_a_locked_register_is_a_general_protection_fault(old: int, flags: int) -> None:
    with pytest.raises(GeneralProtection, match=r"#GP\(0\).*locked"):
        FeatureControl.write(old, flags)


@pytest.mark.parametrize("bit", [bit for bit in range(64) if bit not in DEFINED])
def test_a_write_of_a_reserved_bit_is_a_general_protection_fault(bit: int) -> None:
    with pytest.raises(GeneralProtection, match="reserved"):
        FeatureControl.write(0, 1 << bit)


@pytest.mark.parametrize("raw", [-1, 1 << 64])
def test_what_64_bits_cannot_hold_is_refused(raw: int) -> None:
    for refused in (
        lambda: FeatureControl(raw),
        lambda: FeatureControl.read(raw),
        lambda: FeatureControl.write(raw, 0),
        lambda: FeatureControl.write(0, raw),
        lambda: FeatureControl.write(0, 0, clear=raw),
    ):
        with pytest.raises(OutOfRange):
            refused()


def test_unknown_bits_survive_reading() -> None:
    assert int(FeatureControl.read(1 << 40 | 5)) == 1 << 40 | 5
    assert FeatureControl(1 << 40).bits == 1 << 40
