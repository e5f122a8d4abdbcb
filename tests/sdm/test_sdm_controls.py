"""VM-execution, VM-exit and VM-entry controls."""

from __future__ import annotations

import pytest

from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    SecondaryExitControls,
    TertiaryControls,
)
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import CR0

# Bit positions from Tables 25-5 to 25-8, 25-13, 25-14 and 25-16, typed in again.
PRINTED_POSITIONS = [
    (PinControls.EXTERNAL_INTERRUPT_EXITING, 0),
    (PinControls.NMI_EXITING, 3),
    (PinControls.VIRTUAL_NMIS, 5),
    (PinControls.ACTIVATE_PREEMPTION_TIMER, 6),
    (PinControls.PROCESS_POSTED_INTERRUPTS, 7),
    (PrimaryControls.INTERRUPT_WINDOW_EXITING, 2),
    (PrimaryControls.HLT_EXITING, 7),
    (PrimaryControls.INVLPG_EXITING, 9),
    (PrimaryControls.RDTSC_EXITING, 12),
    (PrimaryControls.CR3_LOAD_EXITING, 15),
    (PrimaryControls.CR3_STORE_EXITING, 16),
    (PrimaryControls.ACTIVATE_TERTIARY_CONTROLS, 17),
    (PrimaryControls.CR8_LOAD_EXITING, 19),
    (PrimaryControls.MOV_DR_EXITING, 23),
    (PrimaryControls.UNCONDITIONAL_IO_EXITING, 24),
    (PrimaryControls.USE_IO_BITMAPS, 25),
    (PrimaryControls.MONITOR_TRAP_FLAG, 27),
    (PrimaryControls.USE_MSR_BITMAPS, 28),
    (PrimaryControls.PAUSE_EXITING, 30),
    (PrimaryControls.ACTIVATE_SECONDARY_CONTROLS, 31),
    (SecondaryControls.VIRTUALIZE_APIC_ACCESSES, 0),
    (SecondaryControls.ENABLE_EPT, 1),
    (SecondaryControls.ENABLE_VPID, 5),
    (SecondaryControls.UNRESTRICTED_GUEST, 7),
    (SecondaryControls.ENABLE_INVPCID, 12),
    (SecondaryControls.VMCS_SHADOWING, 14),
    (SecondaryControls.ENABLE_PML, 17),
    (SecondaryControls.ENABLE_XSAVES, 20),
    (SecondaryControls.MODE_BASED_EXECUTE_CONTROL_FOR_EPT, 22),
    (SecondaryControls.USE_TSC_SCALING, 25),
    (SecondaryControls.ENABLE_PCONFIG, 27),
    (SecondaryControls.VMM_BUS_LOCK_DETECTION, 30),
    (SecondaryControls.INSTRUCTION_TIMEOUT, 31),
    (TertiaryControls.LOADIWKEY_EXITING, 0),
    (TertiaryControls.ENABLE_HLAT, 1),
    (TertiaryControls.IPI_VIRTUALIZATION, 4),
    (TertiaryControls.ENABLE_MSR_LIST_INSTRUCTIONS, 6),
    (TertiaryControls.VIRTUALIZE_IA32_SPEC_CTRL, 7),
    (ExitControls.SAVE_DEBUG_CONTROLS, 2),
    (ExitControls.HOST_ADDRESS_SPACE_SIZE, 9),
    (ExitControls.LOAD_IA32_PERF_GLOBAL_CTRL, 12),
    (ExitControls.ACKNOWLEDGE_INTERRUPT_ON_EXIT, 15),
    (ExitControls.SAVE_IA32_PAT, 18),
    (ExitControls.LOAD_IA32_EFER, 21),
    (ExitControls.SAVE_PREEMPTION_TIMER_VALUE, 22),
    (ExitControls.CLEAR_UINV, 27),
    (ExitControls.LOAD_CET_STATE, 28),
    (ExitControls.ACTIVATE_SECONDARY_CONTROLS, 31),
    (SecondaryExitControls.PREMATURELY_BUSY_SHADOW_STACK, 3),
    (EntryControls.LOAD_DEBUG_CONTROLS, 2),
    (EntryControls.IA32E_MODE_GUEST, 9),
    (EntryControls.DEACTIVATE_DUAL_MONITOR, 11),
    (EntryControls.LOAD_IA32_PERF_GLOBAL_CTRL, 13),
    (EntryControls.LOAD_IA32_EFER, 15),
    (EntryControls.LOAD_IA32_BNDCFGS, 16),
    (EntryControls.LOAD_UINV, 19),
    (EntryControls.LOAD_CET_STATE, 20),
    (EntryControls.LOAD_PKRS, 22),
]


@pytest.mark.parametrize(
    ("flag", "position"), PRINTED_POSITIONS, ids=lambda value: getattr(value, "name", value)
)
def test_a_control_is_the_bit_that_the_manual_prints(flag: BitFlags, position: int) -> None:
    assert flag == 1 << position


@pytest.mark.parametrize(
    ("control_set", "encoding", "msr", "true_msr"),
    [
        (ControlSet.PIN, 0x4000, 0x481, 0x48D),
        (ControlSet.PRIMARY, 0x4002, 0x482, 0x48E),
        (ControlSet.SECONDARY, 0x401E, 0x48B, None),
        (ControlSet.TERTIARY, 0x2034, 0x492, None),
        (ControlSet.EXIT, 0x400C, 0x483, 0x48F),
        (ControlSet.SECONDARY_EXIT, 0x2044, 0x493, None),
        (ControlSet.ENTRY, 0x4012, 0x484, 0x490),
    ],
)
def test_a_set_of_controls_knows_its_field_and_its_capability_msr(
    control_set: ControlSet, encoding: int, msr: int, true_msr: int | None
) -> None:
    assert (control_set.field, control_set.msr, control_set.true_msr) == (encoding, msr, true_msr)


@pytest.mark.parametrize(
    ("control_set", "default1"),
    [
        (ControlSet.PIN, 0x0000_0016),
        (ControlSet.PRIMARY, 0x0401_E172),
        (ControlSet.EXIT, 0x0003_6DFF),
        (ControlSet.ENTRY, 0x0000_11FF),
        (ControlSet.SECONDARY, 0),
        (ControlSet.TERTIARY, 0),
        (ControlSet.SECONDARY_EXIT, 0),
    ],
)
def test_the_default1_class_is_what_the_first_processors_reported(
    control_set: ControlSet, default1: int
) -> None:
    assert control_set.default1 == default1


@pytest.mark.parametrize("control_set", ControlSet, ids=lambda member: member.name)
def test_every_control_fits_the_field_of_its_set_and_is_one_bit(control_set: ControlSet) -> None:
    positions = [member.bit_length() - 1 for member in control_set.flags]
    assert [1 << position for position in positions] == list(control_set.flags)
    assert max(positions) < control_set.bits
    assert control_set.allowed1_only == (control_set.bits == 64)


def test_a_set_that_needs_activation_names_the_control_that_does_it() -> None:
    assert ControlSet.SECONDARY.activated_by is PrimaryControls.ACTIVATE_SECONDARY_CONTROLS
    assert ControlSet.TERTIARY.activated_by is PrimaryControls.ACTIVATE_TERTIARY_CONTROLS
    assert ControlSet.SECONDARY_EXIT.activated_by is ExitControls.ACTIVATE_SECONDARY_CONTROLS
    assert ControlSet.PIN.activated_by is None
    assert ControlSet.TERTIARY.field is Field.TERTIARY_PROCESSOR_BASED_CONTROLS


def test_a_flag_leads_back_to_its_set() -> None:
    assert ControlSet.of(SecondaryControls.ENABLE_EPT) is ControlSet.SECONDARY
    assert ControlSet.of(ExitControls(1 << 5)) is ControlSet.EXIT
    with pytest.raises(TypeError, match="no VM-execution"):
        ControlSet.of(CR0.PE)


def test_unnamed_bits_survive_every_operation() -> None:
    value = PinControls(0x8000_0016) | PinControls.NMI_EXITING
    assert value == 0x8000_001E
    assert value & ~PinControls.NMI_EXITING == 0x8000_0016
    assert isinstance(value, PinControls)


def test_a_set_of_bits_is_put_in_words() -> None:
    assert PinControls(0).describe() == "none"
    assert PinControls(0x4000_0009).describe() == "EXTERNAL_INTERRUPT_EXITING | NMI_EXITING | bit 30"
