"""Generated cases do on a machine what the oracle says.

    pytest tests/properties --vmx-examples 1000 --vmx-seed 7

`make fuzz N=10000` spreads so many over all of them.
"""

from __future__ import annotations

import pytest

from vmxlab import SecondaryControls

from .strategies_ept import ept_cases
from .strategies_exceptions import exception_cases
from .strategies_instructions import instruction_cases
from .strategies_io import io_cases
from .strategies_mixed import mixed_cases
from .strategies_msr import msr_cases
from .strategies_registers import control_register_cases, debug_register_cases


def test_io_instructions_exit_by_the_bitmaps(explored):
    explored(io_cases, examples=30, predicted=0.8)


def test_rdmsr_and_wrmsr_exit_by_the_bitmaps(explored):
    explored(msr_cases, examples=25, predicted=0.95)


def test_control_registers_exit_by_masks_shadows_and_targets(explored):
    explored(control_register_cases, examples=40, predicted=0.8)


def test_debug_registers_exit_by_their_control(explored):
    explored(debug_register_cases, examples=15, predicted=0.8)


def test_instructions_exit_by_their_controls(explored):
    explored(instruction_cases, examples=45, predicted=0.75)


def test_exceptions_exit_by_the_bitmap_or_are_delivered(explored):
    explored(exception_cases, examples=35, predicted=0.7)


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_accesses_go_where_ept_lets_them(explored):
    explored(ept_cases, examples=35, predicted=0.65)


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_two_families_in_one_case(explored):
    explored(mixed_cases, examples=40, predicted=0.65)
