"""A running carrier: Debian's kernel in Bochs, with one QEMU at a time in it.

It is started once and serves many images. Its end, whatever the cause, ends the streams of its machine; who
asks then learns why from Linux's console, which is kept as the engine's log.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmxlab import errors
from vmxlab.engines import logs
from vmxlab.engines.bochs import bochs_version, find_bochs
from vmxlab.engines.bochs_config import quoted, settings
from vmxlab.engines.carrier.disk import MARK_BYTES, CarrierDisk
from vmxlab.engines.carrier.image import MEMORY_BASE, MEMORY_MB, CarrierImage
from vmxlab.engines.carrier.streams import Streams
from vmxlab.engines.loopback import accept_from, listen_on_loopback
from vmxlab.engines.process import Child, spawn
from vmxlab.engines.rom import RomImage

if TYPE_CHECKING:
    from vmxlab.engines.qmp import Qmp

ENGINE = "kvm-in-bochs"

# Emulated time is counted in instructions, some 40 million of them in a second of ours. With more of them in
# an emulated second Linux's timer interrupts are rarer, with fewer the UARTs are faster, and so is each case.
# Measured: with 100 million the start takes as long, but a machine's first case twice as long; with 25
# million the start takes 10 % longer.
_IPS = 50_000_000

_STEP_DEADLINE_S = 20.0
_NAP_S = 0.002
# Bochs closes its lines some milliseconds before its process can be waited for.
_EXIT_GRACE_S = 2.0
_PANIC = re.compile(r"Kernel panic - not syncing: .*")
_IGNORED = re.compile(r"kvm\w*: unknown parameter .* ignored")
_TELLING = re.compile(r"panic|BUG|WARNING|Oops|error|failed|qemu|kvm|vmx", re.IGNORECASE)


class Carrier:
    """One carrier. `parameters`: those of the modules kvm and kvm_intel it was started with."""

    def __init__(
        self,
        image: CarrierImage,
        child: Child,
        files: logs.LogFiles,
        disk: CarrierDisk,
        parameters: tuple[str, str],
    ) -> None:
        self.child = child
        self.version = image.version
        self.parameters = parameters
        self.console = files.log
        self.bochs_version = bochs_version(files.directory / f"{files.stem}.bochs.log")
        self.qemu: InnerQemu | None = None
        self._files = files
        self._disk = disk
        self._streams: Streams | None = None
        self._news = threading.Condition()
        self._said: list[str] = []
        self._marks_asked = 0
        self._qemus_ended = 0
        self._console_before = 0
        self._gone = False
        self._stopped = False

    # --- start and end ---------------------------------------------------------------------------------

    @classmethod
    def boot(
        cls,
        image: CarrierImage,
        *,
        parameters: tuple[str, str],
        model: str,
        log_dir: Path,
        deadline_s: float,
    ) -> Carrier:
        """Start Bochs with the carrier and wait until KVM is loaded.

        Raises EngineUnavailable if that fails or takes too long, LogError if the logs can't be written.
        """
        limit = time.monotonic() + deadline_s
        files = logs.claim(log_dir, ENGINE)
        mark = b"\x02" + secrets.token_hex(MARK_BYTES).encode()[: MARK_BYTES - 1]
        with contextlib.ExitStack() as undo:
            disk = CarrierDisk(files.directory / f"{files.stem}.disk", mark)
            undo.callback(disk.close)
            disk.write_job(parameters)
            listeners = [undo.enter_context(_listener()) for _ in range(3)]
            child = _start_bochs(image, files, disk, model, [s.getsockname()[1] for s in listeners])
            undo.callback(child.close)
            undo.callback(child.kill)
            lines = [undo.enter_context(_connected(sock, child, files, limit)) for sock in listeners]
            carrier = cls(image, child, files, disk, parameters)
            disk.hide()
            carrier._streams = Streams(
                *lines, mark=mark, on_line=carrier._heard, on_end=carrier._bochs_has_gone
            )
            carrier._streams.start()
            undo.callback(carrier._streams.close)
            carrier._wait("ready", limit - time.monotonic(), "to load KVM")
            refuse_unknown_parameters(carrier.console)
            undo.pop_all()
        for listener in listeners:
            listener.close()
        return carrier

    def close(self) -> None:
        """End it, and wait for its process. May be called again."""
        if self._stopped:
            return
        self._stopped = True
        if self.qemu is not None:
            self.qemu.hang_up()
        self.child.kill()
        if self._streams is not None:
            self._streams.close()
        self.child.close()
        self._disk.close()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return not self._stopped and not self._gone and self.child.poll() is None

    def signal(self, number: signal.Signals) -> bool:
        """Send Bochs a signal. False if it has ended."""
        return self.child.signal(number)

    # --- its QEMU --------------------------------------------------------------------------------------

    def start_qemu(self, image: bytes, arguments: Sequence[str]) -> tuple[InnerQemu, socket.socket]:
        """Start QEMU with an image in place of the one before; its process, and the socket of its QMP.

        The socket of its serial line is `InnerQemu.serial`. Raises MachineError.
        """
        self.end_qemu()
        streams = self._live_streams()
        # Between the two QEMUs nobody reads the lines but init.
        streams.put_mark(streams.serial)
        streams.put_mark(streams.monitor)
        self._ask("drain", "drained")
        self._wait_for_marks()
        with contextlib.suppress(OSError):
            self._console_before = self.console.stat().st_size
        self._disk.write_job(["qemu-system-x86_64", *arguments], image)
        serial, monitor = streams.attach()
        self.qemu = InnerQemu(self, ["qemu-system-x86_64", *arguments], image, serial)
        try:
            self._ask("start", "started")
        except BaseException:
            serial.close()
            monitor.close()
            raise
        return self.qemu, monitor

    def drop_input(self) -> None:
        """Drop what was sent to the machine of the QEMU that runs and not read yet. Raises MachineError."""
        streams = self._live_streams()
        self._ask("hold", "held")
        streams.put_mark(streams.serial)
        self._ask("drain", "drained")
        self._ask("go", "gone")

    def renew_serial(self) -> socket.socket:
        """A new serial stream for the QEMU that runs, behind all that it has sent. Raises MachineError."""
        streams = self._live_streams()
        self._count_mark()
        self._ask("mark", "marked")
        self._wait_for_marks()
        return streams.attach_serial()

    def ask_for_mark(self) -> None:
        """End the serial stream behind all that QEMU has sent, without waiting for that."""
        if self._streams is not None:
            self._count_mark()
            with contextlib.suppress(OSError):
                self._streams.command("mark")

    def _count_mark(self) -> None:
        with self._news:
            self._marks_asked += 1

    def _wait_for_marks(self) -> None:
        """Wait until no mark is under way: it would end the stream of the machine that comes next."""
        streams = self._live_streams()
        limit = time.monotonic() + _STEP_DEADLINE_S
        while (
            streams.serial.marks_seen < self._marks_asked + self._qemus_ended
            or streams.monitor.marks_seen < self._qemus_ended
        ):
            self._live_streams()
            if time.monotonic() > limit:
                raise self._trouble("did not end the streams of the machine before")
            time.sleep(_NAP_S)

    def end_qemu(self) -> None:
        """Kill QEMU, and wait for its end. Raises MachineError."""
        qemu = self.qemu
        if qemu is None:
            return
        qemu.hang_up()
        if qemu.poll() is None:
            self._ask("end", "ended")
        self.qemu = None

    def saved_memory(self) -> bytes:
        """The file /memory.bin of the carrier. Raises MachineError."""
        answer = self._ask("save", "saved", 60.0)
        return self._disk.read_data(int(answer.split()[1]))

    # --- what it says ----------------------------------------------------------------------------------

    def last_words(self, lines: int = 12) -> str:
        """The end of Linux's console: what the kernel and QEMU said last."""
        return logs.tail(self.console, lines)

    def words_of_qemu(self, lines: int = 12) -> str:
        """The end of what came on the console since this QEMU was started."""
        with contextlib.suppress(OSError), self.console.open("rb") as file:
            file.seek(self._console_before)
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
        return ""

    def evidence(self) -> Sequence[tuple[str, str]]:
        """(title, text) pairs for a post-mortem."""
        lines = logs.last_lines(self.console)
        telling = [line for line in lines if _TELLING.search(line)]
        return (
            ("what Linux and QEMU in the carrier say of KVM and of errors", "\n".join(telling[-20:])),
            (f"end of {self.console}", "\n".join(lines[-20:])),
            ("what Bochs says of its end", "\n".join(self._panics_of_bochs()[-3:])),
        )

    def explain_end(self) -> str:
        """Why it has ended, in a few words."""
        panics = [m[0] for line in logs.last_lines(self.console) if (m := _PANIC.search(line))]
        if panics:
            return f"Linux in the carrier: {panics[-1]}"
        status = self.child.wait(_EXIT_GRACE_S)
        said = self._panics_of_bochs()
        if said:
            return f"Bochs gave up: {said[-1].partition('>>PANIC<<')[2].strip()}"
        if status is not None and status < 0:
            return f"Bochs was ended by signal {-status}"
        return "Bochs has ended" if status is not None else "Bochs has closed its lines"

    # --- inside ----------------------------------------------------------------------------------------

    def _panics_of_bochs(self) -> list[str]:
        log = self._files.directory / f"{self._files.stem}.bochs.log"
        return [line for line in logs.last_lines(log) if ">>PANIC<<" in line]

    def _heard(self, line: str) -> None:
        """A line from init. In the streams' thread."""
        tag, _, text = line.partition(" ")
        if tag != "@carrier":
            return
        if text.startswith("ended") and self.qemu is not None:
            self.qemu.ended(text)
        with self._news:
            self._qemus_ended += text.startswith(("ended exit=", "ended signal="))
            self._said.append(text)
            self._news.notify_all()

    def _bochs_has_gone(self) -> None:
        with self._news:
            self._gone = True
            self._news.notify_all()

    def _ask(self, command: str, answer: str, deadline_s: float = _STEP_DEADLINE_S) -> str:
        streams = self._live_streams()
        with self._news:
            self._said = [text for text in self._said if not text.startswith(answer)]
        try:
            streams.command(command)
        except OSError as error:
            raise self._trouble(f"takes no command ({error})") from error
        return self._wait(answer, deadline_s, f"to do {command!r}")

    def _wait(self, answer: str, deadline_s: float, what: str) -> str:
        def told() -> str | None:
            return next((text for text in self._said if text.startswith((answer, "error "))), None)

        with self._news:
            self._news.wait_for(lambda: told() or self._gone, deadline_s)
            text = told()
            if text is not None:
                self._said.remove(text)
        if text is None:
            late = f"took more than {deadline_s:.0f} s {what}"
            raise self._trouble("ended: " + self.explain_end() if self._gone else late)
        if text.startswith("error "):
            raise self._trouble(f"can't be told {what}: {text.removeprefix('error ')}")
        return text

    def _trouble(self, what: str) -> errors.MachineError:
        kind = errors.MachineDied if self._gone else errors.MachineHung
        problem = kind(f"{ENGINE}: the carrier {what}; its last words:\n{self.last_words(6) or '(nothing)'}")
        problem.locate(engine=ENGINE, log_path=self.console)
        return problem

    def _live_streams(self) -> Streams:
        if self._streams is None or not self.alive:
            raise self._trouble("ended: " + self.explain_end())
        return self._streams


def refuse_unknown_parameters(console: Path) -> None:
    """Raise EngineUnavailable if Linux says on its console that a module has not got a parameter.

    It loads the module all the same, and a run would be taken for one with that parameter.
    """
    unknown = [line.partition("] ")[2] for line in logs.last_lines(console) if _IGNORED.search(line)]
    if unknown:
        raise errors.EngineUnavailable(
            f"engine {ENGINE}: Linux in the carrier says: {'; '.join(unknown)}",
            advice="the parameters are those of the modules kvm and kvm_intel of that Linux",
        ).locate(engine=ENGINE, log_path=console)


class InnerQemu:
    """The QEMU in a carrier, to the harness a `process.Process` as one on this host.

    Bochs is what is paused, and what has a process id here. `monitor` is its QMP connection, which lasts as
    long as it does; `serial` the stream of the machine that it runs first.
    """

    def __init__(self, carrier: Carrier, command: Sequence[str], image: bytes, serial: socket.socket) -> None:
        self.carrier = carrier
        self.command = tuple(command)
        self.image = image
        self.serial = serial
        self.monitor: Qmp | None = None
        self.pid = carrier.child.pid
        self._status: int | None = None
        self._over = threading.Event()

    def ended(self, text: str) -> None:
        """Init says so: "ended exit=N" or "ended signal=N"."""
        _, _, how = text.partition(" ")
        kind, _, number = how.partition("=")
        value = int(number) if number.isdecimal() else 0
        self._status = -value if kind == "signal" else value
        self._over.set()

    def poll(self) -> int | None:
        """Exit status; minus the signal's number if one ended it; None while it runs. It dies with Bochs."""
        if self._status is None and not self.carrier.alive:
            status = self.carrier.child.wait(_EXIT_GRACE_S)
            self._status = 1 if status is None else status
        return self._status

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end, at most so long. As `poll`."""
        limit = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < limit:
            self._over.wait(0.02)
        return self.poll()

    def signal(self, number: signal.Signals) -> bool:
        """Send Bochs a signal. False if it has ended."""
        return self.poll() is None and self.carrier.signal(number)

    def kill(self) -> None:
        """Let it go: it may serve the next image. Until then the whole carrier is held."""
        if self.carrier.alive:
            self.carrier.signal(signal.SIGSTOP)

    def close(self) -> None:
        """Nothing to give back."""

    def hang_up(self) -> None:
        """Close its QMP connection."""
        if self.monitor is not None:
            self.monitor.close()


def _listener() -> socket.socket:
    try:
        return listen_on_loopback()
    except OSError as error:
        raise errors.EngineUnavailable(
            f"engine {ENGINE}: no port of 127.0.0.1 can be listened on: {error.strerror}",
            advice="the serial lines of Bochs go over loopback: it must be up, with ports free",
        ).locate(engine=ENGINE) from error


def _start_bochs(
    image: CarrierImage, files: logs.LogFiles, disk: CarrierDisk, model: str, ports: Sequence[int]
) -> Child:
    lines = settings(
        RomImage.check(image.rom),
        com1=f"mode=file, dev={files.log.name}",
        model=model,
        memory_mb=MEMORY_MB,
        log_name=f"{files.stem}.bochs.log",
        ips=_IPS,
        # Linux reads some that Bochs has not got, and takes 0 for an answer.
        ignore_bad_msrs=True,
        extra=[
            *(
                f"com{number}: enabled=1, mode=socket-client, dev=127.0.0.1:{port}"
                for number, port in enumerate(ports, 2)
            ),
            f"optramimage1: file={quoted(image.memory)}, address={MEMORY_BASE:#x}",
            *disk.settings(),
            # At each exit Linux reads an MSR that Bochs has not got: four lines of log for each.
            "error: action=report, cpu0=ignore",
        ],
    )
    config = files.write(".bochsrc", "\n".join(lines) + "\n")
    go_on = files.write(".debugger", "c\n")
    command = [str(find_bochs(ENGINE)), "-q", "-f", config.name, "-rc", go_on.name]
    return spawn(command, engine=ENGINE, output=files.output, environment={"TERM": "dumb", "LC_ALL": "C"})


def _connected(listener: socket.socket, child: Child, files: logs.LogFiles, limit: float) -> socket.socket:
    try:
        connection = accept_from(listener, child, limit - time.monotonic())
    except TimeoutError:
        connection, problem = None, "did not open its serial lines in time"
    else:
        problem = f"ended before it opened its serial lines (exit status {child.poll()})"
    if connection is not None:
        return connection
    said = logs.tail(files.output, 8) or "(nothing)"
    raise errors.EngineUnavailable(
        f"engine {ENGINE}: Bochs {problem}; its last words:\n{said}",
        advice=f"its settings are in {files.stem}.bochsrc beside the log",
    ).locate(engine=ENGINE, log_path=files.output)
