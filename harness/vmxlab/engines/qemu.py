"""What the QEMU engines share: the command line, the channels, the events, the post-mortem.

Serial line and QMP are socket pairs that QEMU inherits: no paths, no ports. The machine starts paused and
runs when both are connected, so no byte and no event is lost. A reset that the guest causes stops the
machine with its registers kept; the event that tells of it ends the machine at once.

QEMU documentation: "QEMU QMP Reference Manual" (SHUTDOWN, ShutdownCause, STOP, GUEST_PANICKED, set-action).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vmxlab import errors
from vmxlab.engines import logs
from vmxlab.engines.base import Availability, Engine, EngineInfo, Machine, MachineEnd
from vmxlab.engines.debugger import GDB_ARGUMENTS, GDB_SOCKET, gdb_command
from vmxlab.engines.process import Process, ask, find_program, spawn
from vmxlab.engines.rom import RomImage

if TYPE_CHECKING:
    from vmxlab.engines.debugger import DebuggerTerminal
    from vmxlab.engines.qmp import Qmp, QmpEvent

PROGRAM = "qemu-system-x86_64"
PACKAGES = "qemu-system-x86"

UNKNOWN_VERSION = "?"

# It starts paused, and turns every end of the guest into a pause with the registers kept.
START_PAUSED = ("-S", "-action", "reboot=shutdown,shutdown=pause,panic=pause")

# Virtio devices by registers in memory, no PCI; it starts faster than a PC, and no case needs more. The
# keyboard controller is what resets it.
MACHINE = ("-M", "microvm", "-device", "i8042")

# The chardev `serial` as a virtio port that the monitor knows by its name (guest/lib/virtio_console.h). A
# virtserialport, as a virtconsole throws output away while its backend is full. Without ioeventfd a
# notification is handled before the guest's store returns: what was said before a machine dies is out.
VIRTIO_SERIAL = (
    *("-global", "virtio-mmio.force-legacy=false", "-global", "virtio-mmio.ioeventfd=off"),
    *("-device", "virtio-serial-device"),
    *("-device", "virtserialport,chardev=serial,nr=1,name=vmxlab"),
)

# A machine that hangs must not hold up those who only want to know a number.
_WITNESS_S = 3.0

# How often the machine is looked at while a debugger is waited for.
_LOOK_S = 0.5

_SERIAL_BUFFER_BYTES = 4 << 20

_FEATURE = re.compile(r"[+-]?[A-Za-z0-9_.-]+(=[A-Za-z0-9_.-]+)?")

# States of `query-status` in which the machine can't go on; the others are a pause that someone asked for.
DEAD_STATES = frozenset({"internal-error", "io-error", "guest-panicked", "shutdown"})


class QemuMachine(Machine):
    """A running QEMU, with QMP."""

    def __init__(self, info: EngineInfo, child: Process, serial: socket.socket, files: logs.LogFiles) -> None:
        super().__init__(info, child, serial, files.log)
        self._files = files
        self._monitor: Qmp | None = None
        self._dumps = 0
        self._entries_before = 0

    def qmp(self) -> Qmp | None:
        """The QMP connection. It answers also when the processor is dead, but not while paused."""
        return self._monitor

    def pause(self) -> None:
        """See `Machine.pause`."""
        super().pause()
        self._tell_monitor()

    def resume(self) -> None:
        """See `Machine.resume`."""
        super().resume()
        self._tell_monitor()

    def query_stats(self, *names: str, timeout_s: float | None = None) -> dict[str, int]:
        """The accelerator's counters of the processor, all or these: `nested_run`, `exits`, `io_exits`, ...

        They witness that L2 ran. Empty under TCG. Histograms are left out. Raises as `Qmp.execute`.
        """
        wanted: dict[str, object] = {"target": "vcpu"}
        if names:
            wanted["providers"] = [{"provider": "kvm", "names": list(names)}]
        answer = self._live_monitor().execute("query-stats", wanted, timeout_s=timeout_s)
        return {
            stat["name"]: int(stat["value"])
            for provider in answer
            for stat in provider["stats"]
            if isinstance(stat["value"], int)
        }

    def nested_entries(self) -> int | None:
        """See `Machine.nested_entries`: KVM's counter `nested_run`. Raises as `Qmp.execute`."""
        self.resume()
        count = self.query_stats("nested_run", timeout_s=_WITNESS_S).get("nested_run")
        return None if count is None else count - self._entries_before

    def registers(self) -> str:
        """The processor's registers, as QEMU's monitor prints them. Raises as `Qmp.execute`."""
        return self._live_monitor().human("info registers")

    def save_memory(self, address: int, length: int) -> Path:
        """Write guest-physical memory, in bytes, to a file in the log directory. Raises as `Qmp.execute`."""
        path = self._dump_path(address)
        self._live_monitor().execute("pmemsave", {"val": address, "size": length, "filename": str(path)})
        return path

    def _dump_path(self, address: int) -> Path:
        self._dumps += 1
        return self.log_dir / f"{self._files.stem}-{address:#x}-{self._dumps}.mem"

    def reset(self) -> None:
        """Restart the image in the same process. Memory keeps what it holds.

        Raises MachineDied for a machine that ended: its serial stream has ended too.
        """
        if not self.end().alive:
            raise errors.MachineDied(
                f"{self.info.title()} {self.end().value}: it can't be reset", advice="open another machine"
            ).locate(engine=self.info.title(), log_path=self.engine_log)
        reset(self._live_monitor())

    def wait_for_debugger(self) -> None:
        """See `Machine.wait_for_debugger`: gdb stops the machine when it attaches."""
        monitor = self._live_monitor()
        since = 0
        for name in ("STOP", "RESUME"):
            while not any(event.name == name for event in monitor.events[since:]):
                if not self.end().alive:
                    raise errors.MachineDied(
                        f"{self.info.title()} {self.end().value}, before a debugger had it"
                    ).locate(engine=self.info.title(), log_path=self.engine_log)
                with contextlib.suppress(errors.MachineHung):
                    monitor.wait_event(name, since=since, timeout_s=_LOOK_S)
            since += [event.name for event in monitor.events[since:]].index(name) + 1

    # --- start -----------------------------------------------------------------------------------------

    def connect(self, monitor: Qmp, deadline_s: float) -> None:
        """Take the QMP connection and let the machine run. For `QemuEngine.open`."""
        self._monitor = monitor
        monitor.connect(deadline_s)
        if self.info.version == UNKNOWN_VERSION:
            self.info = dataclasses.replace(self.info, version=monitor.version)
        monitor.title = self.info.title()
        # The guest may end QEMU before the answer is out: then this machine ran, and its end tells.
        with contextlib.suppress(errors.MachineDied):
            monitor.execute("cont", timeout_s=deadline_s)

    def note(self, event: QmpEvent) -> None:
        """Make of an event what it says of the machine's end. Called in the QMP thread."""
        if event.name == "SHUTDOWN":
            self._die(self._shutdown_cause(str(event.data.get("reason", ""))))
        elif event.name == "GUEST_PANICKED":
            self._die(MachineEnd.PANIC)
        elif event.name == "STOP" and event.data.get("status") in DEAD_STATES:
            self._die(MachineEnd.ENGINE_ERROR)

    def _shutdown_cause(self, reason: str) -> MachineEnd:
        if reason == "guest-reset":
            # A triple fault and a reset that the guest asked for (ports 0x64, 0xCF9) have the same event. TCG
            # logs the first kind; KVM says nothing, and there it is taken for the likely one.
            asked = self.info.name == "tcg" and "Triple fault" not in logs.tail(self._files.log, 200)
            return MachineEnd.SHUTDOWN if asked else MachineEnd.TRIPLE_FAULT
        if reason == "guest-shutdown":
            return MachineEnd.SHUTDOWN
        if reason == "guest-panic":
            return MachineEnd.PANIC
        if reason in {"host-signal", "host-ui"}:
            return MachineEnd.KILLED
        return MachineEnd.STOPPED if reason.startswith("host-qmp") else MachineEnd.ENGINE_ERROR

    def _explain_exit(self) -> MachineEnd:
        # With reboot and shutdown turned into a pause QEMU does not end by itself, unless it fails (status 1)
        # or a device such as isa-debug-exit makes it.
        return MachineEnd.ENGINE_ERROR if self._child.poll() == 1 else MachineEnd.EXITED

    def _evidence(self) -> Sequence[tuple[str, str]]:
        events = registers = ""
        # QEMU logs all registers at each reset, too: those lines have "=" in them.
        said = [line for line in logs.last_lines(self._files.log) if "=" not in line]
        if self._monitor is not None:
            events = "\n".join(f"{event.name} {dict(event.data)}" for event in self._monitor.events)
            registers = self._last_registers()
        return (
            ("QMP events", events),
            ("registers", registers),
            (f"end of {self._files.output}", logs.tail(self._files.output, 20)),
            (f"end of {self._files.log}", "\n".join(said[-20:])),
        )

    def _last_registers(self) -> str:
        if self._child.poll() is not None or self._stopped:
            return ""
        paused = self.paused
        try:
            self.resume()
            return self._live_monitor().human("info registers", timeout_s=2.0)
        except errors.MachineError as error:
            return f"not to be had: {error.message}"
        finally:
            if paused:
                self.pause()

    def _live_monitor(self) -> Qmp:
        if self._monitor is None:
            raise errors.MachineError(f"{self.info.title()}: QMP is not connected")
        return self._monitor

    def _tell_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.suspended = self.paused

    def _release(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
        if GDB_ARGUMENTS[1] in self.command_line():
            (self.log_dir / GDB_SOCKET).unlink(missing_ok=True)


def reset(monitor: Qmp) -> None:
    """Reset the machine behind a QMP connection. Raises as `Qmp.execute`."""
    # The action that turns a guest's reset into an end takes ours for one, too.
    monitor.execute("set-action", {"reboot": "reset"})
    try:
        before = len(monitor.events)
        monitor.execute("system_reset")
        monitor.wait_event("RESET", since=before)
    finally:
        monitor.execute("set-action", {"reboot": "shutdown"})


class QemuEngine(Engine):
    """QEMU with one accelerator. There is only ever one on the command line: two mean a silent fallback."""

    accelerator: ClassVar[str]

    _debugger: tuple[str, ...] = ()

    def debug(self, log_dir: Path, terminal: DebuggerTerminal) -> tuple[str, ...]:
        """See `Engine.debug`: QEMU's gdb stub, on a socket in the log directory."""
        del terminal
        command = gdb_command(log_dir)
        self._debugger = GDB_ARGUMENTS
        return (f"debugger: {command}",)

    def availability(self) -> Availability:
        """See `Engine.availability`."""
        try:
            version = _version(self._program())
        except errors.EngineUnavailable as error:
            return Availability.lacking(error)
        return Availability(True, version)

    def check_host(self) -> None:
        """Raise EngineUnavailable where this host lacks what the accelerator stands on; `open` asks first."""

    def known_version(self) -> str:
        """The version in reports, where it is known before QEMU runs; else QMP tells it."""
        return UNKNOWN_VERSION

    @abstractmethod
    def cpu_argument(self, base: str, features: Sequence[str]) -> str:
        """The value of -cpu for a model and its switches. Raises EngineUnavailable for what can't be."""

    def arguments(self, rom: RomImage, *, model: str, memory_mb: int, processors: int = 1) -> list[str]:
        """QEMU's arguments but for the channels. Raises EngineUnavailable for a model that can't be."""
        base, *features = model.split(",")
        for feature in (base, *features):
            if not _FEATURE.fullmatch(feature):
                raise errors.EngineUnavailable(
                    f"engine {self.name}: {feature!r} in the model {model!r} is no name and no switch",
                    advice="a model and its switches look like host,vmx-ept=off",
                ).locate(engine=self.name)
        return [
            *("-nodefaults", "-no-user-config"),
            *("-display", "none", "-vga", "none", "-monitor", "none"),
            *(*MACHINE, "-m", str(memory_mb), "-smp", str(processors)),
            *("-accel", self.accelerator, "-cpu", self.cpu_argument(base, features)),
            *("-bios", str(rom.path)),
        ]

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
        start_deadline_s: float = 30.0,
    ) -> QemuMachine:
        """See `Engine.open`. `model` may carry switches: "host,vmx-ept=off"."""
        self.check_host()
        image = RomImage.check(rom)
        program = self._program()
        model = model or self.default_model
        arguments = self.arguments(image, model=model, memory_mb=memory_mb, processors=processors)
        files = logs.claim(log_dir, self.name)
        with contextlib.ExitStack() as undo:
            serial, serial_end = (undo.enter_context(end) for end in socket.socketpair())
            control, control_end = (undo.enter_context(end) for end in socket.socketpair())
            # QEMU sends byte by byte, each a packet that counts for hundreds in the socket's buffer: with the
            # usual size the guest waits for the reader every 300 bytes. The kernel gives what it allows.
            serial_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SERIAL_BUFFER_BYTES)
            # It runs in the log directory: a plain name for -D, which takes a "%" in a path for its own.
            command = [
                *(str(program), *arguments),
                *("-chardev", f"socket,id=serial,fd={serial_end.fileno()}", *VIRTIO_SERIAL),
                *("-chardev", f"socket,id=qmp,fd={control_end.fileno()}", "-mon", "chardev=qmp,mode=control"),
                *START_PAUSED,
                *("-d", "guest_errors,cpu_reset", "-D", files.log.name),
                *self._debugger,
                *extra,
            ]
            fds = (serial_end.fileno(), control_end.fileno())
            child = spawn(command, engine=self.name, output=files.output, pass_fds=fds)
            undo.callback(child.close)
            undo.callback(child.kill)
            serial_end.close()
            control_end.close()
            info = EngineInfo(self.name, self.known_version(), model, why)
            machine = self._connected(QemuMachine(info, child, serial, files), control, start_deadline_s)
            undo.pop_all()
        return machine

    def _connected(self, machine: QemuMachine, control: socket.socket, deadline_s: float) -> QemuMachine:
        # Imported while QEMU starts: asyncio and the client take as long as it does.
        from vmxlab.engines.qmp import Qmp

        monitor = Qmp(control, title=machine.engine_log.stem, on_event=machine.note)
        try:
            machine.connect(monitor, deadline_s)
        except BaseException as error:
            machine.stop()
            if not isinstance(error, errors.MachineError):
                raise
            output = machine.engine_log.with_suffix(".out")
            said = logs.tail(output, 8) or "(nothing)"
            raise errors.EngineUnavailable(
                f"engine {self.name}: QEMU did not come up ({error.message}); its last words:\n{said}",
                advice=f"its output is in {output.name} beside the log; package needed: {PACKAGES}",
            ).locate(engine=self.name, log_path=output) from error
        return machine

    def _program(self) -> Path:
        return find_program([PROGRAM], engine=self.name, packages=PACKAGES)

    def _listed_models(self) -> tuple[str, ...]:
        try:
            text = ask(self._program(), "-accel", self.accelerator, "-cpu", "help", packages=PACKAGES)
        except errors.EngineUnavailable:
            return ()
        return tuple(re.findall(r"^x86 (\S+)", text, re.MULTILINE))


class QemuKvmEngine(QemuEngine):
    """QEMU with a KVM that has nested VMX, wherever that KVM runs."""

    accelerator: ClassVar[str] = "kvm"
    default_model: ClassVar[str] = "host"

    def models(self) -> tuple[str, ...]:
        """Only KVM's own processor: QEMU's vmx-* switches make poorer ones of it ("host,vmx-ept=off")."""
        return (self.default_model,)

    def has_vmx(self, model: str | None = None) -> bool:
        """See `Engine.has_vmx`."""
        return "-vmx" not in (model or "").split(",")

    def cpu_argument(self, base: str, features: Sequence[str]) -> str:
        """See `QemuEngine.cpu_argument`. `enforce` makes QEMU end where the host lacks a feature."""
        # The last word counts: a switch of the caller comes after ours.
        return ",".join((base, "+vmx", "enforce", *features))


def _version(program: Path) -> str:
    text = ask(program, "-version", packages=PACKAGES)
    found = re.search(r"QEMU emulator version (\S+)", text)
    if found is None:
        raise errors.EngineUnavailable(
            f"{program} does not answer as QEMU does: {text[:200]!r}",
            advice=f"on Debian or Ubuntu: apt-get install {PACKAGES}",
        )
    return found[1]
