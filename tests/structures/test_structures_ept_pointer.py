"""The EPTP: fields that decode, addresses that are refused, and the rules of VM entry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import Misaligned, MissingCapability, OutOfRange
from vmxlab.structures import EPTPointer, EptVpidCap, MemoryType

properties = settings(derandomize=True, max_examples=100, deadline=None)

SKYLAKE = EptVpidCap(0x0F01_0633_4141)
ALL = EptVpidCap((1 << 64) - 1)
NONE = EptVpidCap(0)


@given(st.integers(0, 2**64 - 1))
@properties
def test_any_64_bit_value_decodes_and_comes_back(raw: int) -> None:
    pointer = EPTPointer.from_bits(raw)
    assert pointer.bits == raw
    assert int(pointer.memory_type) == raw % 8
    assert pointer.page_walk_length == raw // 8 % 8 + 1
    assert pointer.accessed_dirty == bool(raw & 64)
    assert pointer.supervisor_shadow_stack == bool(raw & 128)
    assert pointer.reserved == raw & 0xF00
    assert pointer.address == raw - raw % 4096
    assert f"{raw:#x}" in repr(pointer)


def test_memory_type_and_walk_length_are_fields_and_not_flags() -> None:
    # As flags, 6 would contain 4 and 2, and length 4 would contain length 2.
    pointer = EPTPointer(memory_type=MemoryType.WB, page_walk_length=4)
    assert pointer.bits == 6 | 3 << 3
    assert pointer.memory_type is MemoryType.WB
    assert EPTPointer.from_bits(2).memory_type == 2


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_walk_length_is_written_less_one(length: int) -> None:
    pointer = EPTPointer.from_table_phys(0x1000, page_walk_length=length, accessed_dirty=False)
    assert pointer.bits == 0x1000 | 6 | (length - 1) << 3
    assert pointer.bits & 0x38 == getattr(EPTPointer, f"WALK_LENGTH_{length}")


def test_from_table_phys_takes_every_field() -> None:
    pointer = EPTPointer.from_table_phys(
        0xABCD_E000,
        memory_type=MemoryType.UC,
        page_walk_length=5,
        accessed_dirty=False,
        supervisor_shadow_stack=True,
    )
    assert pointer.bits == 0xABCD_E000 | 0 | 4 << 3 | 1 << 7


@pytest.mark.parametrize("address", [1, 0x800, 0xFFF, 0x1234_5678])
def test_from_table_phys_refuses_a_misaligned_address(address: int) -> None:
    with pytest.raises(Misaligned, match="EPT root table"):
        EPTPointer.from_table_phys(address)
    assert EPTPointer.from_table_phys_aligned_down(address).address == address - address % 4096


@pytest.mark.parametrize(("address", "width"), [(1 << 52, 52), (1 << 36, 36), (1 << 46, 46), (-4096, 52)])
def test_from_table_phys_refuses_an_address_that_is_too_wide(address: int, width: int) -> None:
    for make in (EPTPointer.from_table_phys, EPTPointer.from_table_phys_aligned_down):
        with pytest.raises(OutOfRange):
            make(address, physical_address_width=width)
    if address > 0:
        last = address - 4096
        assert EPTPointer.from_table_phys(last, physical_address_width=width).address == last


@pytest.mark.parametrize("width", [0, 31, 53, 64])
def test_an_impossible_physical_address_width_is_refused(width: int) -> None:
    with pytest.raises(OutOfRange, match="width"):
        EPTPointer.from_table_phys(0, physical_address_width=width)


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_type": 8},
        {"memory_type": -1},
        {"page_walk_length": 0},
        {"page_walk_length": 9},
        {"reserved": 0x1000},
        {"reserved": 1},
        {"address": 0x1001},
        {"address": 1 << 64},
    ],
    ids=str,
)
def test_what_a_field_cannot_hold_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(OutOfRange):
        EPTPointer(**fields)


@pytest.mark.parametrize("raw", [-1, 1 << 64])
def test_what_64_bits_cannot_hold_is_refused(raw: int) -> None:
    with pytest.raises(OutOfRange):
        EPTPointer.from_bits(raw)


@pytest.mark.parametrize(
    ("raw", "capabilities", "width", "bits"),
    [
        (0x1000 | 6 | 3 << 3 | 1 << 6, SKYLAKE, 52, []),
        (0x1000 | 0 | 3 << 3, SKYLAKE, 52, []),
        (0x1000 | 6 | 4 << 3, SKYLAKE, 52, ["IA32_VMX_EPT_VPID_CAP[7]"]),
        (0x1000 | 6 | 4 << 3, ALL, 52, []),
        (0x1000 | 6 | 3 << 3, NONE, 52, ["IA32_VMX_EPT_VPID_CAP[14]", "IA32_VMX_EPT_VPID_CAP[6]"]),
        (0x1000 | 0 | 3 << 3, NONE, 52, ["IA32_VMX_EPT_VPID_CAP[8]", "IA32_VMX_EPT_VPID_CAP[6]"]),
        (0x1000 | 6 | 3 << 3 | 1 << 6, EptVpidCap(1 << 6 | 1 << 14), 52, ["IA32_VMX_EPT_VPID_CAP[21]"]),
        (0x1000 | 6 | 3 << 3 | 1 << 7, SKYLAKE, 52, ["IA32_VMX_EPT_VPID_CAP[23]"]),
        (0x1000 | 6 | 3 << 3 | 1 << 7, ALL, 52, []),
        (0x1000 | 1 | 3 << 3, ALL, 52, [None]),  # write-combining is no type for the structures themselves
        (0x1000 | 2 | 3 << 3, ALL, 52, [None]),
        (0x1000 | 6 | 2 << 3, ALL, 52, [None]),
        (0x1000 | 6 | 7 << 3, ALL, 52, [None]),
        (0x1000 | 6 | 3 << 3 | 1 << 8, ALL, 52, [None]),
        (0x1000 | 6 | 3 << 3 | 1 << 11, ALL, 52, [None]),
        (1 << 36 | 6 | 3 << 3, ALL, 36, [None]),
        (1 << 36 | 6 | 3 << 3, ALL, 37, []),
        (1 << 63 | 6 | 3 << 3, ALL, 52, [None]),
        (
            (1 << 64) - 1,
            NONE,
            52,
            [None, None, "IA32_VMX_EPT_VPID_CAP[21]", "IA32_VMX_EPT_VPID_CAP[23]", None, None],
        ),
    ],
)
def test_check_names_every_rule_that_is_broken(
    raw: int, capabilities: EptVpidCap, width: int, bits: list[str | None]
) -> None:
    broken = EPTPointer.from_bits(raw).check(capabilities, width)
    assert [rule.bit for rule in broken] == bits
    assert all("27.2.1.1" in str(rule) for rule in broken)


def test_require_tells_a_missing_feature_from_an_illegal_value() -> None:
    EPTPointer.from_table_phys(0x1000).require(SKYLAKE)
    with pytest.raises(MissingCapability) as missing:
        EPTPointer.from_table_phys(0x1000, page_walk_length=5).require(SKYLAKE)
    assert missing.value.bit == "IA32_VMX_EPT_VPID_CAP[7]"
    assert missing.value.feature == "EPT page-walk length 5"
    with pytest.raises(OutOfRange, match="reserved"):
        EPTPointer.from_bits(0x1000 | 7 | 4 << 3).require(SKYLAKE)
