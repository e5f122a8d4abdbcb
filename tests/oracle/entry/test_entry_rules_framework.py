"""The rules of VM entry as a whole: what they read, what they do where something is missing, what follows."""

from __future__ import annotations

import contextlib
import random

import pytest

from vmxlab import Case, Field, MsrArea
from vmxlab.image.compiler import CompiledCase, Target, compile_case
from vmxlab.image.monitor import load_monitor
from vmxlab.oracle.entry import RULES, Area, EntryOutcome, Environment, check_entry
from vmxlab.oracle.entry.generate import Generator, base_cases
from vmxlab.oracle.entry.not_rules import NOT_RULES
from vmxlab.oracle.entry.of_case import check_case, environment_of
from vmxlab.oracle.entry.rule import NotChecked
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.controls import ControlSet, PrimaryControls, SecondaryControls
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4
from vmxlab.structures import Capabilities

CONTROL_FIELDS = {controls.field for controls in ControlSet}
BAD_CONTROL = {Field.CR3_TARGET_COUNT: 5}
BAD_HOST = {Field.HOST_TR_SELECTOR: 0}
BAD_GUEST = {Field.GUEST_RFLAGS: 0}
BAD_LINK = {Field.VMCS_LINK_POINTER: 1}


def compiled(capabilities, **case) -> CompiledCase:
    return compile_case(
        Case(program=b"\xf4", **case), Target(capabilities, load_monitor(), 10**6, 40), program=b"\xf4"
    )


@pytest.fixture(scope="module")
def skylake(processors) -> Capabilities:
    return processors["skylake"]


def test_the_baseline_breaks_no_rule_on_any_processor(processor):
    verdict = check_case(compiled(processor))
    assert verdict.broken == verdict.unchecked == ()
    assert verdict.outcomes == {EntryOutcome.ENTERS}


def test_names_are_unique_and_sentences_end():
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.sentence.endswith(".") and len(rule.sentence) > 15, rule.name
        assert rule.section.startswith("27."), rule.name


def test_what_is_no_rule_has_a_section_and_a_reason():
    assert all(item.section.startswith("27.") and item.check and item.why for item in NOT_RULES)


def test_a_rule_reads_only_the_fields_that_it_declares(processors):
    """Besides controls, which each rule may ask for."""
    for name in ("skylake", "icelake", "every_set"):
        bases = [compiled(processors[name], **_arguments(case)) for case in base_cases(processors[name])]
        for generated, _ in zip(Generator(1, bases), range(60), strict=False):
            base = bases[generated.base]
            fields = dict.fromkeys(Field, 0) | base.fields | generated.changes
            for rule in RULES:
                vmcs = Vmcs(fields, environment_of(base))
                with contextlib.suppress(NotChecked):
                    rule.applies(vmcs) and rule.holds(vmcs)
                assert vmcs.was_read.keys() <= {*rule.fields} | CONTROL_FIELDS, rule.name


def _arguments(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in ("mode", "fields", "enable", "memory")}


def test_random_vmcss_are_answered_without_a_mishap(processors):
    numbers = random.Random(3)
    for capabilities in processors.values():
        for _ in range(20):
            fields = {field: numbers.getrandbits(field.bits) for field in Field if numbers.random() < 0.9}
            verdict = check_entry(fields, Environment(capabilities=capabilities, maxphyaddr=39))
            assert verdict.outcomes


def test_an_empty_vmcs_leaves_rules_open_and_breaks_none(skylake):
    verdict = check_entry({}, Environment(capabilities=skylake, maxphyaddr=39))
    assert verdict.broken == ()
    assert verdict.outcomes == set(EntryOutcome)
    assert all("missing" in item.why for item in verdict.unchecked)


def test_a_missing_field_leaves_exactly_its_rules_open(skylake):
    base = compiled(skylake)
    fields = {field: value for field, value in base.fields.items() if field is not Field.GUEST_IDTR_LIMIT}
    verdict = check_entry(fields, environment_of(base))
    assert [item.rule.name for item in verdict.unchecked] == ["guest-idtr-limit"]
    assert verdict.outcomes == {EntryOutcome.ENTERS, EntryOutcome.INVALID_GUEST_STATE}
    assert "GUEST_IDTR_LIMIT is missing" in str(verdict.unchecked[0])


def test_an_unknown_address_width_leaves_rules_open(skylake):
    base = compiled(skylake)
    verdict = check_entry(base.fields, Environment(capabilities=skylake))
    assert "host-cr3-width" in {item.rule.name for item in verdict.unchecked}


def test_capabilities_that_were_not_read_leave_rules_open(skylake):
    base = compiled(skylake)
    raw = {msr: value for msr, value in skylake.raw.items() if msr != Msr.IA32_VMX_MISC}
    verdict = check_entry(base.fields, Environment(capabilities=Capabilities(raw), maxphyaddr=40))
    assert {"cr3-target-count", "guest-activity-state-supported"} <= {i.rule.name for i in verdict.unchecked}


@pytest.mark.parametrize(
    ("fields", "outcomes"),
    [
        (BAD_CONTROL, {EntryOutcome.INVALID_CONTROLS}),
        (BAD_HOST, {EntryOutcome.INVALID_HOST_STATE}),
        (BAD_CONTROL | BAD_HOST, {EntryOutcome.INVALID_CONTROLS, EntryOutcome.INVALID_HOST_STATE}),
        (BAD_CONTROL | BAD_GUEST, {EntryOutcome.INVALID_CONTROLS}),
        (BAD_HOST | BAD_GUEST, {EntryOutcome.INVALID_HOST_STATE}),
        (BAD_GUEST, {EntryOutcome.INVALID_GUEST_STATE}),
    ],
)
def test_controls_and_host_state_are_checked_in_any_order_and_before_guest_state(skylake, fields, outcomes):
    """Vol. 3C, 27.2 and 27.3."""
    assert check_case(compiled(skylake, fields=fields)).outcomes == outcomes


def test_three_faults_are_exactly_three(skylake):
    verdict = check_case(compiled(skylake, fields=BAD_CONTROL | BAD_HOST | BAD_GUEST))
    assert verdict.names == {"cr3-target-count", "host-tr-is-not-null", "guest-rflags-reserved"}
    assert verdict.unchecked == ()


@pytest.mark.parametrize(
    ("field", "change", "rule", "detail"),
    [
        (
            Field.PRIMARY_PROCESSOR_BASED_CONTROLS,
            PrimaryControls.HLT_EXITING | 1 << 1 | 1 << 0,
            "primary-processor-based-controls-reserved",
            "bit 1 must be 1 but is 0; bit 0 must be 0 but is 1",
        ),
        (
            Field.SECONDARY_PROCESSOR_BASED_CONTROLS,
            SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT,
            "secondary-processor-based-controls-reserved",
            "SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT must be 0 but is 1",
        ),
        (Field.HOST_CR0, CR0.NE | CR0.CD, "host-cr0-fixed", "NE must be 1 but is 0"),
        (Field.GUEST_CR0, CR0.NE | CR0.NW, "guest-cr0-fixed", "NE must be 1 but is 0"),
        (
            Field.HOST_CR4,
            CR4.VMXE | CR4.CET,
            "host-cr4-fixed",
            "VMXE must be 1 but is 0; CET must be 0 but is 1",
        ),
        (Field.GUEST_CR4, 1 << 31, "guest-cr4-fixed", "bit 31 must be 0 but is 1"),
    ],
    ids=lambda value: value.name if isinstance(value, Field) else "",
)
def test_a_rule_about_many_bits_names_those_that_break_it(skylake, field, change, rule, detail):
    """No bits that are right, none that are not checked (NW and CD), none of another rule."""
    base = compiled(skylake, enable=SecondaryControls.ENABLE_VPID, fields={Field.VPID: 1})
    verdict = check_entry(base.fields | {field: base.fields[field] ^ int(change)}, environment_of(base))
    (broken,) = (item for item in verdict.broken if item.rule.name == rule)
    assert broken.detail == detail
    assert str(broken).endswith(f"; {detail}]")


def test_protection_and_paging_are_not_wrong_in_an_unrestricted_guest(processors):
    """Vol. 3C, 27.3.1.1: PE and PG are free there."""
    base = compiled(
        processors["icelake"], enable=(SecondaryControls.UNRESTRICTED_GUEST, SecondaryControls.ENABLE_EPT)
    )
    verdict = check_entry(base.fields | {Field.GUEST_CR0: 0}, environment_of(base))
    (broken,) = (item for item in verdict.broken if item.rule.name == "guest-cr0-fixed")
    assert broken.detail == "NE must be 1 but is 0"


def test_generated_counts_of_loaded_msrs_stay_within_what_the_area_holds(skylake):
    bases = [compiled(skylake, **_arguments(case)) for case in base_cases(skylake)]
    counts = {
        generated.changes.get(Field.ENTRY_MSR_LOAD_COUNT, 0)
        for generated, _ in zip(Generator(1, bases), range(3000), strict=False)
    }
    assert counts == {0, 1, 2, 32}


def test_guest_state_may_fail_with_the_qualification_of_any_broken_rule(skylake):
    assert check_case(compiled(skylake, fields=BAD_LINK)).qualifications == {4}
    assert check_case(compiled(skylake, fields=BAD_LINK | BAD_GUEST)).qualifications == {0, 4}


def test_msr_loading_fails_at_the_first_bad_entry(skylake):
    """Vol. 3C, 27.4 and 27.8: entries are loaded in order; the qualification is the number of the entry."""
    good, bad = (Msr.IA32_STAR, 0), (Msr.IA32_FS_BASE, 0)
    verdict = check_case(compiled(skylake, entry_msr_load=MsrArea([good, bad, (Msr.IA32_LSTAR, 1 << 63)])))
    assert verdict.outcomes == {EntryOutcome.MSR_LOADING_FAILS}
    assert verdict.msr_qualifications == {2}


def test_an_msr_that_nobody_knows_may_fail_before_a_bad_one(skylake):
    area = MsrArea([(0x1234, 0), (Msr.IA32_FS_BASE, 0), (0x1235, 0)])
    verdict = check_case(compiled(skylake, entry_msr_load=area))
    assert verdict.outcomes == {EntryOutcome.MSR_LOADING_FAILS}
    assert verdict.msr_qualifications == {1, 2}


def test_controls_of_a_set_that_is_not_active_do_not_count(processors):
    """Vol. 3C, 27.2.1.1: without "activate secondary controls" they are all as if 0."""
    base = compiled(processors["penryn"])
    fields = base.fields | {Field.SECONDARY_PROCESSOR_BASED_CONTROLS: 0xFFFF_FFFF}
    assert not Vmcs(fields, environment_of(base)).on(SecondaryControls.ENABLE_VPID)
    assert check_entry(fields, environment_of(base)).broken == ()


def test_the_same_seed_generates_the_same_vmcss(skylake):
    bases = [compiled(skylake, **_arguments(case)) for case in base_cases(skylake)]
    first, again, other = (
        [generated for generated, _ in zip(Generator(seed, bases), range(50), strict=False)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {len(generated.changes) for generated in first} >= {1, 2, 3}


def test_every_area_has_rules():
    assert {rule.area for rule in RULES} == set(Area)
