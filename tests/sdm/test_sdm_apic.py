"""Registers and bits of the local APIC."""

from __future__ import annotations

import pytest

from vmxlab.sdm import (
    ApicDeliveryMode,
    ApicDestinationShorthand,
    ApicRegister,
    ApicTimerDivide,
    LocalVectorFlags,
    SpuriousVectorFlags,
)


@pytest.mark.parametrize(
    ("register", "address"),
    [
        (ApicRegister.ID, 0xFEE0_0020),
        (ApicRegister.TASK_PRIORITY, 0xFEE0_0080),
        (ApicRegister.EOI, 0xFEE0_00B0),
        (ApicRegister.SPURIOUS_INTERRUPT_VECTOR, 0xFEE0_00F0),
        (ApicRegister.IN_SERVICE_7, 0xFEE0_0170),
        (ApicRegister.INTERRUPT_REQUEST_0, 0xFEE0_0200),
        (ApicRegister.ERROR_STATUS, 0xFEE0_0280),
        (ApicRegister.LVT_CMCI, 0xFEE0_02F0),
        (ApicRegister.INTERRUPT_COMMAND_LOW, 0xFEE0_0300),
        (ApicRegister.LVT_TIMER, 0xFEE0_0320),
        (ApicRegister.CURRENT_COUNT, 0xFEE0_0390),
        (ApicRegister.DIVIDE_CONFIGURATION, 0xFEE0_03E0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_register_is_where_table_11_1_puts_it(register: ApicRegister, address: int) -> None:
    assert register.default_address == address


def test_registers_are_sixteen_bytes_apart_in_one_page() -> None:
    assert len(set(ApicRegister)) == len(ApicRegister.__members__)
    assert all(register % 16 == 0 and register < 0x400 for register in ApicRegister)


@pytest.mark.parametrize("name", ["IN_SERVICE", "TRIGGER_MODE", "INTERRUPT_REQUEST"])
def test_a_register_of_256_bits_is_eight_words_in_a_row(name: str) -> None:
    first = ApicRegister[f"{name}_0"]
    assert [ApicRegister[f"{name}_{word}"] - first for word in range(8)] == list(range(0, 0x80, 0x10))


def test_fields_of_the_interrupt_command_stand_in_their_places() -> None:
    assert ApicDeliveryMode.NMI.bits == 0x400
    assert ApicDeliveryMode.START_UP.bits == 0x600
    assert ApicDestinationShorthand.SELF.bits == 0x4_0000
    assert ApicDestinationShorthand.ALL_EXCLUDING_SELF.bits == 0xC_0000


def test_the_timer_counts_by_its_local_vector_and_its_divider() -> None:
    assert int(LocalVectorFlags.MASKED | LocalVectorFlags.TIMER_PERIODIC) == 0x3_0000
    assert int(SpuriousVectorFlags.SOFTWARE_ENABLE) == 0x100
    assert ApicTimerDivide.BY_1 == 0xB
    assert all(divide & 0b0100 == 0 for divide in ApicTimerDivide)
