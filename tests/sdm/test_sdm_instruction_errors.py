"""VM-instruction error numbers."""

from __future__ import annotations

import pytest

from vmxlab.sdm.instruction_errors import InstructionError, describe_error


def test_the_numbers_are_1_to_28_but_for_three_that_are_not_assigned() -> None:
    assert set(InstructionError) == set(range(1, 29)) - {14, 21, 27}


@pytest.mark.parametrize("error", InstructionError, ids=lambda error: error.name)
def test_every_error_has_a_description_of_its_own(error: InstructionError) -> None:
    assert error.description
    assert [other for other in InstructionError if other.description == error.description] == [error]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("VMCALL_IN_VMX_ROOT_OPERATION", 1),
        ("VMCLEAR_VMXON_POINTER", 3),
        ("VMLAUNCH_NON_CLEAR_VMCS", 4),
        ("VMRESUME_NON_LAUNCHED_VMCS", 5),
        ("ENTRY_INVALID_CONTROL_FIELDS", 7),
        ("ENTRY_INVALID_HOST_STATE", 8),
        ("VMPTRLD_INVALID_PHYSICAL_ADDRESS", 9),
        ("VMPTRLD_VMXON_POINTER", 10),
        ("VMPTRLD_INCORRECT_REVISION_ID", 11),
        ("UNSUPPORTED_COMPONENT", 12),
        ("VMWRITE_READ_ONLY_COMPONENT", 13),
        ("VMXON_IN_VMX_ROOT_OPERATION", 15),
        ("VMCALL_INCORRECT_MSEG_REVISION_ID", 22),
        ("ENTRY_BLOCKED_BY_MOV_SS", 26),
        ("INVALID_OPERAND_TO_INVEPT_INVVPID", 28),
    ],
)
def test_an_error_has_the_number_that_the_manual_prints(name: str, number: int) -> None:
    assert InstructionError[name] == number


def test_any_number_is_put_in_words() -> None:
    assert describe_error(7) == "7: VM entry with invalid control fields"
    assert describe_error(14) == "14: not assigned"
