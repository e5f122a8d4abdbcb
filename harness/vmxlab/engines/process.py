"""Processes that can't outlive the harness.

Each one gets a session of its own (the terminal's Ctrl-C does not reach it), no standard input, and its
output in a file. The kernel kills it when the harness ends in whatever way, SIGKILL included
(PR_SET_PDEATHSIG).

That signal comes when the *thread* that forked ends, not the process: so one thread, which lives as long as
this process does, starts them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from vmxlab import errors
from vmxlab.engines.logs import log_error

_PR_SET_PDEATHSIG = 1
# Without pidfd (Linux before 5.3) the end of a process is polled for.
_POLL_STEP_S = 0.01
_ASK_S = 20.0

# The harness may die between the fork and the request for the signal: then the parent is another one already,
# and the program does not run at all. $0 is the harness's pid.
_ONLY_WITH_PARENT = 'test "$PPID" = "$0" && exec "$@"'


class Process(Protocol):
    """What a machine needs of the process that runs it."""

    command: tuple[str, ...]
    pid: int

    def poll(self) -> int | None:
        """Exit status; minus the signal's number if one ended it; None while it runs."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end, at most so long. As `poll`."""

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal. False if it had ended."""

    def kill(self) -> None:
        """End it."""

    def close(self) -> None:
        """Give back what is held for it."""


class Child:
    """A process of ours. `command` is what it runs; `pid` is its own, as all wrappers exec it."""

    def __init__(self, process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
        self.command = tuple(command)
        self.pid = process.pid
        self._process = process
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except (AttributeError, OSError):
            self._pidfd = -1

    def poll(self) -> int | None:
        """Exit status; minus the signal's number if one ended it; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end, at most so long. As `poll`."""
        self.wait_for(None, timeout_s)
        return self.poll()

    def wait_for(self, sock: socket.socket | None, timeout_s: float) -> bool:
        """Wait until a socket can be read (True), or the process ended or time is over (False)."""
        end = time.monotonic() + timeout_s
        poller = select.poll()
        if sock is not None:
            poller.register(sock, select.POLLIN)
        if self._pidfd >= 0:
            poller.register(self._pidfd, select.POLLIN)
        while True:
            left = max(0.0, end - time.monotonic())
            step = left if self._pidfd >= 0 else min(left, _POLL_STEP_S)
            ready = {fd for fd, _ in poller.poll(step * 1000)}
            if sock is not None and sock.fileno() in ready:
                return True
            if self.poll() is not None or time.monotonic() >= end:
                return False

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to it alone. False if it had ended."""
        if self.poll() is not None:
            return False
        self._process.send_signal(number)
        return True

    def kill(self) -> None:
        """SIGKILL its whole session and wait for it. Nothing happens if it ended before."""
        if self.poll() is None:
            # Not reaped yet, so the number is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Give back the descriptor. The process must have ended."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def find_program(names: Sequence[str], *, engine: str, packages: str) -> Path:
    """The first of these programs that is on PATH. Raises EngineUnavailable, which says how to get it."""
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise errors.EngineUnavailable(
        f"engine {engine}: there is no program {' or '.join(names)} on PATH",
        advice=f"on Debian or Ubuntu: apt-get install {packages}",
    ).locate(engine=engine)


def ask(program: Path, *arguments: str, packages: str) -> str:
    """What a program prints (both streams) when run with these arguments; asked once for each program file.

    Raises EngineUnavailable if it does not run.
    """
    try:
        # A program that is replaced while we run is asked again.
        state = program.stat()
        return _answer(program, arguments, state.st_mtime_ns, state.st_size)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise errors.EngineUnavailable(
            f"{program} does not run: {error}", advice=f"on Debian or Ubuntu: apt-get install {packages}"
        ) from error


@functools.lru_cache(maxsize=16)
def _answer(program: Path, arguments: tuple[str, ...], changed_ns: int, size: int) -> str:
    del changed_ns, size
    done = subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_ASK_S,
    )
    return done.stdout.decode("utf-8", "replace")


def spawn(
    command: Sequence[str],
    *,
    engine: str,
    output: Path,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    terminal: tuple[int, int] | None = None,
) -> Child:
    """Start a process in the directory of its output file.

    `environment` is added to our own. `terminal` are descriptors for its standard input and output; without
    them it has no input, and writes into the file. Raises LogError if the output file can't be made,
    EngineUnavailable if there is no starting the process.
    """
    try:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise log_error(output, error) from error
    wrapped, before_exec = _tied_to_us(command)

    def start() -> Child:
        process = subprocess.Popen(
            wrapped,
            stdin=subprocess.DEVNULL if terminal is None else terminal[0],
            stdout=sink if terminal is None else terminal[1],
            stderr=sink,
            cwd=output.parent,
            env={**os.environ, **(environment or {})},
            pass_fds=pass_fds,
            start_new_session=True,
            preexec_fn=before_exec,
        )
        return Child(process, command)

    try:
        return _spawner(os.getpid()).run(start)
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.EngineUnavailable(
            f"engine {engine}: {command[0]} can't be started: {error}",
            advice="see whether the program runs by hand, and whether memory and processes are left",
        ).locate(engine=engine) from error
    finally:
        os.close(sink)


def _tied_to_us(command: Sequence[str]) -> tuple[list[str], Callable[[], None] | None]:
    """The command so wrapped that it dies with us; or a function that does so between fork and exec.

    util-linux's setpriv is the better way: code of ours between fork and exec runs in the copy of a process
    with threads. BusyBox's setpriv knows no --pdeathsig.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is not None and Path(setpriv).resolve().name == "setpriv":
        guard = ["/bin/sh", "-c", _ONLY_WITH_PARENT, str(os.getpid())]
        return [setpriv, "--pdeathsig", "KILL", "--", *guard, *command], None

    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return list(command), before_exec


class _Spawner:
    """The thread that forks. It is a daemon: it ends with the process, and its children with it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Child], Future[Child]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="vmxlab-spawner", daemon=True).start()

    def run(self, start: Callable[[], Child]) -> Child:
        future: Future[Child] = Future()
        self._jobs.put((start, future))
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit):
            # The child may come into being after all, and nobody would know it.
            future.add_done_callback(_kill_orphan)
            raise

    def _serve(self) -> None:
        while True:
            start, future = self._jobs.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)


def _kill_orphan(future: Future[Child]) -> None:
    if future.exception() is None:
        future.result().kill()


@functools.lru_cache(maxsize=1)
def _spawner(pid: int) -> _Spawner:
    # One for each process: a fork of the harness has no thread but the forking one. The cache drops the
    # parent's spawner then, whose thread does not exist there.
    del pid
    return _Spawner()
