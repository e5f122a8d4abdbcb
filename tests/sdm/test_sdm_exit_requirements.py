"""What a processor must have for an exit reason to come."""

from __future__ import annotations

import pytest

from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.exit_requirements import EXIT_REQUIREMENTS
from vmxlab.sdm.registers import CR4


@pytest.mark.parametrize("reason", EXIT_REQUIREMENTS, ids=lambda reason: reason.name)
def test_each_is_one_control_or_one_bit_of_cr4_with_its_section(reason: ExitReason) -> None:
    requirement = EXIT_REQUIREMENTS[reason]
    assert int(requirement.flag).bit_count() == 1
    assert isinstance(requirement.flag, CR4) or ControlSet.of(requirement.flag)
    assert requirement.section.startswith("Vol. 3C, ")


@pytest.mark.parametrize("reason", [ExitReason.CPUID, ExitReason.TRIPLE_FAULT, ExitReason.TASK_SWITCH])
def test_what_any_processor_with_vmx_can_do_has_none(reason: ExitReason) -> None:
    assert reason not in EXIT_REQUIREMENTS
