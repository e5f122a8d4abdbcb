"""Exit reasons that no engine here can produce, and why; for the coverage table.

Not for what a processor says it lacks: that is told by its capability bits. A reason that a test has seen
must not stand here; `vmxlab coverage` fails where one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmxlab.sdm.exit_reasons import ExitReason


@dataclass(frozen=True, slots=True)
class Unreachable:
    """`why` in a few words, and the section that says what it would take. `engines`: empty means all."""

    why: str
    section: str
    engines: frozenset[str] = frozenset()

    def holds_for(self, engine: str) -> bool:
        """Whether this is said of that engine."""
        return not self.engines or engine in self.engines


_NO_DUAL_MONITOR = "needs the dual-monitor treatment of SMIs, which no engine has (IA32_VMX_BASIC[49] is 0)"
_NO_TDX = "no engine has TDX: the instruction is #UD"
_NO_INSTRUCTION = "no engine's processor has the instruction: it is #UD"

UNREACHABLE: Mapping[ExitReason, Unreachable] = MappingProxyType(
    {
        ExitReason.IO_SMI: Unreachable(_NO_DUAL_MONITOR, "Vol. 3C, 32.15.2"),
        ExitReason.OTHER_SMI: Unreachable(_NO_DUAL_MONITOR, "Vol. 3C, 32.15.2"),
        ExitReason.RSM: Unreachable(
            "RSM exits in SMM alone, where L2 is only under the dual-monitor treatment, which no engine has",
            "Vol. 3C, 26.1.2",
        ),
        ExitReason.ENTRY_FAILURE_MACHINE_CHECK: Unreachable(
            "no engine can raise a machine check in the middle of a VM entry", "Vol. 3C, 27.9"
        ),
        ExitReason.SEAMCALL: Unreachable(_NO_TDX, "Vol. 3D, Table C-1"),
        ExitReason.TDCALL: Unreachable(_NO_TDX, "Vol. 3D, Table C-1"),
        ExitReason.URDMSR: Unreachable(_NO_INSTRUCTION, "Vol. 3D, Table C-1"),
        ExitReason.UWRMSR: Unreachable(_NO_INSTRUCTION, "Vol. 3D, Table C-1"),
        ExitReason.RDMSR_IMMEDIATE: Unreachable(_NO_INSTRUCTION, "Vol. 3D, Table C-1"),
        ExitReason.WRMSRNS_IMMEDIATE: Unreachable(_NO_INSTRUCTION, "Vol. 3D, Table C-1"),
    }
)
"""By basic exit reason."""
