"""Cases that were generated once, and of which the oracle said too much: now it is right, or can't tell."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, on
from vmxlab.console.check import compare
from vmxlab.console.known import explain
from vmxlab.sdm.registers import CR0, DR7

from .privilege import user_mode

CD = int(CR0.CD)


@pytest.fixture
def check(vmxlab):
    """Runs a case; nothing differs but what is known to. The comparison."""

    def compared(case: Case):
        comparison = compare(vmxlab.run(case))
        info = vmxlab.lab.info
        explained = explain(comparison.differences, info.name, info.version)
        assert not [difference for difference, key in explained if key is None]
        return comparison

    return compared


def test_vm_entry_does_not_load_cr0_cd(check):
    """Vol. 3C, 27.3.2.1: CD and NW stay as L1 has them, whatever an exit has saved of L2's."""
    reaction = on(ExitReason.CPUID).skip()
    program = f"mov rax, cr0; or eax, {CD:#x}; mov cr0, rax; cpuid; mov rbx, cr0; hlt"
    comparison = check(Case(program=program, watch=[Field.GUEST_CR0], reactions=[reaction]))
    saved = [exit_.watched[Field.GUEST_CR0] & CD for exit_ in comparison.prediction.exits]  # type: ignore[operator]
    assert saved == [CD, 0]


def test_general_detect_with_cpl_3_is_not_predicted(check):
    """Vol. 3B, 18.2.4, and Vol. 2B, MOV: nothing orders #DB by DR7.GD and #GP(0) by privilege."""
    user = user_mode(Mode.LONG)
    fields = {**user["fields"], Field.GUEST_DR7: 0x400 | int(DR7.GD)}
    comparison = check(Case(program="mov rax, dr0; hlt", data=user["data"], fields=fields))
    assert "DR7.GD" in str(comparison.prediction.unknown)


def test_access_over_the_end_of_a_segment_of_4_gib_is_not_predicted(check):
    """Vol. 3A, 5.3: with an effective limit of FFFFFFFFH such an access may fault, or may not."""
    comparison = check(Case(program="mov ebx, -2; mov eax, [ebx]; hlt", mode=Mode.PROTECTED))
    assert "4 GiB" in str(comparison.prediction.unknown)


@pytest.mark.parametrize("instruction", ["lidt [rbx]", "sidt [rbx]"])
def test_order_within_a_pseudo_descriptor_is_not_predicted(check, instruction):
    """Nothing says which part is accessed first: the address that an EPT violation records may be either."""
    comparison = check(Case(program=f"mov ebx, UNMAPPED; {instruction}; hlt"))
    (exit_,) = comparison.prediction.exits
    assert exit_.reason == ExitReason.EPT_VIOLATION
    assert not isinstance(exit_.guest_linear_address, int)
