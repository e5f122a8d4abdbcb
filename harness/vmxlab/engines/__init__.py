"""Where an image runs: one module an engine, and one (`choose`) that picks an engine and explains.

`base` says what an engine and a machine are, `rom` what an image is to them. `process` starts processes that
can't outlive the harness, `streams` and `loopback` hold what their serial sockets need, `logs` makes the
files they write, `qmp` talks to QEMU, `nested` finds out whether KVM gives its guests VMX.
"""

from __future__ import annotations

from vmxlab.engines.base import Availability, Engine, EngineInfo, Machine, MachineEnd
from vmxlab.engines.choose import ENGINES, choose

__all__ = ["ENGINES", "Availability", "Engine", "EngineInfo", "Machine", "MachineEnd", "choose"]
