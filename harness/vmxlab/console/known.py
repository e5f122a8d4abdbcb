"""Which known difference of an engine a difference from the oracle is an instance of.

The oracle is not bent to an engine, and `Run.check()` reports every difference. Who runs many cases on an
engine whose differences are known (`pytest --vmx-oracle`) tells the known from the new by this table, and
`explain` tells what follows from a known one: where L2 goes another way, nothing later is as predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vmxlab.console.check import Difference
from vmxlab.console.entry_differences import CHANGES
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.oracle import ept, root
from vmxlab.oracle.entering import UNMODIFIED
from vmxlab.oracle.processor import operands, paging
from vmxlab.oracle.rules import descriptor_tables
from vmxlab.oracle.values import Rule
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState

Matches = Callable[[Difference], bool]


def _changed(difference: Difference) -> int | None:
    """The bits that are not as said."""
    said, have = difference.said, difference.have
    value = said if isinstance(said, int) else getattr(said, "value", None)
    if value is None or have is None:
        return None
    return int(value ^ have) & int(getattr(said, "known", -1))


def _differs_in(attributes: tuple[str, ...], mask: int, *reasons: ExitReason) -> Matches:
    """In these bits of one of the attributes, and in no others; of these exits, or of any."""

    def matches(difference: Difference) -> bool:
        if difference.attribute not in attributes or (reasons and difference.reason not in reasons):
            return False
        changed = _changed(difference)
        return bool(changed) and changed is not None and not changed & ~mask

    return matches


def _by(rule: Rule, matches: Matches) -> Matches:
    """Of what this rule says alone."""
    return lambda difference: rule in difference.rules and matches(difference)


def _in_memory(rule: Rule, mask: int) -> Matches:
    """In these bits of what the processor stores by this rule."""
    return _by(rule, _differs_in(("memory",), mask))


def _another_exit(said: ExitReason, *instead: ExitReason) -> Matches:
    """This exit is predicted, and one of these others comes."""
    return lambda difference: (
        difference.attribute == "full_reason" and difference.said == said and difference.have in instead
    )


def _not_by(rule: Rule) -> Matches:
    """The exit, or the outcome, that this rule makes does not come."""
    return lambda difference: difference.diverges and rule in difference.rules


def _entry_rules(key: str) -> Matches:
    """A VM entry that fails by nothing but the rules which the engine is known to have otherwise."""
    changed = CHANGES[key].keys()

    def matches(difference: Difference) -> bool:
        fails = isinstance(difference.said, int) and bool(difference.said & ENTRY_FAILURE_BIT)
        if not difference.diverges or not (fails or difference.outcome in ("vmlaunch", "vmresume")):
            return False
        names = {rule.name for rule in difference.rules}
        return bool(names) and names <= changed

    return matches


def _real_mode_cs(difference: Difference) -> bool:
    """The type of CS, 11 as it was loaded, and 3 as in real mode after a reset."""
    return (
        difference.attribute == Field.GUEST_CS_ACCESS_RIGHTS.name
        and difference.said == 0x9B
        and difference.have == 0x93
    )


def _value_by(attribute: str, rule: Rule) -> Matches:
    """An attribute's value that this rule gives."""
    return lambda difference: difference.attribute == attribute and rule in difference.rules


def _any_of(*some: Matches) -> Matches:
    return lambda difference: any(matches(difference) for matches in some)


_RFLAGS = ("rflags", Field.GUEST_RFLAGS.name)
_INFORMATION = ("raw_instruction_information", Field.EXIT_INSTRUCTION_INFORMATION.name)
_INTERRUPTION = ("raw_interruption_information", Field.EXIT_INTERRUPTION_INFORMATION.name)
_RF = int(RFLAGS.RF)

_NOT_MADE: Mapping[str, Rule] = {
    "ept-guest-flag-update-not-checked": ept.FLAG_UPDATE_IS_A_WRITE,
    "ept-large-page-bit-12-not-reserved": ept.BIT_12_IS_RESERVED,
    "invept-invvpid-type-upper-half": root.TYPE_HAS_64_BITS,
    "vm-entry-with-shadow-vmcs": root.SHADOW_IS_NOT_ENTERED,
}
"""The rules of exits and outcomes that an engine does not make."""

MATCHES: Mapping[str, Matches] = {
    **{key: _entry_rules(key) for key in CHANGES},
    **{key: _not_by(rule) for key, rule in _NOT_MADE.items()},
    "apic-access-exit-rf-clear": _differs_in(_RFLAGS, _RF, ExitReason.APIC_ACCESS),
    "descriptor-table-operand-size": _differs_in(_INFORMATION, 1 << 11, ExitReason.GDTR_IDTR_ACCESS),
    "displacement-of-a-register-operand": _value_by("raw_qualification", operands.NO_DISPLACEMENT),
    "entry-failure-writes-instruction-length": _value_by("instruction_length", UNMODIFIED),
    "ept-ad-walk-without-read-bit": _differs_in(("raw_qualification",), 1, ExitReason.EPT_VIOLATION),
    "ept-exit-rf-clear": _differs_in(
        _RFLAGS, _RF, ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION, ExitReason.PML_FULL
    ),
    "error-code-in-real-mode": _differs_in(_INTERRUPTION, 1 << 11, ExitReason.EXCEPTION_OR_NMI),
    "exception-exit-rf-clear": _differs_in(_RFLAGS, _RF, ExitReason.EXCEPTION_OR_NMI),
    "exit-before-privilege-fault": _another_exit(
        ExitReason.EXCEPTION_OR_NMI, ExitReason.INVPCID, ExitReason.XSETBV
    ),
    "exit-from-an-inactive-state": _differs_in((Field.GUEST_ACTIVITY_STATE.name,), 3),
    "interrupt-window-in-hlt": _another_exit(ExitReason.INTERRUPT_WINDOW, ExitReason.PREEMPTION_TIMER),
    "kvm-ept-misconfiguration-qualification": _differs_in(
        ("raw_qualification", Field.EXIT_QUALIFICATION.name), 0xFFF, ExitReason.EPT_MISCONFIGURATION
    ),
    "kvm-interrupt-window-in-hlt": _differs_in(
        (Field.GUEST_ACTIVITY_STATE.name,), 3, ExitReason.INTERRUPT_WINDOW, ExitReason.NMI_WINDOW
    ),
    "kvm-pml-full-for-accessed-flags": lambda difference: (
        difference.attribute == "full_reason" and difference.said == ExitReason.PML_FULL
    ),
    "pml-entry-low-bits": _in_memory(ept.LOG, 0xFFF),
    "pml-full-without-a-flag-to-set": lambda difference: (
        difference.attribute == "full_reason" and difference.have == ExitReason.PML_FULL
    ),
    "kvm-operand-of-an-instruction-emulated-for-umip": _by(
        descriptor_tables.OPERAND,
        _any_of(
            _differs_in(("guest_physical_address",), 0xFFF),
            _differs_in(("guest_linear_address",), (1 << 64) - 1),
        ),
    ),
    "rdrand-16-bit-operand-size": _differs_in(_INFORMATION, 3 << 11, ExitReason.RDRAND, ExitReason.RDSEED),
    "real-mode-cs-type": _real_mode_cs,
    "ve-eptp-index-of-the-field": _in_memory(paging.EPTP_INDEX, 0xFFFF),
    # An earlier case may have left the blocking, too: no NMI window then.
    "virtual-nmi-blocking-outlives-vm-entry": _any_of(
        _differs_in((Field.GUEST_INTERRUPTIBILITY_STATE.name,), int(InterruptibilityState.BLOCKING_BY_NMI)),
        lambda difference: difference.attribute == "full_reason" and difference.said == ExitReason.NMI_WINDOW,
    ),
}
"""By the key in `vmxlab.engines.differences`."""


def known_difference(difference: Difference, engine: str, version: str) -> str | None:
    """The key of the known difference that this is, on that engine in that version; None for a new one."""
    for key, matches in MATCHES.items():
        if (
            key in KNOWN_DIFFERENCES
            and KNOWN_DIFFERENCES[key].applies(engine, version)
            and matches(difference)
        ):
            return key
    return None


def _of_another_access(difference: Difference, engine: str, version: str) -> str | None:
    """The known difference by which this exit does not come, but one of its reason, by another access."""
    if difference.attribute != "guest_physical_address":
        return None
    return next(
        (
            key
            for key, rule in _NOT_MADE.items()
            if rule in difference.rules and KNOWN_DIFFERENCES[key].applies(engine, version)
        ),
        None,
    )


Explained = tuple[Difference, str | None]


def explain(differences: Sequence[Difference], engine: str, version: str) -> list[Explained]:
    """Each difference of a run, and the key of the known one behind it; None for a new one.

    Behind a known difference by which L2 or L1 goes another way stands that one. RFLAGS.RF that an exit has
    not saved is missing at the next one too.
    """
    explained: list[Explained] = []
    another_way = next(
        (
            key
            for difference in differences
            if difference.outcome and (key := known_difference(difference, engine, version)) is not None
        ),
        None,
    )
    another_access = {
        difference.number: key
        for difference in differences
        if (key := _of_another_access(difference, engine, version)) is not None
    }
    without_rf: dict[int, str] = {}
    for difference in differences:
        key = known_difference(difference, engine, version)
        if another_way is None:
            another_way = another_access.get(difference.number)
        if key is not None and difference.diverges and another_way is None:
            another_way = key
        is_rf = difference.attribute in _RFLAGS and difference.number is not None
        if key is None and is_rf and _changed(difference) == _RF and not (difference.have or 0) & _RF:
            key = without_rf.get((difference.number or 0) - 1)
        if key is not None and is_rf:
            without_rf[difference.number or 0] = key
        explained.append((difference, key or another_way))
    return explained
