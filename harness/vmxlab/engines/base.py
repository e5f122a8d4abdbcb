"""What an engine is, and what it gives: a machine.

An *engine* knows one way to boot an image: it says whether it can run here, and if not, what is missing.
A *machine* is one boot of one image: a process group that we own, a two-way serial stream, a QMP connection
where there is one, and a stop that always works. A machine lives once; after its end another one is opened.

What ended a machine is told apart as far as the engine tells (`MachineEnd`), and the reader of the serial
stream never has to wait for a deadline to learn of an end: when the processor is dead the stream ends, after
the last byte that was sent.
"""

from __future__ import annotations

import enum
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

from vmxlab import errors
from vmxlab.engines.process import Process
from vmxlab.engines.streams import hang_up, peer_is_gone

if TYPE_CHECKING:
    from vmxlab.engines.debugger import DebuggerTerminal
    from vmxlab.engines.qmp import Qmp

# An emulator closes its end of the serial line some milliseconds before its process can be waited for.
_EXIT_GRACE_S = 2.0

# Signals that a process raises against itself when it finds itself broken: the engine's fault, nobody's kill.
_SELF_INFLICTED = frozenset({signal.SIGABRT, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGBUS})


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Which engine runs a machine. Stands in every report's head.

    `why` says why this engine was chosen: "named by --engine", "auto: ...".
    """

    name: str
    version: str
    model: str
    why: str

    def title(self) -> str:
        """The engine in one line, such as "bochs 2.7 (corei7_skylake_x)"."""
        return f"{self.name} {self.version} ({self.model})"


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an engine can run here; if not, what the problem is and what to do about it."""

    ok: bool
    version: str | None = None
    problem: str | None = None
    advice: str | None = None

    @classmethod
    def lacking(cls, error: errors.EngineUnavailable) -> Self:
        """What an error says is missing, without the engine's name: whoever shows it has that before it."""
        problem = error.message.removeprefix(f"engine {error.engine}: ")
        return cls(False, problem=problem, advice=error.advice)


class MachineEnd(enum.Enum):
    """What became of a machine. The value is what a person reads."""

    RUNNING = "is running"
    TRIPLE_FAULT = "the processor shut down (triple fault)"
    VMX_ABORT = "the processor shut down (VMX abort)"
    SHUTDOWN = "the guest asked for the end"
    EXITED = "the engine's process ended by itself"
    KILLED = "the engine's process was ended by a signal that is not ours"
    STOPPED = "was stopped by the harness"
    PANIC = "the guest reported a panic"
    ENGINE_ERROR = "the engine gave up"

    @property
    def alive(self) -> bool:
        """Whether the machine still runs."""
        return self is MachineEnd.RUNNING


class Machine(ABC):
    """A running machine. A context manager: leaving it stops it.

    `info`: the engine. `pid`: the emulator's own process. `log_dir`: where its files are; `engine_log`: the
    engine's own log among them. `serial`: the harness's end of the serial line, a stream socket. When the
    machine is dead it reads as ended (or raises ConnectionResetError, if the guest left input unread).
    Nothing here writes the serial log: whoever reads the stream keeps it. After `stop` it is closed.

    On Bochs the serial line is TCP, and Bochs sends byte by byte, each held back until the one before is
    acknowledged: a reader that also writes sets TCP_QUICKACK after each read, or waits 40 ms for an answer.
    """

    def __init__(self, info: EngineInfo, child: Process, serial: socket.socket, engine_log: Path) -> None:
        self.info = info
        self.serial = serial
        self.engine_log = engine_log
        self.log_dir = engine_log.parent
        self._child = child
        self._end = MachineEnd.RUNNING
        self._lock = threading.Lock()
        self._paused = False
        self._stopped = False

    @property
    def pid(self) -> int:
        """The process id of the emulator itself, not of a wrapper."""
        return self._child.pid

    @property
    def paused(self) -> bool:
        """Whether `pause` holds the machine."""
        return self._paused

    def command_line(self) -> list[str]:
        """The command that runs the emulator, for reports; the sockets it names were inherited."""
        return list(self._child.command)

    def qmp(self) -> Qmp | None:
        """The QMP connection, or None where the engine has none."""
        return None

    # --- life ------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Nothing left to do: `Engine.open` gives a running machine. Raises MachineError after `stop`."""
        if self._stopped:
            raise errors.MachineError(
                f"{self.info.title()}: this machine was stopped",
                advice="open another one: a machine lives once",
            ).locate(engine=self.info.title(), log_path=self.engine_log)
        return self

    def stop(self) -> None:
        """End the machine and wait for its process. May be called again; never raises for a dead process.

        What ended the machine before this call stays its end.
        """
        if self._stopped:
            return
        self.end()
        self._settle(MachineEnd.STOPPED)
        self._stopped = True
        self._child.kill()
        self._release()
        self._child.close()
        self.serial.close()

    def pause(self) -> None:
        """Stop the emulator's process, so that an idle machine costs no processor time. Idempotent.

        SIGSTOP serves every engine: it takes 0.05 ms, where QEMU's own `stop` takes 0.7 ms. The emulated
        time stands still; QMP does not answer until `resume`.
        """
        if not self._paused and self._child.signal(signal.SIGSTOP):
            self._paused = True

    def resume(self) -> None:
        """Let a paused machine run on. Idempotent."""
        if self._paused:
            self._paused = False
            self._child.signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def nested_entries(self) -> int | None:
        """How many VM entries of L1 the engine has counted in this machine; None where it counts none.

        A paused machine runs on after it.
        """
        return None

    def wait_for_debugger(self) -> None:  # noqa: B027  (where it has a prompt, the machine starts from there)
        """Wait until a debugger has attached, and has let the machine run on. Raises MachineDied."""

    # --- end -------------------------------------------------------------------------------------------

    def end(self) -> MachineEnd:
        """What became of the machine; RUNNING as long as nothing did."""
        if self._end is MachineEnd.RUNNING and not self._stopped:
            self._observe()
        return self._end

    def postmortem(self) -> str:
        """What there is to know about the machine now, for a person: its end, and what the engine says."""
        lines = [f"{self.info.title()}: {self.end().value}"]
        status = self._child.poll()
        if status is not None:
            lines.append(_describe_status(status))
        for title, text in self._evidence():
            if text.strip():
                lines += [f"--- {title} ---", text.rstrip()]
        return "\n".join(lines)

    def _observe(self) -> None:
        """Look at the process, and settle the end if it has one."""
        status = self._child.poll()
        if status is None and peer_is_gone(self.serial):
            status = self._child.wait(_EXIT_GRACE_S)
        if status is None:
            return
        if status >= 0:
            self._settle(self._explain_exit())
        else:
            broken = -status in _SELF_INFLICTED
            self._settle(MachineEnd.ENGINE_ERROR if broken else MachineEnd.KILLED)

    def _settle(self, end: MachineEnd) -> bool:
        """Record the end if it is the first; say whether it was."""
        with self._lock:
            if self._end is not MachineEnd.RUNNING:
                return False
            self._end = end
            return True

    def _die(self, end: MachineEnd) -> None:
        """The processor is dead though the process lives: record why, and end the reader's stream."""
        if self._settle(end):
            hang_up(self.serial)

    @abstractmethod
    def _explain_exit(self) -> MachineEnd:
        """Why the process ended, when no signal did it."""

    @abstractmethod
    def _evidence(self) -> Sequence[tuple[str, str]]:
        """(title, text) pairs for `postmortem`. Must not raise for a dead machine."""

    @abstractmethod
    def _release(self) -> None:
        """Give back what the engine's machine holds besides the process. The process is dead."""


class Engine(ABC):
    """A way to boot an image."""

    name: ClassVar[str]
    default_model: ClassVar[str]
    # How long a guest program may run, in TSC ticks, before the monitor ends it: about a second of the
    # host's time on each engine.
    l2_budget_tsc: ClassVar[int]
    # How many times longer than on the other engines a case may take before it counts as hung.
    patience: ClassVar[int] = 1

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this engine can run here. Starts no machine and never raises for something missing."""

    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """The processor models to choose from (on Bochs: those that have VMX and 64-bit mode)."""

    def models_by_need(self) -> tuple[str, ...]:
        """The models that may have what the default one lacks, in the order to try them.

        None by default: of an engine whose models are the default one less some features none has more.
        """
        return ()

    @abstractmethod
    def has_vmx(self, model: str | None = None) -> bool:
        """Whether a processor with VMX is to be expected of this engine with this model."""

    @abstractmethod
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
    ) -> Machine:
        """Boot an image and give the running machine.

        `rom` is the image file (see `rom.RomImage`). `log_dir` takes the engine's files, and is made if need
        be; their names carry a number, so that no machine overwrites what another one left. `extra` are
        further configuration lines (Bochs) or arguments (QEMU), word for word.

        Raises EngineUnavailable if the engine can't run here or ends before the machine is up (there is
        never a fallback), ImageError for a file that is no image, LogError if the logs can't be written.
        """

    def prepare(self, tell: Callable[[str], None] | None = None) -> None:  # noqa: B027  (most need nothing)
        """Make what machines of this engine need, where that takes long; `open` does it too, if need be.

        `tell` is called with what is being done, for a person who waits. Raises EngineUnavailable.
        """

    def debug(self, log_dir: Path, terminal: DebuggerTerminal) -> tuple[str, ...]:
        """Open machines under a debugger from now on; what to tell the person who has it, line by line.

        `terminal` is for a debugger that has a prompt of its own. Raises EngineUnavailable where the engine
        has no debugger.
        """
        raise errors.EngineUnavailable(
            f"engine {self.name}: there is no debugger for its machines",
            advice="on tcg and kvm it is gdb, on bochs the debugger of Bochs: --engine",
        ).locate(engine=self.name)

    def close(self) -> None:  # noqa: B027  (most keep nothing)
        """End what was kept between machines. May be called again; `open` works after it, too."""

    def require(self) -> None:
        """Raise EngineUnavailable, with what is missing, if this engine can't run here."""
        state = self.availability()
        if not state.ok:
            raise errors.EngineUnavailable(
                f"engine {self.name}: {state.problem}", advice=state.advice
            ).locate(engine=self.name)


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"ended by signal {-status} ({name})"
