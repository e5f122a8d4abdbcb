"""Single capability MSRs: each field is where the manual has it, and no bit is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import MissingCapability, OutOfRange
from vmxlab.sdm.registers import ActivityState
from vmxlab.structures import EptVpidCap, MemoryType, VmcsEnum, VmFunc, VmxBasic, VmxMisc
from vmxlab.structures.register import Register

properties = settings(derandomize=True, max_examples=40, deadline=None)

# SDM Vol. 3D, Appendix A, once more and by hand: (register, field, high bit, low bit).
TABLE = [
    (VmxBasic, "revision_id", 30, 0),
    (VmxBasic, "region_size", 44, 32),
    (VmxBasic, "is_32bit_address", 48, 48),
    (VmxBasic, "dual_monitor", 49, 49),
    (VmxBasic, "mem_type", 53, 50),
    (VmxBasic, "io_exit_info", 54, 54),
    (VmxBasic, "vmx_flex_controls", 55, 55),
    (VmxBasic, "error_code_any_vector", 56, 56),
    (VmxBasic, "nested_exception", 58, 58),
    (VmxMisc, "preemption_timer_shift", 4, 0),
    (VmxMisc, "stores_efer_lma", 5, 5),
    (VmxMisc, "activity_hlt", 6, 6),
    (VmxMisc, "activity_shutdown", 7, 7),
    (VmxMisc, "activity_wait_for_sipi", 8, 8),
    (VmxMisc, "processor_trace", 14, 14),
    (VmxMisc, "rdmsr_smbase", 15, 15),
    (VmxMisc, "cr3_target_count", 24, 16),
    (VmxMisc, "max_msr_list", 27, 25),
    (VmxMisc, "smm_monitor_vmxoff", 28, 28),
    (VmxMisc, "vmwrite_any_field", 29, 29),
    (VmxMisc, "zero_length_injection", 30, 30),
    (VmxMisc, "mseg_revision_id", 63, 32),
    (VmcsEnum, "highest_index", 9, 1),
    (EptVpidCap, "execute_only", 0, 0),
    (EptVpidCap, "page_walk_length_4", 6, 6),
    (EptVpidCap, "page_walk_length_5", 7, 7),
    (EptVpidCap, "memory_type_uc", 8, 8),
    (EptVpidCap, "memory_type_wb", 14, 14),
    (EptVpidCap, "page_2m", 16, 16),
    (EptVpidCap, "page_1g", 17, 17),
    (EptVpidCap, "invept", 20, 20),
    (EptVpidCap, "accessed_dirty", 21, 21),
    (EptVpidCap, "advanced_exit_information", 22, 22),
    (EptVpidCap, "supervisor_shadow_stack", 23, 23),
    (EptVpidCap, "invept_single_context", 25, 25),
    (EptVpidCap, "invept_all_context", 26, 26),
    (EptVpidCap, "invvpid", 32, 32),
    (EptVpidCap, "invvpid_individual_address", 40, 40),
    (EptVpidCap, "invvpid_single_context", 41, 41),
    (EptVpidCap, "invvpid_all_context", 42, 42),
    (EptVpidCap, "invvpid_single_context_retaining_globals", 43, 43),
    (EptVpidCap, "max_hlat_prefix_size", 53, 48),
    (VmFunc, "eptp_switching", 0, 0),
]
REGISTERS = [VmxBasic, VmxMisc, VmcsEnum, EptVpidCap, VmFunc]
every_field = pytest.mark.parametrize(
    ("register", "field", "high", "low"), TABLE, ids=[f"{row[0].__name__}.{row[1]}" for row in TABLE]
)


@every_field
def test_a_field_is_where_the_manual_has_it(
    register: type[Register], field: str, high: int, low: int
) -> None:
    ones = 2 ** (high - low + 1) - 1
    assert getattr(register(ones << low), field) == ones
    assert getattr(register(2**64 - 1 - (ones << low)), field) == 0
    assert getattr(register(1 << low), field) == 1
    assert isinstance(getattr(register(0), field), bool) == (high == low)


def test_no_field_is_left_out_of_this_table() -> None:
    assert {(register, field) for register, field, *_ in TABLE} == {
        (register, field.name) for register in REGISTERS for field in register.table()
    }


@every_field
def test_require_names_the_feature_and_its_bits(
    register: type[Register], field: str, high: int, low: int
) -> None:
    register(1 << low).require(field)
    with pytest.raises(MissingCapability) as missing:
        register(0).require(field)
    assert missing.value.bit == f"{register.MSR.name}[{low if high == low else f'{high}:{low}'}]"
    assert missing.value.feature


@pytest.mark.parametrize("register", REGISTERS)
@given(raw=st.integers(0, 2**64 - 1))
@properties
def test_no_bit_is_lost_and_undefined_ones_are_shown(register: type[Register], raw: int) -> None:
    value = register.from_bits(raw)
    defined = 0
    for _, _, high, low in (row for row in TABLE if row[0] is register):
        defined |= (2 ** (high - low + 1) - 1) << low
    assert value.bits == raw
    assert value.undefined == raw & ~defined
    assert ("undefined" in repr(value)) == bool(raw & ~defined)


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize("raw", [-1, 1 << 64])
def test_what_64_bits_cannot_hold_is_refused(register: type[Register], raw: int) -> None:
    with pytest.raises(OutOfRange, match=register.MSR.name):
        register(raw)


def test_registers_are_equal_by_kind_and_value() -> None:
    assert VmxBasic(5) == VmxBasic.from_bits(5)
    assert hash(VmxBasic(5)) == hash(VmxBasic(5))
    assert VmxBasic(5) != VmxMisc(5)


def test_the_basics_of_a_real_value() -> None:
    basic = VmxBasic(0x00DA_0400_0000_002B)
    assert basic.revision_id == 0x2B
    assert basic.region_size == 1024
    assert basic.memory_type is MemoryType.WB
    assert basic.mem_type == VmxBasic.VMX_MEMORY_TYPE_WRITE_BACK
    assert basic.vmx_flex_controls is True
    assert basic.is_32bit_address is False
    assert VmxBasic(3 << 50).memory_type == 3
    assert VmxBasic(1 << 44).region_size == 4096


def test_what_misc_means_in_units() -> None:
    misc = VmxMisc(7 | 1 << 6 | 1 << 8 | 2 << 25)
    assert misc.preemption_timer_tsc_ticks == 128
    assert misc.recommended_msr_count == 1536
    assert misc.activity_states == {
        ActivityState.ACTIVE,
        ActivityState.HLT,
        ActivityState.WAIT_FOR_SIPI,
    }
    assert VmxMisc(0).recommended_msr_count == 512


def test_vm_functions_by_number() -> None:
    assert VmFunc(1).allows(0)
    assert not VmFunc(1).allows(1)
    assert not VmFunc(2**64 - 1).allows(64)
    assert not VmFunc(2**64 - 1).allows(-1)
