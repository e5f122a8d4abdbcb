"""QEMU/KVM with nested VMX on a host that has none: Debian's kernel and QEMU, run by Bochs's VMX.

To the harness it is the engine `kvm` with another way to start QEMU. L0 is KVM in the *carrier*, a Linux that
Bochs runs; what the carrier is made of says `vmxlab.engines.carrier`. It is started with the first machine
and serves the next ones, too: a machine with the image of the one before is a reset of the same QEMU, one
with another image a new QEMU.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vmxlab import errors
from vmxlab.engines.base import Availability, Engine, EngineInfo, MachineEnd
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.carrier.image import CarrierImage, carrier_availability, carrier_image
from vmxlab.engines.carrier.running import ENGINE, Carrier, InnerQemu
from vmxlab.engines.logs import LogFiles, log_error
from vmxlab.engines.qemu import DEAD_STATES, START_PAUSED, VIRTIO_SERIAL, QemuKvmEngine, QemuMachine, reset
from vmxlab.engines.rom import RomImage
from vmxlab.image.monitor import load_carrier_parts

if TYPE_CHECKING:
    from vmxlab.engines.debugger import DebuggerTerminal
    from vmxlab.engines.qmp import Qmp

_BOOT_DEADLINE_S = 180.0
_QMP_DEADLINE_S = 30.0
# Where the carrier's init puts the image.
_IMAGE_IN_CARRIER = Path("/image.rom")
_MEMORY_IN_CARRIER = "/memory.bin"
_MODULES = ("kvm", "kvm_intel")
_PARAMETER = re.compile(r"[A-Za-z0-9_]+=[A-Za-z0-9_.-]+")


class CarrierMachine(QemuMachine):
    """A machine that the QEMU in a carrier runs. Its engine's log is the console of the carrier's Linux."""

    def __init__(self, info: EngineInfo, qemu: InnerQemu, serial: socket.socket, files: LogFiles) -> None:
        super().__init__(info, qemu, serial, files)
        self._qemu = qemu

    def continue_with(self, monitor: Qmp) -> None:
        """Take over the QMP connection of a QEMU that runs, with its machine reset, and let it go."""
        self._monitor = monitor
        monitor.title = self.info.title()
        monitor.listen(self.note)
        self._entries_before = self.query_stats("nested_run").get("nested_run", 0)
        monitor.execute("cont")

    def save_memory(self, address: int, length: int) -> Path:
        """See `QemuMachine.save_memory`; QEMU writes the file in the carrier, and it is brought out."""
        self._live_monitor().execute(
            "pmemsave", {"val": address, "size": length, "filename": _MEMORY_IN_CARRIER}
        )
        data = self._qemu.carrier.saved_memory()
        path = self._dump_path(address)
        try:
            path.write_bytes(data)
        except OSError as error:
            raise log_error(path, error) from error
        return path

    def _die(self, end: MachineEnd) -> None:
        # What QEMU has sent may still be on its way through the carrier: the stream ends behind it.
        if self._settle(end):
            self._qemu.carrier.ask_for_mark()

    def _explain_exit(self) -> MachineEnd:
        return MachineEnd.EXITED if self._qemu.poll() == 0 else MachineEnd.ENGINE_ERROR

    def _evidence(self) -> Sequence[tuple[str, str]]:
        events, registers, *_ = super()._evidence()
        carrier = self._qemu.carrier
        ended = "" if carrier.alive else carrier.explain_end()
        return (("the carrier has ended", ended), events, registers, *carrier.evidence())

    def _release(self) -> None:
        """The QMP connection stays with QEMU, which stays with the carrier."""


@dataclass(frozen=True, slots=True)
class CarrierModel:
    """A model with its switches, sorted by whom they are for."""

    base: str
    features: tuple[str, ...]
    parameters: tuple[str, str]
    """What the modules kvm and kvm_intel are loaded with."""

    @classmethod
    def of(cls, model: str) -> CarrierModel:
        """Raises EngineUnavailable for a switch of a module that there is none."""
        base, *switches = model.split(",")
        features: list[str] = []
        modules: dict[str, list[str]] = {"kvm": [], "kvm_intel": ["nested=1"]}
        for switch in switches:
            module, dot, parameter = switch.partition(".")
            if not dot:
                features.append(switch)
            elif module in modules and _PARAMETER.fullmatch(parameter):
                modules[module].append(parameter)
            else:
                raise errors.EngineUnavailable(
                    f"engine {ENGINE}: {switch!r} in the model {model!r} is no parameter of a module",
                    advice=f"they look like kvm_intel.ept=0; the modules are {' and '.join(_MODULES)}",
                ).locate(engine=ENGINE)
        kvm, kvm_intel = (" ".join(modules[name]) for name in _MODULES)
        return cls(base, tuple(features), (kvm, kvm_intel))

    def __str__(self) -> str:
        return ",".join((self.base, *self.features))


class KvmInBochsEngine(QemuKvmEngine):
    """QEMU/KVM in a Linux that Bochs runs. Holds one carrier between machines; `close` ends it.

    Parameters of KVM's modules stand in the model, too: "host,vmx-ept=off,kvm_intel.enable_shadow_vmcs=0".
    """

    name: ClassVar[str] = ENGINE
    l2_budget_tsc: ClassVar[int] = 1 << 27
    patience: ClassVar[int] = 3

    def __init__(self) -> None:
        self._carrier: Carrier | None = None
        self._image: CarrierImage | None = None

    def availability(self) -> Availability:
        """See `Engine.availability`. A carrier that is not built yet, but can be, counts as available."""
        try:
            bochs = self._bochs_version()
        except errors.EngineUnavailable as error:
            return Availability.lacking(error)
        built = self._image.version if self._image is not None else None
        state = Availability(True, built) if built else carrier_availability()
        if not state.ok or state.version is None:
            return state
        return Availability(True, f"{state.version}+bochs-{bochs}")

    def check_host(self) -> None:
        """See `QemuEngine.check_host`: Bochs must be there. What else is needed, `prepare` finds out."""
        self._bochs_version()

    def prepare(self, tell: Callable[[str], None] | None = None) -> None:
        """See `Engine.prepare`: builds the carrier if there is none."""
        if self._image is None:
            self._image = carrier_image(load_carrier_parts(), tell=tell)

    def debug(self, log_dir: Path, terminal: DebuggerTerminal) -> tuple[str, ...]:
        """See `Engine.debug`: its QEMU is inside of the carrier, where no gdb reaches it."""
        return Engine.debug(self, log_dir, terminal)

    def open(
        self,
        rom: Path,
        *,
        log_dir: Path,
        model: str | None = None,
        why: str = "",
        memory_mb: int = 64,
        processors: int = 1,
        extra: Sequence[str] = (),
        start_deadline_s: float = _BOOT_DEADLINE_S,
    ) -> CarrierMachine:
        """See `Engine.open`. Boots the carrier if none is up; `start_deadline_s` is for that.

        Where a carrier that is up can't be used any more, it is ended, and another one is booted.
        """
        image = RomImage.check(rom)
        data = rom.read_bytes()
        name = model or self.default_model
        wanted = CarrierModel.of(name)
        inside = RomImage(_IMAGE_IN_CARRIER, image.size_bytes)
        arguments = [
            *self.arguments(inside, model=str(wanted), memory_mb=memory_mb, processors=processors),
            *("-chardev", "serial,id=serial,path=/dev/ttyS1", *VIRTIO_SERIAL),
            *("-chardev", "serial,id=qmp,path=/dev/ttyS2", "-mon", "chardev=qmp,mode=control"),
            *START_PAUSED,
            *extra,
        ]
        if self._carrier is None:
            self.check_host()  # before it downloads a carrier that nothing can run
        self.prepare()
        if self._carrier is not None and self._carrier.parameters == wanted.parameters:
            try:
                return self._machine(self._carrier, data, arguments, name, why)
            except errors.MachineError:
                pass  # it hangs or has died, which its log tells; a fresh one must do
        self.close()
        self._carrier = self._booted(wanted.parameters, log_dir, start_deadline_s)
        return self._machine(self._carrier, data, arguments, name, why)

    def close(self) -> None:
        """See `Engine.close`."""
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()

    # --- inside ----------------------------------------------------------------------------------------

    def _bochs_version(self) -> str | None:
        """Raises EngineUnavailable if Bochs can't run here."""
        emulator = BochsEngine().availability()
        if not emulator.ok:
            raise errors.EngineUnavailable(
                f"engine {self.name}: it needs Bochs, which runs the Linux of its KVM: {emulator.problem}",
                advice=f"{emulator.advice}; Debian's kernel and QEMU it fetches by itself, through apt",
            ).locate(engine=self.name)
        return emulator.version

    def _booted(self, parameters: tuple[str, str], log_dir: Path, deadline_s: float) -> Carrier:
        assert self._image is not None
        try:
            return Carrier.boot(
                self._image,
                parameters=parameters,
                model=BochsEngine.default_model,
                log_dir=log_dir,
                deadline_s=deadline_s,
            )
        except errors.MachineError as error:
            raise errors.EngineUnavailable(
                error.message, advice="the log is the console of the carrier's Linux"
            ).locate(engine=self.name, log_path=error.log_path) from error

    def _machine(
        self, carrier: Carrier, image: bytes, arguments: Sequence[str], model: str, why: str
    ) -> CarrierMachine:
        """A machine on a carrier that is up, which is held if there is none, as nobody would stop it."""
        carrier.signal(signal.SIGCONT)
        try:
            return self._renewed_or_started(carrier, image, arguments, model, why)
        except BaseException:
            carrier.signal(signal.SIGSTOP)
            raise

    def _renewed_or_started(
        self, carrier: Carrier, image: bytes, arguments: Sequence[str], model: str, why: str
    ) -> CarrierMachine:
        version = f"{carrier.version}+bochs-{carrier.bochs_version}"
        info = EngineInfo(self.name, version, model, why)
        files = LogFiles(carrier.console.parent, carrier.console.stem)
        qemu = carrier.qemu
        if qemu is not None and qemu.image == image and list(qemu.command[1:]) == list(arguments):
            with contextlib.suppress(errors.MachineError):
                return self._renewed(carrier, qemu, info, files)
        return self._started(carrier, image, arguments, info, files)

    def _renewed(
        self, carrier: Carrier, qemu: InnerQemu, info: EngineInfo, files: LogFiles
    ) -> CarrierMachine:
        """The same QEMU with the same image, reset. Raises MachineError where that can't be."""
        monitor = qemu.monitor
        if monitor is None or qemu.poll() is not None:
            raise errors.MachineDied("QEMU has ended")
        monitor.suspended = False
        status = _stopped(monitor)
        if status in DEAD_STATES - {"shutdown", "guest-panicked"}:
            raise errors.MachineDied(f"QEMU says {status}: KVM may have given the machine up")
        # The reset drops what QEMU has read of the old input; what it sends until then is the old machine's.
        carrier.drop_input()
        reset(monitor)
        serial = carrier.renew_serial()
        try:
            machine = CarrierMachine(info, qemu, serial, files)
            machine.continue_with(monitor)
        except BaseException:
            serial.close()
            raise
        return machine

    def _started(
        self,
        carrier: Carrier,
        image: bytes,
        arguments: Sequence[str],
        info: EngineInfo,
        files: LogFiles,
    ) -> CarrierMachine:
        from vmxlab.engines.qmp import Qmp

        qemu, control = carrier.start_qemu(image, arguments)
        machine = CarrierMachine(info, qemu, qemu.serial, files)
        qemu.monitor = Qmp(control, title=info.title(), on_event=machine.note, timeout_s=_QMP_DEADLINE_S)
        try:
            machine.connect(qemu.monitor, _QMP_DEADLINE_S)
        except errors.MachineError as error:
            if not carrier.alive:
                raise
            machine.stop()
            carrier.signal(signal.SIGCONT)
            carrier.end_qemu()
            raise errors.EngineUnavailable(
                f"engine {self.name}: QEMU in the carrier did not come up ({error.message}); its last words:"
                f"\n{carrier.words_of_qemu(8) or '(nothing)'}",
                advice="does it refuse a switch of the model? The log is the console of the carrier's Linux",
            ).locate(engine=self.name, log_path=carrier.console) from error
        return machine


def _stopped(monitor: Qmp) -> str:
    """Stop the machine, if it runs, and say how QEMU calls its state. Raises as `Qmp.execute`."""
    changes = [event for event in monitor.events if event.name in {"STOP", "RESUME"}]
    if not changes or changes[-1].name == "RESUME":
        before = len(monitor.events)
        monitor.execute("stop")
        changes.append(monitor.wait_event("STOP", since=before))
    return str(changes[-1].data.get("status", "unknown"))
