"""What two processors can do in common."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import CaseError
from vmxlab.sdm.controls import ControlSet
from vmxlab.structures import Capabilities

properties = settings(derandomize=True, max_examples=40, deadline=None)
WORD = st.integers(0, 2**32 - 1)
SPLIT_MSRS = [0x481, 0x482, 0x483, 0x484, 0x48B, 0x48D, 0x48E, 0x48F, 0x490]


def both(one: dict[int, int], two: dict[int, int], **options: bool) -> Capabilities:
    result = Capabilities(one).intersection(Capabilities(two), **options)
    assert result == Capabilities(two).intersection(Capabilities(one), **options)
    return result


def test_a_processor_with_itself_is_itself(skylake: Capabilities) -> None:
    assert skylake.intersection(skylake) == skylake


@pytest.mark.parametrize("msr", SPLIT_MSRS)
@given(must_a=WORD, may_a=WORD, must_b=WORD, may_b=WORD)
@properties
def test_controls_allowed_in_common_are_allowed_on_each(
    msr: int, must_a: int, may_a: int, must_b: int, may_b: int
) -> None:
    basic = {0x480: 1 << 55}
    a, b = (may_a | must_a) << 32 | must_a, (may_b | must_b) << 32 | must_b
    if (must_a | must_b) & ~(may_a | must_a) | (must_a | must_b) & ~(may_b | must_b):
        with pytest.raises(CaseError, match="no value suits both"):
            both(basic | {msr: a}, basic | {msr: b})
    else:
        common = both(basic | {msr: a}, basic | {msr: b}).raw[msr]
        assert common & 0xFFFF_FFFF == must_a | must_b
        assert common >> 32 == (may_a | must_a) & (may_b | must_b)


def test_the_features_of_the_lesser_processor_remain(skylake_raw: dict[int, int]) -> None:
    haswell = skylake_raw | {0x48B: 0x0004_7FFF_0000_0000, 0x48C: 0x0F01_0611_4141}
    common = both(skylake_raw, haswell)
    assert common.control(ControlSet.SECONDARY).allowed1 == 0x47FFF & 0x2177FFF
    assert common.ept_vpid.bits == 0x0F01_0633_4141 & 0x0F01_0611_4141


def test_a_set_that_one_lacks_is_lacking(skylake_raw: dict[int, int]) -> None:
    older = {msr: value for msr, value in skylake_raw.items() if msr not in (0x48B, 0x48C, 0x491)}
    older[0x482] &= ~(1 << 63)
    older[0x48E] &= ~(1 << 63)
    common = both(skylake_raw, older)
    assert 0x48B not in common.raw
    assert common.control(ControlSet.SECONDARY).allowed1 == 0
    assert common.ept_vpid.bits == 0


def test_true_msrs_go_where_one_has_none(skylake_raw: dict[int, int]) -> None:
    first = {msr: value for msr, value in skylake_raw.items() if not 0x48D <= msr <= 0x490}
    first[0x480] &= ~(1 << 55)
    common = both(skylake_raw, first)
    assert not {0x48D, 0x48E, 0x48F, 0x490} & common.raw.keys()
    assert common.control(ControlSet.PRIMARY).allowed0 == 0x0401_E172
    stale = skylake_raw | {0x480: first[0x480]}  # MSRs read though bit 55 says that they don't exist
    assert not {0x48D, 0x48E, 0x48F, 0x490} & both(skylake_raw, stale).raw.keys()


@pytest.mark.parametrize(
    ("msr", "field", "one", "two", "common"),
    [
        (0x480, "region_size", 0x400 << 32, 0x1000 << 32, 0x1000),
        (0x480, "is_32bit_address", 0, 1 << 48, True),
        (0x480, "dual_monitor", 0, 1 << 49, False),
        (0x480, "io_exit_info", 0, 1 << 54, False),
        (0x480, "error_code_any_vector", 1 << 56, 1 << 56, True),
        (0x485, "preemption_timer_shift", 5, 0, 5),
        (0x485, "activity_hlt", 1 << 6, 0, False),
        (0x485, "cr3_target_count", 4 << 16, 0x100 << 16, 4),
        (0x485, "max_msr_list", 0, 3 << 25, 0),
        (0x485, "vmwrite_any_field", 1 << 29, 1 << 29, True),
    ],
)
def test_single_fields_in_common(
    msr: int, field: str, one: int, two: int, common: int, skylake_raw: dict[int, int]
) -> None:
    keep = {0x480: 0x2B | 6 << 50 | 1 << 55, 0x485: 0}[msr]
    result = both(skylake_raw | {msr: keep | one}, skylake_raw | {msr: keep | two})
    assert getattr(result.basic if msr == 0x480 else result.misc, field) == common


def test_fixed_bits_of_cr0_and_cr4_are_those_of_both(skylake_raw: dict[int, int]) -> None:
    common = both(skylake_raw, skylake_raw | {0x488: 0x2020, 0x489: 0x27FF})
    assert common.cr4_fixed0 == 0x2020
    assert common.cr4_fixed1 == 0x27FF
    with pytest.raises(CaseError, match="IA32_VMX_CR4_FIXED0"):
        both(skylake_raw, skylake_raw | {0x488: 0x80_2000, 0x489: 0xFF_67FF})


def test_64_bit_sets_and_vm_functions_are_what_both_allow(skylake_raw: dict[int, int]) -> None:
    one = skylake_raw | {0x491: 3, 0x492: 1 << 40 | 6, 0x493: 0xC}
    two = skylake_raw | {0x491: 1, 0x492: 1 << 40 | 3, 0x493: 0x8}
    common = both(one, two)
    assert (common.raw[0x491], common.raw[0x492], common.raw[0x493]) == (1, 1 << 40 | 2, 8)
    assert both(one, two | {0x48A: 0x30}).vmcs_enum.highest_index == 0x17


def test_the_smaller_hlat_prefix_is_the_common_one(skylake_raw: dict[int, int]) -> None:
    common = both(skylake_raw | {0x48C: 6 << 48 | 1}, skylake_raw | {0x48C: 1 << 48 | 3})
    assert common.ept_vpid.max_hlat_prefix_size == 1
    assert common.ept_vpid.execute_only


@pytest.mark.parametrize(
    ("msr", "change", "what"),
    [
        (0x480, 0x2B ^ 0x4, r"IA32_VMX_BASIC\[30:0\].*0x2b and 0x4|0x4 and 0x2b"),
        (0x485, 7 << 32, r"IA32_VMX_MISC\[63:32\]"),
    ],
)
def test_different_revision_ids_have_nothing_in_common(
    msr: int, change: int, what: str, skylake_raw: dict[int, int]
) -> None:
    other = skylake_raw | {msr: skylake_raw[msr] ^ change}
    with pytest.raises(CaseError, match=what):
        Capabilities(skylake_raw).intersection(Capabilities(other))
    common = both(skylake_raw, other, ignore_revision_ids=True)
    assert common.basic.revision_id == (0 if msr == 0x480 else 0x2B)
    assert common.misc.mseg_revision_id == 0


def test_different_memory_types_have_nothing_in_common(skylake_raw: dict[int, int]) -> None:
    with pytest.raises(CaseError, match="memory types"):
        both(skylake_raw, skylake_raw | {0x480: skylake_raw[0x480] & ~(0xF << 50)})


def test_other_msrs_stay_only_where_they_are_equal(skylake_raw: dict[int, int]) -> None:
    common = both(skylake_raw | {0x3A: 5, 0x1B: 1}, skylake_raw | {0x3A: 5, 0x1B: 2})
    assert common.raw[0x3A] == 5
    assert 0x1B not in common.raw


def test_with_a_processor_without_vmx_nothing_is_in_common(skylake: Capabilities) -> None:
    assert skylake.intersection(Capabilities({})) == Capabilities({})
