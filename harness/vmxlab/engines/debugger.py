"""A debugger for the machine: QEMU's gdb stub, or the prompt of Bochs's own debugger.

Which of the two an engine has, `Engine.debug` says. A prompt needs a terminal: the harness's own, or one that
connects to a socket, where the harness keeps its own for itself.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vmxlab.engines.logs import log_error
from vmxlab.errors import EngineUnavailable
from vmxlab.image.monitor import monitor_symbols

if TYPE_CHECKING:
    from vmxlab.engines.process import Child

GDB_SOCKET = "gdb.sock"
"""In the log directory; the same for each machine that is booted there."""

_PROMPT_SOCKET = "debugger.sock"
_BOCHS_SYMBOLS = "monitor.sym"
_MAX_SOCKET_PATH = 100
"""The kernel takes 107 bytes."""

GDB_ARGUMENTS = (
    *("-chardev", f"socket,id=gdb,path={GDB_SOCKET},server=on,wait=off"),
    *("-gdb", "chardev:gdb"),
)
"""For a QEMU that runs in the log directory."""


def gdb_command(log_dir: Path) -> str:
    """The shell command that attaches gdb, with the monitor's symbols. ImageError where there are none."""
    symbols = monitor_symbols()
    command = ["gdb"]
    if symbols.sources is not None:
        command += ["-d", str(symbols.sources)]
    path = log_dir / GDB_SOCKET
    short = len(str(path)) <= _MAX_SOCKET_PATH
    command += ["-ex", f"target remote {path if short else GDB_SOCKET}", str(symbols.file)]
    return shlex.join(command) if short else f"cd {shlex.quote(str(log_dir))} && {shlex.join(command)}"


def write_bochs_symbols(log_dir: Path) -> Path:
    """Write the monitor's symbols as Bochs reads them ("address name" lines), for `ldsym`; where they are.

    Raises ImageError where there is no monitor, LogError where the folder can't be written.
    """
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    with monitor_symbols().file.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        kinds = ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE")
        assert isinstance(table, SymbolTableSection)
        symbols = [s for s in table.iter_symbols() if s.name and s["st_info"]["type"] in kinds]
    path = log_dir / _BOCHS_SYMBOLS
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{s['st_value']:x} {s.name}\n" for s in symbols))
    except OSError as error:
        raise log_error(path, error) from error
    return path


class DebuggerTerminal(ABC):
    """Where a debugger's prompt goes. `child` is the process that has it."""

    child: Child | None = None

    @abstractmethod
    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[int, int]]:
        """Descriptors for standard input and output of the debugger's process, while it is started."""

    def interrupt(self) -> None:
        """What Ctrl-C is at that prompt: the machine stops there."""
        if self.child is not None:
            self.child.signal(signal.SIGINT)

    def close(self) -> None:  # noqa: B027  (most keep nothing)
        """Give back what is held for it."""


class OwnTerminal(DebuggerTerminal):
    """The terminal of this process."""

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[int, int]]:
        """See `DebuggerTerminal.ends`."""
        sys.stdout.flush()
        yield sys.stdin.fileno(), sys.stdout.fileno()


class SocketTerminal(DebuggerTerminal):
    """Whoever connects to a socket in the log directory: `tell` is called with the command that does."""

    def __init__(self, log_dir: Path, tell: Callable[[str], None]) -> None:
        self.path = log_dir / _PROMPT_SOCKET
        self._tell = tell
        self._listener: socket.socket | None = None

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[int, int]]:
        """See `DebuggerTerminal.ends`. Waits for someone to connect. Raises EngineUnavailable, LogError."""
        if self._listener is None:
            self._listener = self._listening()
        self._tell(f"the debugger's prompt waits for a terminal: nc -U {shlex.quote(str(self.path))}")
        connection, _ = self._listener.accept()
        with connection:
            yield connection.fileno(), connection.fileno()

    def _listening(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(self.path))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise EngineUnavailable(
                f"there can be no socket for the debugger's prompt at {self.path}: {error}",
                advice="name a folder for the logs with a short path, --log-dir",
            ) from error
        return listener

    def close(self) -> None:
        """See `DebuggerTerminal.close`."""
        if self._listener is not None:
            self._listener.close()
            self.path.unlink(missing_ok=True)
