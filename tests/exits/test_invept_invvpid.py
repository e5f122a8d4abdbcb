"""INVEPT and INVVPID in VMX root operation: which types there are, and which operands they take.

SDM Vol. 3C, 31.3: INVEPT, INVVPID; Vol. 3D, A.10: what IA32_VMX_EPT_VPID_CAP reports. That they are #UD
outside VMX operation is tested with the other instructions, in test_vmx_instructions.py.
"""

from __future__ import annotations

import pytest

from vmxlab import InstructionError as Error
from vmxlab import Msr
from vmxlab.cases.steps import Invept, Invvpid

from .instruction_outcomes import WITH_VMCS, fails_valid, last, steps, succeeds


def require_ept_vpid(vmxlab, name: str, bit: int) -> None:
    if not vmxlab.capabilities.raw.get(Msr.IA32_VMX_EPT_VPID_CAP, 0) >> bit & 1:
        pytest.skip(f"the processor lacks {name} (IA32_VMX_EPT_VPID_CAP[{bit}] is 0)")


INVEPT_TYPE_BITS = {1: 25, 2: 26}
"""IA32_VMX_EPT_VPID_CAP bits that say which types of INVEPT there are (SDM Vol. 3D, A.10)."""
INVVPID_TYPE_BITS = {0: 40, 1: 41, 2: 42, 3: 43}


def test_invept_takes_the_types_that_the_processor_has(vmxlab):
    """Vol. 3C, 31.3, INVEPT: VMfail(28) for any type that IA32_VMX_EPT_VPID_CAP does not report."""
    require_ept_vpid(vmxlab, "INVEPT", 20)
    capability = vmxlab.capabilities.raw[Msr.IA32_VMX_EPT_VPID_CAP]
    types = (0, 1, 2, 3, 4, 31, 32, 0xFFFF_FFFF, (1 << 64) - 1)
    run = steps(vmxlab, *WITH_VMCS, *(Invept(kind, go_on=True) for kind in types))
    for kind, outcome in zip(types, run.outcomes[len(WITH_VMCS) :], strict=True):
        bit = INVEPT_TYPE_BITS.get(kind)
        if bit is not None and capability >> bit & 1:
            assert succeeds(outcome), kind
        else:
            assert fails_valid(outcome, Error.INVALID_OPERAND_TO_INVEPT_INVVPID), kind


@pytest.mark.vmx_known_difference("invept-invvpid-type-upper-half")
@pytest.mark.parametrize(
    ("step", "name", "bit"),
    [(Invept(1 << 32 | 2, 0), "global INVEPT", 26), (Invvpid(1 << 32 | 2), "all-contexts INVVPID", 42)],
    ids=["invept", "invvpid"],
)
def test_the_type_of_invept_and_invvpid_has_64_bits(vmxlab, step, name, bit):
    """Vol. 3C, 31.3, INVEPT and INVVPID: in 64-bit mode the type is a 64-bit operand: 2^32 + 2 is not 2."""
    require_ept_vpid(vmxlab, name, bit)
    assert fails_valid(last(vmxlab, *WITH_VMCS, step), Error.INVALID_OPERAND_TO_INVEPT_INVVPID)


def test_single_context_invept_checks_its_eptp(vmxlab):
    """Vol. 3C, 31.3, INVEPT: only the single-context type is VMfail(28) for an EPTP not good for VM entry."""
    require_ept_vpid(vmxlab, "single-context INVEPT", 25)
    bad = 0xFFF  # page-walk length 8, memory type 7, reserved bits
    assert fails_valid(last(vmxlab, *WITH_VMCS, Invept(1, bad)), Error.INVALID_OPERAND_TO_INVEPT_INVVPID)
    if vmxlab.capabilities.raw[Msr.IA32_VMX_EPT_VPID_CAP] >> 26 & 1:
        assert succeeds(last(vmxlab, *WITH_VMCS, Invept(2, bad)))


def test_invvpid_takes_the_types_that_the_processor_has(vmxlab):
    """Vol. 3C, 31.3, INVVPID: VMfail(28) for any type that IA32_VMX_EPT_VPID_CAP does not report."""
    require_ept_vpid(vmxlab, "INVVPID", 32)
    capability = vmxlab.capabilities.raw[Msr.IA32_VMX_EPT_VPID_CAP]
    types = (0, 1, 2, 3, 4, 31, 32, 0xFFFF_FFFF, (1 << 64) - 1)
    run = steps(
        vmxlab, *WITH_VMCS, *(Invvpid(kind, vpid=1, linear_address=0x1000, go_on=True) for kind in types)
    )
    for kind, outcome in zip(types, run.outcomes[len(WITH_VMCS) :], strict=True):
        bit = INVVPID_TYPE_BITS.get(kind)
        if bit is not None and capability >> bit & 1:
            assert succeeds(outcome), kind
        else:
            assert fails_valid(outcome, Error.INVALID_OPERAND_TO_INVEPT_INVVPID), kind


def test_invvpid_checks_vpid_reserved_bits_and_address(vmxlab):
    """Vol. 3C, 31.3, INVVPID: VMfail(28) for VPID 0, reserved bits 63:16, an address not canonical."""
    require_ept_vpid(vmxlab, "INVVPID", 32)
    for kind, bit in INVVPID_TYPE_BITS.items():
        require_ept_vpid(vmxlab, f"INVVPID type {kind}", bit)
    bad = [
        Invvpid(0, vpid=0, linear_address=0x1000, go_on=True),
        Invvpid(1, vpid=0, go_on=True),
        Invvpid(3, vpid=0, go_on=True),
        Invvpid(0, vpid=1, linear_address=1 << 63, go_on=True),
        Invvpid(2, vpid=0x1_0000, go_on=True),
        Invvpid(1, vpid=1 << 63 | 1, go_on=True),
    ]
    good = [Invvpid(2, vpid=0), Invvpid(1, vpid=1, linear_address=1 << 63)]
    run = steps(vmxlab, *WITH_VMCS, *bad, *good)
    outcomes = run.outcomes[len(WITH_VMCS) :]
    for step, outcome in zip(bad, outcomes[: len(bad)], strict=True):
        assert fails_valid(outcome, Error.INVALID_OPERAND_TO_INVEPT_INVVPID), step
    assert all(succeeds(outcome) for outcome in outcomes[len(bad) :])
