"""The pairs of cases for the rules of VM entry, on processors that exist in numbers only.

No engine has all controls; the rules say what they say for any capability MSRs.
"""

from __future__ import annotations

import pytest

from vmxlab.errors import MissingCapability
from vmxlab.image.compiler import Target
from vmxlab.image.monitor import load_monitor
from vmxlab.oracle.entry.of_case import check_case
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.msrs import Msr
from vmxlab.structures import Capabilities

from .entry_pairs_all import PAIRS, compiled_pair


def with_every_control(capabilities: Capabilities) -> Capabilities:
    """The same processor, with every control that has a name, and bits of CR4 for all features."""
    raw = dict(capabilities.raw)
    for controls in ControlSet:
        named = sum(int(flag) for flag in controls.flags)
        for msr in (controls.msr, controls.true_msr):
            if msr is not None:
                raw[msr] = raw.get(msr, 0) | (named if controls.allowed1_only else named << 32)
    raw[Msr.IA32_VMX_CR4_FIXED1] |= 0x1F7_7FFF & ~(1 << 12)
    return Capabilities(raw)


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_breaks_the_rule_alone_and_does_not_break_it(name, processors):
    every = with_every_control(processors["every_set"])
    target = Target(every, load_monitor(), 10**6, 46)
    bad, good = compiled_pair(name, target)
    assert good
    for one in bad:
        assert check_case(one).names == {name}, one.case.fields
    for one in good:
        assert check_case(one).broken == (), one.case.fields


@pytest.mark.parametrize("name", PAIRS)
def test_each_rule_is_broken_by_a_case_on_some_processor(name, processors):
    found = 0
    for capabilities in (with_every_control(processors["every_set"]), *processors.values()):
        try:
            found += len(compiled_pair(name, Target(capabilities, load_monitor(), 10**6, 40))[0])
        except MissingCapability:
            continue
        if found:
            return
    pytest.fail("no processor has a case that breaks it")
