"""CR0.PE and CR0.PG of L2 without "unrestricted guest" (SDM Vol. 3C, 24.8 and 26.3).

In 32-bit mode nothing else would keep L2 from clearing PG: in 64-bit mode that is #GP(0) in any case.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode
from vmxlab.sdm.registers import CR0, Vector

BASELINE = int(CR0.PG | CR0.NE | CR0.ET | CR0.PE)


def faults(vmxlab, cr0: int) -> bool:
    """Whether MOV of this value to CR0 is #GP(0), and leaves CR0 as it was."""
    program = f"mov eax, {cr0:#x}; mov cr0, eax; hlt"
    run = vmxlab.run(Case(program=program, mode=Mode.PROTECTED, watch=[Field.GUEST_CR0]))
    (exit_,) = run.exits
    if exit_.reason != ExitReason.EXCEPTION_OR_NMI:
        return False
    assert (exit_.interruption.vector, exit_.interruption_error_code) == (Vector.GP, 0)
    return exit_.watched[Field.GUEST_CR0] == BASELINE


@pytest.mark.parametrize("cleared", [CR0.PE, CR0.NE], ids=["PE", "NE"])
def test_a_fixed_bit_of_cr0_stays_1(vmxlab, cleared):
    assert faults(vmxlab, BASELINE & ~int(cleared))


@pytest.mark.vmx_known_difference("cr0-pg-not-fixed-in-32-bit-mode")
@pytest.mark.parametrize("cleared", [CR0.PG, CR0.PE | CR0.PG], ids=["PG", "PE and PG"])
def test_paging_stays_on(vmxlab, cleared):
    assert faults(vmxlab, BASELINE & ~int(cleared))
