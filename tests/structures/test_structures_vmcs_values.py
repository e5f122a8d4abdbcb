"""The values of VMCS fields in words."""

from __future__ import annotations

import copy
import pickle

import pytest

from vmxlab.sdm.fields import Field
from vmxlab.structures.vmcs_values import FieldValue, describe_value

WORDS = [
    (Field.PIN_BASED_CONTROLS, 0x1F, "EXTERNAL_INTERRUPT_EXITING | NMI_EXITING"),
    (Field.PIN_BASED_CONTROLS, 0x16, "none"),  # the default1 class has no names
    (Field.PIN_BASED_CONTROLS, 1 << 30, "bit 30"),
    (Field.GUEST_CR0, 0x8000_0021, "PE | NE | PG"),
    (Field.HOST_CR4, 0x2020, "PAE | VMXE"),
    (Field.GUEST_IA32_EFER, 0x500, "LME | LMA"),
    (Field.GUEST_INTERRUPTIBILITY_STATE, 1, "BLOCKING_BY_STI"),
    (Field.GUEST_PENDING_DEBUG_EXCEPTIONS, 0x4000, "BS"),
    (Field.GUEST_ACTIVITY_STATE, 1, "HLT"),
    (Field.GUEST_ACTIVITY_STATE, 7, "not defined"),
    (Field.EXCEPTION_BITMAP, 0xFFFF_FFFF, "all exceptions"),
    (Field.EXCEPTION_BITMAP, 0x8000_4002, "#DB #PF vector 31"),
    (Field.EXCEPTION_BITMAP, 0, "none"),
    (Field.EXIT_REASON, 0x8000_0021, "ENTRY_FAILURE_GUEST_STATE (VM-entry failure)"),
    (Field.VM_INSTRUCTION_ERROR, 7, "7: VM entry with invalid control fields"),
    (Field.EXIT_INTERRUPTION_INFORMATION, 0x8000_0B0E, "#PF (14), hardware exception, error code"),
    (Field.EPT_POINTER, 0x10_101E, "table 0x101000, 4 levels, WB"),
    (Field.VMCS_LINK_POINTER, (1 << 64) - 1, "no link"),
    (Field.GUEST_TR_ACCESS_RIGHTS, 0x8B, "busy TSS, DPL 0, present"),
    (Field.GUEST_LDTR_ACCESS_RIGHTS, 1 << 16, "unusable"),
    (
        Field.GUEST_DS_ACCESS_RIGHTS,
        0xD0F7,
        "data, expand-down, writable, accessed, DPL 3, present, D/B, G, AVL",
    ),
    (
        Field.GUEST_CS_ACCESS_RIGHTS,
        0xA29C,
        "code, conforming, execute-only, DPL 0, present, L, G, reserved 0x200",
    ),
    (Field.GUEST_RIP, 0x8000, ""),
    (0x6E00, 1, ""),
]


@pytest.mark.parametrize(("field", "value", "words"), WORDS)
def test_a_value_says_what_it_means(field, value, words):
    assert describe_value(field, value) == words


def test_any_value_of_any_field_can_be_put_in_words():
    for field in Field:
        for value in (0, 1, field.max, 0x5555_5555_5555_5555 & field.max):
            assert isinstance(describe_value(field, value), str)


def test_a_field_value_is_an_int_that_shows_itself():
    value = FieldValue(Field.GUEST_RFLAGS, 0x202)
    assert value == 0x202
    assert f"{value:#x}" == "0x202"
    assert repr(value) == "0x202 (FIXED1 | IF)"
    assert repr(FieldValue(0x6E00, 5)) == "0x5"
    assert type(value | 1) is int
    for again in (copy.copy(value), pickle.loads(pickle.dumps(value))):
        assert (again, again.field) == (value, Field.GUEST_RFLAGS)
