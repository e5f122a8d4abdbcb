"""All pairs of cases for the rules of VM entry, what they need, and the rules that have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vmxlab import Case
from vmxlab.errors import MissingCapability
from vmxlab.image.compiler import CompiledCase, Target, compile_case
from vmxlab.sdm.controls import EntryControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.registers import CR4
from vmxlab.structures.capabilities import Need

from . import entry_pairs_guest, entry_pairs_guest_rest, entry_pairs_state
from .entry_pairs import HLT, PAIRS, Processor, Settings

__all__ = ["NEEDS", "NO_PAIR", "PAIRS", "compiled_pair"]

NEEDS: Mapping[str, tuple[Need, ...]] = {
    "deactivate-dual-monitor-outside-smm": (EntryControls.DEACTIVATE_DUAL_MONITOR,),
    "entry-to-smm-outside-smm": (EntryControls.ENTRY_TO_SMM,),
    "guest-cet-needs-wp": (CR4.CET,),
    "guest-paging-needs-protection": (SecondaryControls.UNRESTRICTED_GUEST,),
    "guest-pcide-needs-ia32e-mode": (CR4.PCIDE,),
    "guest-ss-dpl-zero": (SecondaryControls.UNRESTRICTED_GUEST,),
    "host-cet-needs-wp": (CR4.CET,),
    "ia32e-mode-guest-needs-paging": (SecondaryControls.UNRESTRICTED_GUEST,),
    "injected-other-event-vector": (PrimaryControls.MONITOR_TRAP_FLAG,),
}
"""What a rule's pair needs besides the controls that the rule is about."""

_SMM = "it is about VM entries in SMM, where no case can be run"
_32_BIT = (
    "it is about a 32-bit host: this one is 64-bit, where host-address-space-size-agrees is broken as well"
)
_CPUID = "which bits are reserved CPUID says, which the rules are not told: they leave it open"

NO_PAIR: Mapping[str, str] = {
    "entry-to-smm-excludes-deactivate-dual-monitor": _SMM,
    "guest-enclave-interruption-needs-sgx": _CPUID,
    "guest-entry-to-smm-needs-blocking-by-smi": _SMM,
    "guest-ia32-lbr-ctl-reserved": _CPUID,
    "guest-ia32-rtit-ctl-reserved": _CPUID,
    "guest-injected-nmi-is-not-blocked-by-sti": "a processor may demand it or not (27.3.1.5)",
    "guest-pending-debug-bus-lock": _CPUID,
    "guest-wait-for-sipi-outside-smm": _SMM,
    "host-ia32-s-cet-32-bit": _32_BIT,
    "host-pcide-needs-64-bit-host": _32_BIT,
    "host-rip-32-bit": _32_BIT,
    "host-ss-is-not-null": _32_BIT,
    "host-ssp-32-bit": _32_BIT,
    "ia32e-mode-guest-needs-64-bit-host": _32_BIT,
    "ia32e-mode-guest-needs-long-mode": _32_BIT,
    "tsc-multiplier-is-not-zero": "the manual does not say so: Bochs demands it, KVM does not",
}
"""Rules that no case can break alone, and why."""

_PLAIN = {"enable", "disable", "mode", "needs", "raw_controls"}
"""Settings whose text says all about them."""

assert entry_pairs_guest and entry_pairs_guest_rest and entry_pairs_state  # they fill PAIRS


def compiled_pair(name: str, target: Target) -> tuple[list[CompiledCase], list[CompiledCase]]:
    """The cases that break a rule and those that do not, on this processor.

    Cases that need what it lacks are left out. Raises MissingCapability where none is left.
    """
    made = PAIRS[name](Processor(target))
    lacking: list[MissingCapability] = []

    bases: dict[str, CompiledCase] = {}

    def compiled(settings: Settings) -> list[CompiledCase]:
        # What the fields are laid over is the same for many: it is compiled once.
        without = {name: value for name, value in settings.items() if name != "fields"}
        try:
            case = Case(**{"program": HLT, **settings})
            base = bases.get(repr(without)) if without.keys() <= _PLAIN else None
            if base is None:
                base = compile_case(Case(**{"program": HLT, **without}), target, program=HLT)
                bases[repr(without)] = base
        except MissingCapability as error:
            lacking.append(error)
            return []
        return [replace(base, case=case, fields={**base.fields, **case.fields})]

    bad = [one for settings in made.bad for one in compiled(settings)]
    good = [one for settings in made.good for one in compiled(settings)]
    if not bad and not good and lacking:
        raise lacking[0]
    return bad, good
