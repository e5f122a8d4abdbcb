"""`vmxlab fuzz entry`: statuses and what is printed."""

from __future__ import annotations

import pytest

from vmxlab.console import entry_fuzz
from vmxlab.oracle.entry import RULES


def test_vm_entries_agree_and_are_counted(vmxlab_cli):
    result = vmxlab_cli("fuzz", "entry", "--count", 40, "--seed", 3, "--engine", "bochs", "--json")
    assert result.status == 0
    found = result.json
    assert found["asked"] == 40
    assert found["agreed"] + found["undecided"] + sum(found["explained"].values()) == 40
    assert sum(found["outcomes"].values()) == 40
    assert found["disagreements"] == []


def test_the_same_seed_asks_the_same(vmxlab_cli):
    one, other = (
        vmxlab_cli("fuzz", "entry", "--count", 24, "--seed", 9, "--engine", "bochs", "--json").json
        for _ in range(2)
    )
    assert one["outcomes"] == other["outcomes"]
    assert one["rules_broken"] == other["rules_broken"]


def test_a_disagreement_is_shown_with_a_test_to_paste(vmxlab_cli, monkeypatch):
    fewer = [rule for rule in RULES if "-rpl-ti" not in rule.name and "injected" not in rule.name]
    fuzz = entry_fuzz.fuzz_entries
    monkeypatch.setattr(entry_fuzz, "fuzz_entries", lambda *a, **k: fuzz(*a, **k, rules=fewer))
    result = vmxlab_cli("fuzz", "entry", "--count", 40, "--seed", 27, "--engine", "bochs")
    assert result.status == 1
    assert "seen: VMfailValid" in result.out
    assert "def test_vm_entry_" in result.out


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "x"], ["--seed", "-1"], ["--seed", "a"]])
def test_bad_numbers_are_usage_errors(vmxlab_cli, arguments):
    result = vmxlab_cli("fuzz", "entry", *arguments)
    assert result.status == 2
    assert "Traceback" not in result.err


def test_an_engine_without_vmx_is_an_error(vmxlab_cli):
    result = vmxlab_cli("fuzz", "entry", "--count", 5, "--engine", "tcg")
    assert result.status == 3
    assert "VMX" in result.err
