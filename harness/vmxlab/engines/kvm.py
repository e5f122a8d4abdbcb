"""QEMU/KVM with nested VMX on this host."""

from __future__ import annotations

import os
from typing import ClassVar

from vmxlab import errors
from vmxlab.engines import nested
from vmxlab.engines.base import Availability
from vmxlab.engines.qemu import QemuKvmEngine


class KvmEngine(QemuKvmEngine):
    """QEMU/KVM. `host` describes the host's KVM; tests give another one."""

    name: ClassVar[str] = "kvm"
    l2_budget_tsc: ClassVar[int] = 1 << 32

    def __init__(self, host: nested.Host | None = None) -> None:
        self._host = host or nested.Host()

    def availability(self) -> Availability:
        """See `Engine.availability`: QEMU must be there, and nested VMX proven (see `nested`)."""
        try:
            self.check_host()
        except errors.EngineUnavailable as error:
            return Availability.lacking(error)
        program = super().availability()
        return Availability(True, self.known_version()) if program.ok else program

    def known_version(self) -> str:
        """Linux's release and QEMU's version: the first is what implements VMX here."""
        return f"linux-{os.uname().release}+qemu-{super().availability().version}"

    def check_host(self) -> None:
        """See `QemuEngine.check_host`: nested VMX must be proven."""
        found = nested.probe(self._host)
        if not found.ok:
            raise errors.EngineUnavailable(
                f"engine {self.name}: {found.message}", advice=found.advice
            ).locate(engine=self.name)
