"""Which engine, and why. Nothing here falls back in silence: the reason goes with the choice."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vmxlab import errors
from vmxlab.engines.base import Engine
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.engines.tcg import TcgEngine

ENGINES: Mapping[str, type[Engine]] = MappingProxyType(
    {engine.name: engine for engine in (KvmEngine, BochsEngine, KvmInBochsEngine, TcgEngine)}
)

AUTO = "auto"
AUTO_KVM = "auto-kvm"


def choose(name: str | None, model: str | None = None, *, named_by: str = "--engine") -> tuple[Engine, str]:
    """The engine of a name, or for None and "auto" the best that has VMX here; and why it is that one.

    "auto-kvm" is QEMU/KVM in any case: `kvm` where nested VMX is proven, else `kvm-in-bochs`.

    With "auto", a `model` that is not kvm's own means Bochs. `named_by` is where the name comes from. Raises
    EngineUnavailable for an unknown name, listing the names; for a named engine that can't run here; and if
    "auto" finds none.
    """
    if name is None or name == AUTO:
        return _automatic(model)
    if name == AUTO_KVM:
        return _automatic_kvm()
    if name not in ENGINES:
        raise errors.EngineUnavailable(
            f"there is no engine {name!r}", advice=f"the engines are {', '.join((AUTO, AUTO_KVM, *ENGINES))}"
        )
    engine = ENGINES[name]()
    engine.require()
    return engine, f"named by {named_by}"


def _automatic(model: str | None) -> tuple[Engine, str]:
    kvm, bochs = KvmEngine(), BochsEngine()
    if model is not None and model.split(",")[0] != kvm.default_model:
        bochs.require()
        return bochs, f"auto: the model {model} is one of Bochs"
    native = kvm.availability()
    if native.ok:
        return kvm, "auto: nested VMX is proven on this host"
    emulated = bochs.availability()
    if emulated.ok:
        return bochs, f"auto: kvm can't run here ({native.problem})"
    raise errors.EngineUnavailable(
        f"no engine with VMX runs here. kvm: {native.problem}. bochs: {emulated.problem}",
        advice=f"for bochs: {emulated.advice}",
    )


def _automatic_kvm() -> tuple[Engine, str]:
    native = KvmEngine()
    found = native.availability()
    if found.ok:
        return native, "auto-kvm: nested VMX is proven on this host"
    carried = KvmInBochsEngine()
    carried.require()
    return carried, f"auto-kvm: kvm can't run here ({found.problem})"
