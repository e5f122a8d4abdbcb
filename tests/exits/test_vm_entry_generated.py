"""Generated VMCSs: the rules of VM entry and the processor say the same of each (SDM Vol. 3C, 27.2 to 27.4).

`vmxlab fuzz entry --count 20000` asks about more of them.
"""

from __future__ import annotations

from vmxlab.console.entry_fuzz import fuzz_entries
from vmxlab.oracle.entry import RULES

# KVM takes some hundred milliseconds for each where Bochs runs it.
COUNTS = {"bochs": 300, "kvm": 300}


def test_generated_vm_entries_do_what_the_rules_say(vmxlab):
    count = COUNTS.get(vmxlab.engine, 48)
    result = fuzz_entries(vmxlab.lab, count, seed=27)
    assert result.asked == count
    assert result.agreed > count * 0.8
    assert len(result.outcomes) >= 4
    assert not result.disagreements, "\n\n".join(map(str, result.disagreements))


def test_a_wrong_rule_is_found(vmxlab):
    """What is compared can differ: without some rules, VMCSs that break them disagree, and can be pasted."""
    fewer = [rule for rule in RULES if "-rpl-ti" not in rule.name and "injected" not in rule.name]
    result = fuzz_entries(vmxlab.lab, 48, seed=27, rules=fewer)
    assert result.disagreements
    item = result.disagreements[0]
    assert str(item.seen) in str(item)
    compile(item.source(), "pasted", "exec")
    assert "vmxlab.run(Case(" in item.source()
