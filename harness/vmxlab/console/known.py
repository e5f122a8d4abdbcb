"""Which known difference of an engine a difference from the oracle is an instance of.

The oracle is not bent to an engine, and `Run.check()` reports every difference. Who runs many cases on an
engine whose differences are known (`pytest --vmx-oracle`) tells the known from the new by this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vmxlab.console.check import Difference
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import RFLAGS

Matches = Callable[[Difference], bool]


def _differs_in(attributes: tuple[str, ...], mask: int, *reasons: ExitReason) -> Matches:
    """In these bits of one of the attributes, and in no others."""

    def matches(difference: Difference) -> bool:
        if difference.attribute not in attributes or difference.reason not in reasons:
            return False
        said, have = difference.said, difference.have
        value = said if isinstance(said, int) else getattr(said, "value", None)
        known = getattr(said, "known", (1 << 64) - 1)
        if value is None or have is None:
            return False
        changed = (value ^ have) & known
        return bool(changed) and not changed & ~mask

    return matches


_RFLAGS = ("rflags", Field.GUEST_RFLAGS.name)
_INFORMATION = ("raw_instruction_information", Field.EXIT_INSTRUCTION_INFORMATION.name)
_INTERRUPTION = ("raw_interruption_information", Field.EXIT_INTERRUPTION_INFORMATION.name)
_RF = int(RFLAGS.RF)

MATCHES: Mapping[str, Matches] = {
    "apic-access-exit-rf-clear": _differs_in(_RFLAGS, _RF, ExitReason.APIC_ACCESS),
    "descriptor-table-operand-size": _differs_in(_INFORMATION, 1 << 11, ExitReason.GDTR_IDTR_ACCESS),
    "descriptor-table-operand-size": _differs_in(_INFORMATION, 1 << 11, ExitReason.GDTR_IDTR_ACCESS),
    "ept-exit-rf-clear": _differs_in(
        _RFLAGS, _RF, ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION, ExitReason.PML_FULL
    ),
    "error-code-in-real-mode": _differs_in(_INTERRUPTION, 1 << 11, ExitReason.EXCEPTION_OR_NMI),
    "exception-exit-rf-clear": _differs_in(_RFLAGS, _RF, ExitReason.EXCEPTION_OR_NMI),
    "rdrand-16-bit-operand-size": _differs_in(_INFORMATION, 3 << 11, ExitReason.RDRAND, ExitReason.RDSEED),
    "ept-ad-walk-without-read-bit": _differs_in(("raw_qualification",), 1, ExitReason.EPT_VIOLATION),
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
