"""What L2 reads of CR0 behind an LMSW that does not exit (SDM Vol. 3C, 26.1.3 and 26.3)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field
from vmxlab.sdm.registers import CR0

PE, OTHERS = int(CR0.PE), int(CR0.MP | CR0.EM | CR0.TS)


def run_lmsw(vmxlab):
    """CR0.PE belongs to L1, which shows it as 0; LMSW leaves it 0 and sets the others."""
    fields = {Field.CR0_GUEST_HOST_MASK: PE, Field.CR0_READ_SHADOW: 0}
    run = vmxlab.run(Case(program=f"mov eax, {OTHERS}; lmsw ax; smsw rdx; hlt", fields=fields))
    assert run.reasons == [ExitReason.HLT]
    return run.exits[0]


def test_lmsw_of_what_the_shadow_has_is_executed(vmxlab):
    assert run_lmsw(vmxlab).registers["rdx"] & OTHERS == OTHERS


@pytest.mark.vmx_known_difference("kvm-lmsw-drops-the-read-shadow")
def test_bit_of_the_mask_is_read_from_the_shadow(vmxlab):
    assert not run_lmsw(vmxlab).registers["rdx"] & PE
