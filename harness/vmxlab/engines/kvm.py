"""QEMU/KVM with nested VMX on this host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from vmxlab import errors
from vmxlab.engines import nested
from vmxlab.engines.base import Availability
from vmxlab.engines.qemu import QemuEngine, QemuMachine


def kvm_cpu_argument(base: str, features: Sequence[str]) -> str:
    """The value of -cpu under KVM. `enforce` makes QEMU end where the host lacks a feature."""
    # The last word counts: a switch of the caller comes after ours.
    return ",".join((base, "+vmx", "enforce", *features))


class KvmEngine(QemuEngine):
    """QEMU/KVM. `host` describes the host's KVM; tests give another one."""

    name: ClassVar[str] = "kvm"
    accelerator: ClassVar[str] = "kvm"
    default_model: ClassVar[str] = "host"
    l2_budget_tsc: ClassVar[int] = 1 << 32

    def __init__(self, host: nested.Host | None = None) -> None:
        self._host = host or nested.Host()

    def availability(self) -> Availability:
        """See `Engine.availability`: QEMU must be there, and nested VMX proven (see `nested`)."""
        found = nested.probe(self._host)
        if not found.ok:
            return Availability(False, problem=found.message, advice=found.advice)
        program = super().availability()
        return Availability(True, self.known_version()) if program.ok else program

    def known_version(self) -> str:
        """Linux's release and QEMU's version: the first is what implements VMX here."""
        return f"linux-{os.uname().release}+qemu-{super().availability().version}"

    def models(self) -> tuple[str, ...]:
        """Only the host's own: its vmx-* switches make poorer ones ("host,vmx-ept=off")."""
        return (self.default_model,)

    def has_vmx(self, model: str | None = None) -> bool:
        """See `Engine.has_vmx`."""
        return "-vmx" not in (model or "").split(",")

    def cpu_argument(self, base: str, features: Sequence[str]) -> str:
        """See `QemuEngine.cpu_argument`."""
        return kvm_cpu_argument(base, features)

    def open(
        self,
        rom: Path,
        *,
        log_dir: Path,
        model: str | None = None,
        why: str = "",
        memory_mb: int = 64,
        extra: Sequence[str] = (),
        start_deadline_s: float = 30.0,
    ) -> QemuMachine:
        """See `Engine.open`. Raises EngineUnavailable where nested VMX is not proven."""
        found = nested.probe(self._host)
        if not found.ok:
            raise errors.EngineUnavailable(
                f"engine {self.name}: {found.message}", advice=found.advice
            ).locate(engine=self.name)
        return super().open(
            rom,
            log_dir=log_dir,
            model=model,
            why=why,
            memory_mb=memory_mb,
            extra=extra,
            start_deadline_s=start_deadline_s,
        )
