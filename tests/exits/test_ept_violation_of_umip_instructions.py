"""EPT violations by operands of instructions that a hypervisor emulates for CR4.UMIP (SDM Vol. 3C, 28.2.1).

KVM offers UMIP on processors without it: it then intercepts these instructions, and accesses their operands
itself.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field
from vmxlab.cases.memory import UNMAPPED
from vmxlab.sdm.registers import CR4

ADDRESS = UNMAPPED + 0x105
LONG_MODE_CR4 = int(CR4.PAE | CR4.VMXE | CR4.UMIP)


def violation(vmxlab):
    """The exit by an operand that EPT does not map."""
    program = f"mov ebx, {ADDRESS:#x}; lldt word ptr [rbx]; hlt"
    run = vmxlab.run(Case(program=program, fields={Field.GUEST_CR4: LONG_MODE_CR4}, needs=CR4.UMIP))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    return run.exits[0]


def test_violation_of_an_operand_is_a_read(vmxlab):
    exit_ = violation(vmxlab)
    assert exit_.qualification.read
    assert not exit_.qualification.write
    assert exit_.guest_physical_address & -0x1000 == UNMAPPED


@pytest.mark.vmx_known_difference("kvm-operand-of-an-instruction-emulated-for-umip")
def test_violation_of_an_operand_has_its_addresses(vmxlab):
    exit_ = violation(vmxlab)
    assert exit_.guest_physical_address == ADDRESS
    assert exit_.guest_linear_address == ADDRESS
