"""Bochs: an x86 emulator with VMX of its own, so the engine that asks no VMX of its host.

Debian's Bochs is built with its debugger: it would wait at a prompt, and is told to go on by a command file.
Its com1 connects to a listener of ours on loopback. What it thinks of a VM entry stands in its log, such as
"VMENTER FAIL: VMCS guest CS.RPL != SS.RPL": `postmortem` shows those lines.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vmxlab import errors
from vmxlab.engines import logs
from vmxlab.engines.base import Availability, Engine, EngineInfo, Machine, MachineEnd
from vmxlab.engines.bochs_config import VMX_MODELS, settings
from vmxlab.engines.debugger import DebuggerTerminal, write_bochs_symbols
from vmxlab.engines.loopback import accept_from, listen_on_loopback
from vmxlab.engines.process import Child, ask, find_program, spawn
from vmxlab.engines.rom import RomImage

_PACKAGES = "bochs bochs-term bochsbios vgabios"
_INSTALL = f"on Debian or Ubuntu: apt-get install {_PACKAGES}"
# /usr/bin/bochs is a shell script on Debian; elsewhere it is the emulator.
_PROGRAMS = ("bochs-bin", "bochs")
_VERSION = re.compile(r"Bochs x86 Emulator (\S+)")
_TELLING = re.compile(r"VMENTER FAIL|VMFAIL|VMABORT|>>PANIC<<|no resolution|VMX|bx_pc_system_c::Reset\(")
_PLUGINS = re.compile(r"LTDL_LIBRARY_PATH not set. using compile time default '([^']+)'")
_DISPLAY_PLUGIN = "libbx_term_gui.so"
_WATCH_STEP_S = 0.1


def find_bochs(engine: str) -> Path:
    """The emulator's program. Raises EngineUnavailable, which says how to get it."""
    return find_program(_PROGRAMS, engine=engine, packages=_PACKAGES)


class AbortWatch(threading.Thread):
    """Watches a log of Bochs for a VMX abort, as long as its process lives.

    After a VMX abort the processor is dead, but Bochs runs on and says nothing except in its log: without a
    look there a crash would pass for a hang.
    """

    def __init__(self, child: Child, log: Path) -> None:
        super().__init__(name="vmxlab-bochs", daemon=True)
        self._child = child
        self._log = log
        self._told: Future[None] = Future()

    def tell(self, on_abort: Callable[[], object]) -> None:
        """Have this called when (or if already) there was an abort."""
        self._told.add_done_callback(lambda _: on_abort())

    def run(self) -> None:
        """See `threading.Thread.run`."""
        seen = 0
        while self._child.wait(_WATCH_STEP_S) is None:
            with contextlib.suppress(OSError), self._log.open("rb") as file:
                file.seek(seen)
                news = file.read()
                end = news.rfind(b"\n") + 1
                seen += end
                if b"VMABORT:" in news[:end]:
                    self._told.set_result(None)
                    return


class BochsMachine(Machine):
    """A running Bochs."""

    def __init__(
        self, info: EngineInfo, child: Child, serial: socket.socket, files: logs.LogFiles, watch: AbortWatch
    ) -> None:
        super().__init__(info, child, serial, files.log)
        self._files = files
        self._watch = watch
        watch.tell(lambda: self._die(MachineEnd.VMX_ABORT))

    def _explain_exit(self) -> MachineEnd:
        # The exit status is 1 for everything; the last panic tells. If the disk is full it may be missing
        # from the log, but what Bochs prints was written before or not at all as well.
        panics = [line for line in logs.last_lines(self._files.log) if ">>PANIC<<" in line]
        if not panics:
            return MachineEnd.EXITED
        if "3rd (" in panics[-1]:
            return MachineEnd.TRIPLE_FAULT
        if "Shutdown port" in panics[-1]:
            return MachineEnd.SHUTDOWN
        return MachineEnd.ENGINE_ERROR

    def _evidence(self) -> Sequence[tuple[str, str]]:
        lines = logs.last_lines(self._files.log)
        telling = [line for line in lines if _TELLING.search(line)]
        return (
            ("what Bochs says of VMX and of the end", "\n".join(telling[-20:])),
            (f"end of {self._files.log}", "\n".join(lines[-30:])),
        )

    def _release(self) -> None:
        self._watch.join()


class BochsEngine(Engine):
    """Bochs's own VMX."""

    name: ClassVar[str] = "bochs"
    default_model: ClassVar[str] = "corei7_skylake_x"
    l2_budget_tsc: ClassVar[int] = 1 << 27

    _terminal: DebuggerTerminal | None = None

    def availability(self) -> Availability:
        """See `Engine.availability`."""
        try:
            listing = _Listing.of(self._program())
        except errors.EngineUnavailable as error:
            return Availability.lacking(error)
        if self.default_model not in listing.models:
            problem = f"this Bochs ({listing.version}) has no processor model {self.default_model}"
            return Availability(False, listing.version, problem, "install Bochs 2.7 or later")
        if listing.plugins is not None and not (listing.plugins / _DISPLAY_PLUGIN).exists():
            problem = f"Bochs has no display library that needs no display ({_DISPLAY_PLUGIN})"
            return Availability(False, listing.version, problem, _INSTALL)
        return Availability(True, listing.version)

    def models(self) -> tuple[str, ...]:
        """The models with VMX and 64-bit mode that the installed Bochs has; none if there is no Bochs."""
        try:
            listing = _Listing.of(self._program())
        except errors.EngineUnavailable:
            return ()
        return tuple(model for model in VMX_MODELS if model in listing.models)

    def models_by_need(self) -> tuple[str, ...]:
        """See `Engine.models_by_need`: all others, the newest first, which have most."""
        return tuple(model for model in reversed(self.models()) if model != self.default_model)

    def has_vmx(self, model: str | None = None) -> bool:
        """See `Engine.has_vmx`."""
        return (model or self.default_model) in VMX_MODELS

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
    ) -> BochsMachine:
        """See `Engine.open`. `model` may be any that Bochs has, those without VMX too."""
        image = RomImage.check(rom)
        program = self._program()
        model = self._checked_model(program, model)
        files = logs.claim(log_dir, self.name)
        with contextlib.ExitStack() as undo:
            listener = self._listener()
            undo.callback(listener.close)
            lines = settings(
                image,
                com1=f"mode=socket-client, dev=127.0.0.1:{listener.getsockname()[1]}",
                model=model,
                memory_mb=memory_mb,
                processors=processors,
                log_name=files.log.name,
                extra=extra,
            )
            config = files.write(".bochsrc", "\n".join(lines) + "\n")
            child = self._start(program, config.name, files)
            undo.callback(child.close)
            # While Bochs starts there is time for it.
            watch = AbortWatch(child, files.log)
            watch.start()
            undo.callback(watch.join)
            undo.callback(child.kill)
            serial = self._connected(listener, child, files, start_deadline_s)
            undo.callback(serial.close)
            info = EngineInfo(self.name, bochs_version(files.log), model, why)
            machine = BochsMachine(info, child, serial, files, watch)
            undo.pop_all()
        listener.close()
        return machine

    def _start(self, program: Path, config: str, files: logs.LogFiles) -> Child:
        """Start Bochs: its debugger goes on at once, or has the terminal of whoever debugs."""
        command = [str(program), "-q", "-f", config]
        # The display library needs a terminal type, if only a dumb one.
        environment = {"TERM": "dumb", "LC_ALL": "C"}
        if self._terminal is None:
            command += ["-rc", files.write(".debugger", "c\n").name]
            return spawn(command, engine=self.name, output=files.output, environment=environment)
        with self._terminal.ends() as ends:
            child = spawn(
                command, engine=self.name, output=files.output, environment=environment, terminal=ends
            )
        self._terminal.child = child
        return child

    def debug(self, log_dir: Path, terminal: DebuggerTerminal) -> tuple[str, ...]:
        """See `Engine.debug`: Bochs's own debugger, which has the machine before its first instruction."""
        symbols = write_bochs_symbols(log_dir).name  # where Bochs runs
        self._terminal = terminal
        return (
            "debugger: Bochs's own, at <bochs:1>: c starts the machine, Ctrl-C stops it there, q ends it;",
            f'          ldsym global "{symbols}", then b "script_run"; vmexitbp stops at each VM exit;',
            "          r, creg, sreg, page ADDRESS, xp /8gx ADDRESS, u /5, s, help",
        )

    def _program(self) -> Path:
        return find_bochs(self.name)

    def _checked_model(self, program: Path, model: str | None) -> str:
        model = model or self.default_model
        # The models known here cost no look at Bochs; it refuses by itself what it does not have.
        if model in VMX_MODELS:
            return model
        listing = _Listing.of(program)
        if model not in listing.models:
            raise errors.EngineUnavailable(
                f"engine {self.name}: Bochs {listing.version} has no processor model {model!r}",
                advice=f"with VMX: {', '.join(self.models())}; without: see bochs -help cpu",
            ).locate(engine=self.name)
        return model

    def _listener(self) -> socket.socket:
        try:
            return listen_on_loopback()
        except OSError as error:
            raise errors.EngineUnavailable(
                f"engine {self.name}: no port of 127.0.0.1 can be listened on: {error.strerror}",
                advice="the serial line of Bochs goes over loopback: it must be up, with a port free",
            ).locate(engine=self.name) from error

    def _connected(
        self, listener: socket.socket, child: Child, files: logs.LogFiles, deadline_s: float
    ) -> socket.socket:
        try:
            serial = accept_from(listener, child, deadline_s)
        except TimeoutError:
            problem = f"did not open its serial line within {deadline_s:g} s"
        else:
            if serial is not None:
                return serial
            problem = f"ended before it opened its serial line (exit status {child.poll()})"
        said = logs.tail(files.output, 8) or "(nothing)"
        raise errors.EngineUnavailable(
            f"engine {self.name}: Bochs {problem}; its last words:\n{said}",
            advice=f"packages needed: {_PACKAGES}; its settings are in {files.stem}.bochsrc beside the log",
        ).locate(engine=self.name, log_path=files.log)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a Bochs program says of itself."""

    version: str
    models: frozenset[str]
    plugins: Path | None

    @classmethod
    def of(cls, program: Path) -> _Listing:
        text = ask(program, "-help", "cpu", packages=_PACKAGES)
        version = _VERSION.search(text)
        models = frozenset(re.findall(r"^[a-z][a-z0-9_]+$", text, re.MULTILINE))
        if version is None or not models:
            raise errors.EngineUnavailable(
                f"{program} does not answer as Bochs does: {text[:200]!r}",
                advice=_INSTALL,
            )
        plugins = _PLUGINS.search(text)
        return cls(version[1], models, Path(plugins[1]) if plugins else None)


def bochs_version(log: Path) -> str:
    """The version that a log of Bochs begins with."""
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        found = _VERSION.search(file.read(4096))
        if found is not None:
            return found[1]
    return "unknown"
