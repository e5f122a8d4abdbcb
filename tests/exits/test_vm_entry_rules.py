"""Every rule of VM entry, broken alone and just not broken: the processor does what the rules say.

SDM Vol. 3C, 27.2 to 27.4; the sentence and the section of each are its rule's. Where an engine is known to
differ, the rules as its known differences change them must say what it did: see
test_vm_entry_known_differences.py for the minimal case of each.
"""

from __future__ import annotations

import pytest

from vmxlab.console.entries import ask_cases
from vmxlab.console.entry_differences import explain, known_keys
from vmxlab.errors import MissingCapability
from vmxlab.image.compiler import Target
from vmxlab.image.monitor import load_monitor
from vmxlab.oracle.entry import RULES
from vmxlab.oracle.entry.of_case import check_case, environment_of

from .entry_pairs_all import NEEDS, NO_PAIR, PAIRS, compiled_pair

_RULES = {rule.name: rule for rule in RULES}
_L2_TSC = 1_000_000
_MOST = 10
"""So many cases that break a rule are run; test_vm_entry_rules_everywhere.py has all of them."""


def test_each_rule_has_a_pair_or_a_reason_for_none():
    assert PAIRS.keys() | NO_PAIR.keys() == _RULES.keys()
    assert not PAIRS.keys() & NO_PAIR.keys()


def _spread(cases):
    """The first, the last, and some between: there are rules with a case for each of 64 bits."""
    if len(cases) <= _MOST:
        return cases
    return [cases[i * (len(cases) - 1) // (_MOST - 1)] for i in range(_MOST)]


@pytest.mark.parametrize("name", PAIRS)
def test_the_processor_agrees_with_the_rule(vmxlab, name):
    vmxlab.require(*_RULES[name].when, *NEEDS.get(name, ()))
    target = Target(vmxlab.capabilities, load_monitor(), _L2_TSC, vmxlab.physical_address_width)
    try:
        bad, good = compiled_pair(name, target)
    except MissingCapability as error:
        pytest.skip(error.message)
    bad = _spread(bad)
    cases = [*bad, *good]
    verdicts = [check_case(one) for one in cases]
    for number, (one, verdict) in enumerate(zip(cases, verdicts, strict=True)):
        assert verdict.names == ({name} if number < len(bad) else set()), one.case.fields
    keys = known_keys(vmxlab.engine, vmxlab.lab.info.version)
    wrong = []
    for one, verdict, seen in zip(cases, verdicts, ask_cases(vmxlab, cases), strict=True):
        if seen.agrees_with(verdict):
            continue
        if not explain(one.fields, environment_of(one), verdict, seen, keys):
            wrong.append((one.case, sorted(verdict.names), str(seen)))
    assert not wrong
