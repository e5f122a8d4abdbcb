"""The rules of VM entry as people read them: the page of all, and what is said of one VMCS."""

from __future__ import annotations

from pathlib import Path

from vmxlab import Field
from vmxlab.oracle.entry import RULES, Environment, check_entry
from vmxlab.oracle.entry.not_rules import NOT_RULES
from vmxlab.reports.entry_rules import broken_table, contradiction, outcome_in_words, unchecked_table
from vmxlab.reports.entry_rules_page import rules_page
from vmxlab.structures.processors import named_processor

PAGE = Path(__file__).parents[2] / "docs" / "vm-entry-rules.md"


def verdict(**fields: int):
    processor = named_processor("corei7_skylake_x")
    environment = Environment(
        capabilities=processor.capabilities, maxphyaddr=processor.physical_address_width
    )
    return check_entry({Field[name]: value for name, value in fields.items()}, environment)


def test_page_of_the_rules_is_the_one_that_the_code_makes():
    assert PAGE.read_text() == rules_page(), "make docs writes it"


def test_page_lists_every_rule_once():
    text = rules_page()
    assert all(text.count(f"| `{rule.name}` |") == 1 for rule in RULES)


def test_page_ends_with_what_is_no_rule_and_why():
    rules, _, rest = rules_page().partition("\n## What is no rule here\n")
    assert rules and "\n## " not in rest
    assert all(f"| {item.section} | {item.check} | {item.why} |" in rest for item in NOT_RULES)


def test_broken_rules_come_with_section_and_values():
    (row,) = broken_table(verdict(GUEST_RFLAGS=0)).json_rows()
    assert row["rule"] == "guest-rflags-reserved"
    assert row["section"] == "27.3.1.4"
    assert row["values"] == "GUEST_RFLAGS 0x0"
    assert row["detail"] == ""


def test_broken_rule_about_many_bits_names_those_that_are_wrong():
    (row,) = broken_table(verdict(PIN_BASED_CONTROLS=1 << 31 | 0x14)).json_rows()
    assert row["rule"] == "pin-based-controls-reserved"
    assert row["detail"] == "bit 1 must be 1 but is 0; bit 31 must be 0 but is 1"


def test_rules_that_were_not_checked_are_gathered_by_what_is_missing():
    rows = {row["why"]: row["rules"] for row in unchecked_table(verdict(GUEST_RFLAGS=2)).json_rows()}
    assert "guest-rip-32-bit" in rows["ENTRY_CONTROLS is missing"]


def test_outcome_says_how_far_it_was_checked():
    assert outcome_in_words(verdict(GUEST_RFLAGS=2)) == "the VM entry takes place as far as it was checked"
    assert outcome_in_words(verdict(GUEST_RFLAGS=0)) == (
        "VM-entry failure, exit reason 33 (invalid guest state)"
    )


def test_failure_that_the_vmcs_tells_of_and_the_rules_do_not_is_a_contradiction():
    guest_state = {Field.EXIT_REASON: 0x8000_0021}
    of_flags, of_controls = verdict(GUEST_RFLAGS=0), verdict(PIN_BASED_CONTROLS=0)
    assert contradiction(of_flags, guest_state) is None
    assert "capabilities are not the ones given" in contradiction(of_controls, guest_state)
    assert "no rule that could be checked" in contradiction(verdict(GUEST_RFLAGS=2), guest_state)
    # A VMfail leaves the exit reason of the exit before.
    assert contradiction(of_controls, {Field.EXIT_REASON: 0x30}) is None
