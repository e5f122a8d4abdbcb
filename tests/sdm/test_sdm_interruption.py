"""The interruption-information format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import OutOfRange
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType


@settings(derandomize=True, deadline=None)
@given(raw=st.integers(0, 0xFFFF_FFFF))
def test_any_value_decodes_and_encodes_back(raw: int) -> None:
    information = InterruptionInformation.from_bits(raw)
    assert information.bits == raw
    assert information.describe()


@pytest.mark.parametrize(
    ("raw", "expected", "words"),
    [
        (
            0x8000_0B0E,
            InterruptionInformation(14, InterruptionType.HARDWARE_EXCEPTION, error_code_valid=True),
            "#PF (14), hardware exception, error code",
        ),
        (0x8000_0202, InterruptionInformation(2, InterruptionType.NMI), "(2) NMI"),
        (
            0x8000_0030,
            InterruptionInformation(0x30, InterruptionType.EXTERNAL_INTERRUPT),
            "vector 0x30, external interrupt",
        ),
        (
            0x8000_0603,
            InterruptionInformation(3, InterruptionType.SOFTWARE_EXCEPTION),
            "#BP (3), software exception",
        ),
        (
            0x8000_1306,
            InterruptionInformation(6, InterruptionType.HARDWARE_EXCEPTION, nmi_unblocking=True),
            "#UD (6), hardware exception, NMI unblocking by IRET",
        ),
        (0x0000_0B0E, None, "none"),
    ],
)
def test_a_field_tells_vector_type_and_error_code(
    raw: int, expected: InterruptionInformation | None, words: str
) -> None:
    information = InterruptionInformation.from_bits(raw)
    if expected is not None:
        assert information == expected
        assert expected.bits == raw
    assert information.valid is (expected is not None)
    assert information.describe() == words


@pytest.mark.parametrize("vector", [-1, 256])
def test_a_vector_over_8_bits_is_refused(vector: int) -> None:
    with pytest.raises(OutOfRange, match="vector"):
        InterruptionInformation(vector, InterruptionType.EXTERNAL_INTERRUPT)


@pytest.mark.parametrize("other_bits", [1 << 12, 1 << 31, 1 << 32, -1])
def test_other_bits_stay_within_30_to_13(other_bits: int) -> None:
    with pytest.raises(OutOfRange, match="30:13"):
        InterruptionInformation(0, InterruptionType.NMI, other_bits=other_bits)


@pytest.mark.parametrize("raw", [-1, 1 << 32])
def test_a_value_that_is_not_32_bits_is_refused(raw: int) -> None:
    with pytest.raises(OutOfRange, match="32 bits"):
        InterruptionInformation.from_bits(raw)
