"""QEMU without VMX: for the monitor itself, and for the path "no VMX here"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vmxlab import errors
from vmxlab.engines.qemu import QemuEngine


class TcgEngine(QemuEngine):
    """QEMU's own translator. It has no VMX: CPUID says so, and nothing may make it say otherwise."""

    name: ClassVar[str] = "tcg"
    accelerator: ClassVar[str] = "tcg"
    default_model: ClassVar[str] = "max"
    l2_budget_tsc: ClassVar[int] = 1 << 27

    def models(self) -> tuple[str, ...]:
        """All models of the installed QEMU; none if there is no QEMU."""
        return self._listed_models()

    def has_vmx(self, model: str | None = None) -> bool:
        """See `Engine.has_vmx`: never."""
        del model
        return False

    def cpu_argument(self, base: str, features: Sequence[str]) -> str:
        """See `QemuEngine.cpu_argument`."""
        # QEMU would only warn, and run without it.
        if {"+vmx", "vmx", "vmx=on"} & set(features):
            raise errors.EngineUnavailable(
                "engine tcg: QEMU's TCG has no VMX", advice="engine bochs has it, and asks none of its host"
            ).locate(engine=self.name)
        return ",".join((base, *features))
