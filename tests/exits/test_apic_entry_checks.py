"""Controls of APIC virtualization that VM entry refuses, and addresses.

SDM Vol. 3C, 27.2.1.1: VMfailValid(7) for each; what a control that is 0 would use is not looked at.
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    InstructionError,
    OutcomeKind,
    PinControls,
    PrimaryControls,
    SecondaryControls,
)
from vmxlab.image.layout import FREE_PAGES

from .virtual_apic_cases import ACCESSES, DELIVERY, TPR_SHADOW

S = SecondaryControls
EXTERNAL = PinControls.EXTERNAL_INTERRUPT_EXITING


def check_refused(vmxlab, **case) -> None:
    run = vmxlab.run(Case(**case))
    assert run.entry is not None
    assert run.entry.kind is OutcomeKind.FAIL_VALID
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
    assert run.exits == ()


@pytest.mark.parametrize(
    "control",
    [S.VIRTUALIZE_X2APIC_MODE, S.APIC_REGISTER_VIRTUALIZATION, S.VIRTUAL_INTERRUPT_DELIVERY],
    ids=["x2apic", "registers", "interrupt-delivery"],
)
def test_a_control_that_needs_the_tpr_shadow(vmxlab, control):
    """Vol. 3C, 27.2.1.1: without "use TPR shadow" these three are 0."""
    check_refused(vmxlab, enable=(control, EXTERNAL), disable=TPR_SHADOW)
    assert vmxlab.run(Case(enable=(control, EXTERNAL, TPR_SHADOW))).reasons == [ExitReason.HLT]


def test_memory_and_msrs_are_not_virtualized_together(vmxlab):
    """Vol. 3C, 27.2.1.1: with "virtualize x2APIC mode" "virtualize APIC accesses" is 0."""
    check_refused(vmxlab, enable=(*ACCESSES, S.VIRTUALIZE_X2APIC_MODE))


def test_interrupt_delivery_needs_external_interrupt_exiting(vmxlab):
    """Vol. 3C, 27.2.1.1: "virtual-interrupt delivery" with "external-interrupt exiting"."""
    check_refused(vmxlab, enable=(TPR_SHADOW, S.VIRTUAL_INTERRUPT_DELIVERY), disable=EXTERNAL)
    assert vmxlab.run(Case(enable=DELIVERY)).reasons == [ExitReason.HLT]


@pytest.mark.parametrize(
    ("enable", "field"),
    [(TPR_SHADOW, Field.VIRTUAL_APIC_ADDRESS), (S.VIRTUALIZE_APIC_ACCESSES, Field.APIC_ACCESS_ADDRESS)],
    ids=["virtual-apic", "apic-access"],
)
def test_an_address_is_that_of_a_page(vmxlab, enable, field):
    """Vol. 3C, 27.2.1.1: bits 11:0 are 0, and none is beyond the processor's physical addresses."""
    width = vmxlab.physical_address_width
    wrong = [FREE_PAGES + offset for offset in (1, 16, 0x800)]
    wrong += [FREE_PAGES | 1 << bit for bit in (width, 63)]
    for address in wrong:
        check_refused(vmxlab, enable=enable, fields={field: address})
        # Where the control is 0 the address does not matter. Such a case also shows that the field is there.
        run = vmxlab.run(Case(needs=enable, disable=enable, fields={field: address}))
        assert run.reasons == [ExitReason.HLT]


@pytest.mark.vmx_needs(TPR_SHADOW)
def test_cr8_exiting_needs_no_tpr_shadow(vmxlab):
    """Vol. 3C, 27.2.1.1: nothing ties CR8 exiting to the shadow."""
    enable = (PrimaryControls.CR8_LOAD_EXITING, PrimaryControls.CR8_STORE_EXITING)
    assert vmxlab.run(Case(enable=enable, disable=TPR_SHADOW)).reasons == [ExitReason.HLT]
