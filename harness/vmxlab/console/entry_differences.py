"""The rules of VM entry as an engine has them: what its known differences make of the SDM's rules.

Each known difference that is about a check of VM entry stands here with the rules that it changes. An engine
that does something else with a VMCS than the SDM says is explained only if the rules, with these changed and
no others, say what it did.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from vmxlab.console.entries import SeenEntry
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.oracle.entry import RULES, Area, EntryRule, EntryVerdict, Environment, check_entry
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.fields import Field
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import ActivityState, Vector

Change = Callable[[EntryRule], EntryRule]


def _not_checked(rule: EntryRule) -> EntryRule:
    return replace(rule, holds=lambda vmcs: True)


def _only(when: Callable[[Vmcs], bool]) -> Change:
    """The rule is checked in some cases only."""

    def change(rule: EntryRule) -> EntryRule:
        return replace(rule, holds=lambda vmcs: not when(vmcs) or rule.holds(vmcs))

    return change


def _in_area(area: Area) -> Change:
    return lambda rule: replace(rule, area=area)


def _not_readable_code(register: str) -> Change:
    rights = Field[f"GUEST_{register}_ACCESS_RIGHTS"]
    return _only(lambda vmcs: vmcs[rights] & 0xF != 11)


def _event_reaches_hlt(vmcs: Vmcs) -> bool:
    """Bochs 2.7 looks at what is injected into shutdown and wait-for-SIPI, not at what is into HLT."""
    if vmcs[Field.GUEST_ACTIVITY_STATE] != ActivityState.HLT:
        return True
    event = vmcs.injects
    return event.valid and event.type is InterruptionType.HARDWARE_EXCEPTION and event.vector == Vector.MC


def _lower_half_of_pending(rule: EntryRule) -> EntryRule:
    field = Field.GUEST_PENDING_DEBUG_EXCEPTIONS
    return _only(lambda vmcs: bool(vmcs[field] & 0xFFFF_FFFF & _PENDING_RESERVED))(rule)


def _cs_dpl_by_rpl(vmcs: Vmcs) -> bool:
    """Bochs 2.7 holds DPL of CS against RPL of CS, not against DPL of SS."""
    rights, rpl = vmcs[Field.GUEST_CS_ACCESS_RIGHTS], vmcs[Field.GUEST_CS_SELECTOR] & 3
    kind, dpl = rights & 0xF, rights >> 5 & 3
    if vmcs.virtual_8086:
        return True
    if kind in (9, 11):
        return rpl == dpl
    return kind not in (13, 15) or rpl >= dpl


def _instead(holds: Callable[[Vmcs], bool], otherwise: Callable[[Vmcs], bool]) -> Change:
    """Another rule than the SDM's where `otherwise` says so."""
    return lambda rule: replace(rule, holds=lambda v: holds(v) if otherwise(v) else rule.holds(v))


def _takes_any_sysenter_address(rule: EntryRule) -> EntryRule:
    return replace(rule, holds=lambda vmcs: rule.holds(vmcs) or vmcs.msr_loaded in _SYSENTER)


_SYSENTER = (Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP)
_PENDING_RESERVED = ~0x1_580F
_DATA = ("DS", "ES", "FS", "GS")

CHANGES: Mapping[str, Mapping[str, Change]] = {
    "entry-cs-dpl-against-its-rpl": {
        "guest-cs-dpl": _instead(_cs_dpl_by_rpl, lambda vmcs: vmcs[Field.GUEST_CS_ACCESS_RIGHTS] & 0xF != 3)
    },
    "entry-data-segment-dpl-of-readable-code": {
        f"guest-{register.lower()}-dpl": _not_readable_code(register) for register in _DATA
    },
    "entry-debugctl-not-checked": {"guest-ia32-debugctl-reserved": _not_checked},
    "injection-into-hlt-not-checked": {"guest-activity-state-takes-event": _only(_event_reaches_hlt)},
    "entry-error-code-of-any-event": {
        "injected-error-code-without-reason": _only(
            lambda vmcs: not vmcs.capabilities.basic.error_code_any_vector
        )
    },
    "entry-host-cet-without-wp": {"host-cet-needs-wp": _not_checked},
    "entry-ia32e-guest-without-paging": {"ia32e-mode-guest-needs-paging": _not_checked},
    "entry-nmi-over-virtual-nmi-blocking": {"guest-injected-nmi-is-not-blocked-by-nmi": _not_checked},
    "entry-pending-debug-upper-half": {"guest-pending-debug-reserved": _lower_half_of_pending},
    "entry-pending-single-step-not-checked": {
        "guest-pending-single-step-missing": _not_checked,
        "guest-pending-single-step-without-reason": _not_checked,
    },
    "entry-perf-global-ctrl-not-checked": {
        "host-ia32-perf-global-ctrl-reserved": _not_checked,
        "guest-ia32-perf-global-ctrl-reserved": _not_checked,
    },
    "entry-to-smm-as-guest-state": {"entry-to-smm-outside-smm": _in_area(Area.GUEST_STATE)},
    "entry-virtual-8086-without-protection": {
        "guest-rflags-vm": _only(lambda vmcs: vmcs.ia32e),
    },
    "kvm-inactive-state-not-checked": {
        "guest-hlt-needs-cpl-0": _not_checked,
        "guest-inactive-excludes-blocking": _not_checked,
        "guest-activity-state-takes-event": _not_checked,
    },
    "kvm-link-pointer-to-the-current-vmcs": {"linked-vmcs-is-not-current": _not_checked},
    "kvm-loads-noncanonical-sysenter": {"loaded-msr-takes-its-value": _takes_any_sysenter_address},
    "kvm-vmwrite-drops-access-rights-bits": {
        f"guest-{register.lower()}-{rule}": _not_checked
        for register in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
        for rule in ("rights-reserved", "rights-upper")
    },
    "guest-rip-upper-bits": {"guest-rip-64-bit": _not_checked},
}
"""By the key of the known difference: rules by name, and what the engine makes of each."""

_STRICTER = ("entry-cs-dpl-against-its-rpl",)
"""Engines that refuse what the SDM allows: no rule needs to be broken."""


def rules_with(keys: Iterable[str], rules: Sequence[EntryRule] = RULES) -> list[EntryRule]:
    """The SDM's rules, changed by these known differences."""
    changes = {name: change for key in keys for name, change in CHANGES[key].items()}
    return [changes[rule.name](rule) if rule.name in changes else rule for rule in rules]


def known_keys(engine: str, version: str) -> list[str]:
    """The known differences in VM entry of an engine."""
    return [key for key in CHANGES if KNOWN_DIFFERENCES[key].applies(engine, version)]


def explain(
    fields: Mapping[Field, int],
    environment: Environment,
    verdict: EntryVerdict,
    seen: SeenEntry,
    keys: Sequence[str],
    rules: Sequence[EntryRule] = RULES,
) -> tuple[str, ...]:
    """The fewest known differences with which the rules say what was seen; empty where none do.

    Only those take part whose rules have something to say about this VMCS: are broken, or not checked.
    """
    said = verdict.names | {item.rule.name for item in verdict.unchecked}
    relevant = [key for key in keys if said & CHANGES[key].keys() or key in _STRICTER]
    for some in _subsets(relevant):
        if seen.agrees_with(check_entry(fields, environment, rules_with(some, rules))):
            return some
    return ()


def _subsets(keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(keys) + 1):
        yield from itertools.combinations(keys, size)
