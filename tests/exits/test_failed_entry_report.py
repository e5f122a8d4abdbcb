"""What a run says of a VM entry that failed: the VMCS as the processor had it, and the rules it broke."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, on
from vmxlab.cases.steps import STANDARD, Enter, Vmread
from vmxlab.reports.runs import remarks


def test_vmcs_of_a_failed_entry_is_part_of_the_run_and_names_the_broken_rules(vmxlab):
    failed = vmxlab.run(Case(fields={"CR3_TARGET_COUNT": 9, "GUEST_RFLAGS": 0}))
    assert failed.failed_vmcs[Field.CR3_TARGET_COUNT] == 9
    names = [broken.rule.name for broken in failed.broken_rules()]
    assert names == ["cr3-target-count", "guest-rflags-reserved"]
    assert sum(line.startswith("broken rule ") for line in remarks(failed)) == 2


def test_run_whose_entries_succeed_breaks_no_rule(vmxlab):
    run = vmxlab.run(Case())
    assert run.failed_vmcs == {}
    assert run.broken_rules() == ()


@pytest.mark.parametrize("field", ["GUEST_RFLAGS", "HOST_TR_SELECTOR"])
def test_each_failed_entry_of_a_case_has_its_own_vmcs(vmxlab, field):
    """The second entry of the case fails by what a reaction wrote."""
    run = vmxlab.run(
        Case(program="cpuid; hlt", reactions=[on(ExitReason.CPUID).vmwrite(field, 0).skip()], watch=[field])
    )
    assert run.failed_vmcs[Field.parse(field)] == 0
    (broken,) = run.broken_rules()
    assert Field.parse(field) in broken.rule.fields


def test_report_of_the_vmcs_leaves_the_vm_instruction_error_as_it_is(vmxlab):
    steps = [*STANDARD[:-1], Enter(go_on=True), Vmread(Field.VM_INSTRUCTION_ERROR)]
    run = vmxlab.run(Case(fields={"CR3_TARGET_COUNT": 9}, steps=steps))
    assert run.outcomes[-1].value == 7
