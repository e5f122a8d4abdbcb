"""The VM-exit instruction-information field."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import OutOfRange
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.instruction_information import (
    DescriptorTableInformation,
    FieldAccessInformation,
    InstructionInformation,
    InvalidationInformation,
    LoadiwkeyInformation,
    MemoryInformation,
    MemoryOperand,
    RandomInformation,
    RegisterInformation,
    StringIoInformation,
    SystemSegmentInformation,
    decode_instruction_information,
)

NO_INDEX = 1 << 22
NO_BASE = 1 << 27
ADDRESS_64 = 2 << 7
DS = 3 << 15


@settings(derandomize=True, deadline=None)
@given(reason=st.integers(0, 0xFFFF_FFFF), raw=st.integers(0, 0xFFFF_FFFF))
def test_any_reason_with_any_value_decodes(reason: int, raw: int) -> None:
    information = decode_instruction_information(reason, raw)
    assert information.raw == raw
    assert information.describe()


@pytest.mark.parametrize("raw", [0, 0xFFFF_FFFF, 0x5555_5555, 0xAAAA_AAAA, 1 << 10])
def test_every_known_reason_and_its_neighbours_decode(raw: int) -> None:
    for reason in range(100):
        information = decode_instruction_information(reason, raw)
        assert information.raw == raw
        assert information.describe()


@pytest.mark.parametrize("raw", [-1, 1 << 32])
def test_a_value_that_is_not_32_bits_is_refused(raw: int) -> None:
    with pytest.raises(OutOfRange, match="instruction information"):
        decode_instruction_information(ExitReason.VMREAD, raw)


@pytest.mark.parametrize(
    ("raw", "expected", "words"),
    [
        (
            ADDRESS_64 | DS | NO_INDEX | NO_BASE,
            MemoryOperand(64, 3, None, None, 1),
            "ds:[disp], 64-bit address",
        ),
        (
            ADDRESS_64 | DS | NO_INDEX | 0 << 23,
            MemoryOperand(64, 3, 0, None, 1),
            "ds:[rax+disp], 64-bit address",
        ),
        (
            1 << 7 | 2 << 15 | 4 << 23 | 9 << 18 | 2,
            MemoryOperand(32, 2, 4, 9, 4),
            "ss:[rsp+r9*4+disp], 32-bit address",
        ),
        (
            0 << 7 | 0 << 15 | NO_BASE | 6 << 18,
            MemoryOperand(16, 0, None, 6, 1),
            "es:[rsi+disp], 16-bit address",
        ),
    ],
)
def test_a_memory_operand_is_segment_base_index_and_scale(
    raw: int, expected: MemoryOperand, words: str
) -> None:
    assert decode_instruction_information(ExitReason.VMPTRLD, raw) == MemoryInformation(raw, expected)
    assert expected.describe() == words


def test_string_io_tells_address_size_and_segment() -> None:
    raw = ADDRESS_64 | 5 << 15
    information = decode_instruction_information(ExitReason.IO_INSTRUCTION, raw)
    assert information == StringIoInformation(raw, 64, 5)
    assert information.describe() == "gs, 64-bit address"


def test_an_invalidation_names_the_register_with_the_type() -> None:
    raw = 1 << 28 | NO_INDEX | ADDRESS_64 | DS | 3 << 23
    information = decode_instruction_information(ExitReason.INVEPT, raw)
    assert information == InvalidationInformation(raw, MemoryOperand(64, 3, 3, None, 1), 1)
    assert information.describe() == "type in rcx, ds:[rbx+disp], 64-bit address"


@pytest.mark.parametrize(("identity", "name"), list(enumerate(["SGDT", "SIDT", "LGDT", "LIDT"])))
def test_descriptor_table_instructions_are_told_apart(identity: int, name: str) -> None:
    raw = identity << 28 | NO_INDEX | NO_BASE | 1 << 11
    information = decode_instruction_information(ExitReason.GDTR_IDTR_ACCESS, raw)
    assert information == DescriptorTableInformation(raw, name, MemoryOperand(16, 0, None, None, 1), 32)


@pytest.mark.parametrize(("identity", "name"), list(enumerate(["SLDT", "STR", "LLDT", "LTR"])))
def test_system_segment_instructions_have_a_register_or_a_memory_operand(identity: int, name: str) -> None:
    register = decode_instruction_information(ExitReason.LDTR_TR_ACCESS, identity << 28 | 1 << 10 | 7 << 3)
    assert register.describe() == f"{name} rdi"
    memory = decode_instruction_information(ExitReason.LDTR_TR_ACCESS, identity << 28 | NO_INDEX | NO_BASE)
    assert isinstance(memory, SystemSegmentInformation)
    assert memory.register is None
    assert memory.memory == MemoryOperand(16, 0, None, None, 1)


@pytest.mark.parametrize(("code", "bits"), [(0, 16), (1, 32), (2, 64)])
def test_rdrand_tells_destination_and_size(code: int, bits: int) -> None:
    raw = code << 11 | 8 << 3
    information = decode_instruction_information(ExitReason.RDRAND, raw)
    assert information == RandomInformation(raw, 8, bits)
    assert information.describe() == f"to r8, {bits} bits"


def test_vmread_names_field_and_data() -> None:
    raw = 1 << 10 | 2 << 28 | 1 << 3
    information = decode_instruction_information(ExitReason.VMREAD, raw)
    assert information == FieldAccessInformation(raw, 1, None, 2)
    assert information.describe() == "field in rdx, data rcx"


def test_wait_instructions_and_loadiwkey_name_their_registers() -> None:
    assert decode_instruction_information(ExitReason.TPAUSE, 1 << 3) == RegisterInformation(8, 1)
    assert decode_instruction_information(ExitReason.LOADIWKEY, 0xF000_0008) == LoadiwkeyInformation(
        0xF000_0008, 1, 15
    )


def test_other_exits_have_no_format() -> None:
    assert decode_instruction_information(ExitReason.HLT, 0x123) == InstructionInformation(0x123)
    assert decode_instruction_information(200, 0).describe() == "-"
