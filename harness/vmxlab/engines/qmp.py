"""QMP for callers that wait: a small synchronous face on qemu.qmp's asynchronous client.

The client's event loop runs in a daemon thread of its own, one for each connection. Every call has a
deadline; every failure is an error of ours: `QmpError` when the emulator refused a command, `MachineDied`
when the connection is gone, `MachineHung` when no answer came. `close` neither raises nor hangs, whatever
became of the emulator.

Events are recorded as they come and shown to one callback, in the loop's thread.

QMP specification: QEMU, docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from vmxlab import errors

_T = TypeVar("_T")
_CLOSE_S = 1.0

# The library logs a lost connection as an error of its own; without a handler Python prints that on stderr.
_LIBRARY_LOG = logging.getLogger("qemu.qmp")


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event, such as SHUTDOWN. `time_s` is the emulator's clock (seconds since 1970).

    STOP says nothing about its cause: for it, `data["status"]` holds what `query-status` said then.
    """

    name: str
    data: Mapping[str, Any]
    time_s: float


class Qmp:
    """A QMP connection over a connected socket, which it takes over.

    `title` names the machine in errors, `on_event` is called with each event (it must not call back into
    this object).
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        title: str,
        on_event: Callable[[QmpEvent], None] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self.title = title
        self.timeout_s = timeout_s
        self.version = "unknown"
        self.suspended = False  # set while the emulator's process is held by SIGSTOP
        self._sock = sock
        self._on_event = on_event
        self._events: list[QmpEvent] = []
        self._news = threading.Condition()
        self._closed = False
        self._pump: asyncio.Task[None] | None = None
        if not any(isinstance(handler, logging.NullHandler) for handler in _LIBRARY_LOG.handlers):
            _LIBRARY_LOG.addHandler(logging.NullHandler())
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: _LIBRARY_LOG.debug("%s", context.get("message")))
        self._thread = threading.Thread(target=self._loop.run_forever, name="vmxlab-qmp", daemon=True)
        self._thread.start()
        self._client = QMPClient(title.replace(".", "_"))

    # --- calls -----------------------------------------------------------------------------------------

    def connect(self, timeout_s: float | None = None) -> None:
        """Wait for the greeting and negotiate. After it `version` is the emulator's."""
        self._call("the greeting", self._connect(), timeout_s)

    def listen(self, on_event: Callable[[QmpEvent], None]) -> None:
        """Show the events from now on to another callback."""
        with self._news:
            self._on_event = on_event

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Run a command and return what it returns (a dict for most).

        Raises QmpError (refused), MachineDied (connection lost), MachineHung (no answer in time).
        """
        return self._call(command, self._client.execute(command, arguments), timeout_s)

    def human(self, line: str, *, timeout_s: float | None = None) -> str:
        """Run a line of the human monitor, such as "info registers", and return its text."""
        answer = self.execute("human-monitor-command", {"command-line": line}, timeout_s=timeout_s)
        return str(answer).replace("\r\n", "\n")

    @property
    def events(self) -> tuple[QmpEvent, ...]:
        """All events so far, oldest first."""
        with self._news:
            return tuple(self._events)

    def wait_event(self, name: str, *, since: int = 0, timeout_s: float | None = None) -> QmpEvent:
        """The first event of a name, from the `since`-th event on; waits for it. Raises MachineHung."""
        limit = self.timeout_s if timeout_s is None else timeout_s

        def found() -> QmpEvent | None:
            return next((event for event in self._events[since:] if event.name == name), None)

        with self._news:
            event = self._news.wait_for(found, limit)
        if event is None:
            raise self._locate(errors.MachineHung(f"QMP: no event {name} within {limit:g} s"))
        return event

    def close(self) -> None:
        """Disconnect and end the thread. Never raises; takes no more than about two seconds."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(BaseException):
            asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._sock.close()

    # --- in the loop's thread --------------------------------------------------------------------------

    async def _connect(self) -> None:
        await self._client.connect(self._sock)
        greeting = self._client.greeting
        if greeting is not None:
            version = greeting.QMP.version
            numbers = version.get("qemu", {})
            if isinstance(numbers, Mapping):
                self.version = ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro"))
        self._pump = asyncio.get_running_loop().create_task(self._record_events())

    async def _record_events(self) -> None:
        async for message in self._client.events:
            event = _as_event(message)
            if event.name == "STOP":
                with contextlib.suppress(QMPError, asyncio.TimeoutError):
                    answer = await asyncio.wait_for(self._client.execute("query-status"), self.timeout_s)
                    if isinstance(answer, Mapping):
                        event = QmpEvent(event.name, {**event.data, "status": answer["status"]}, event.time_s)
            # Under the lock: who sees the event finds what it brought about, and the other way round.
            with self._news:
                self._events.append(event)
                if self._on_event is not None:
                    self._on_event(event)
                self._news.notify_all()

    async def _disconnect(self) -> None:
        # An emulator that is gone makes this raise EOFError or ConnectionResetError.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), _CLOSE_S / 2)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    # --- errors ----------------------------------------------------------------------------------------

    def _call(self, what: str, coroutine: Coroutine[Any, Any, _T], timeout_s: float | None) -> _T:
        limit = self.timeout_s if timeout_s is None else timeout_s
        if self._closed or self.suspended:
            coroutine.close()
            if self._closed:
                raise self._locate(errors.MachineDied(f"QMP: {what}: the connection is closed"))
            raise self._locate(
                errors.MachineError(f"QMP: {what}: the machine is paused", advice="resume() it first")
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(limit)
        except TimeoutError:
            future.cancel()
            raise self._locate(errors.MachineHung(f"QMP: {what}: no answer within {limit:g} s")) from None
        except ExecuteError as error:
            refusal = errors.QmpError(f"QMP: {what}: {error}", command=what, error_class=error.error_class)
            raise self._locate(refusal) from error
        except (QMPError, EOFError, OSError, concurrent.futures.CancelledError) as error:
            cause = str(error) or type(error).__name__
            lost = errors.MachineDied(f"QMP: {what}: the connection is lost ({cause})")
            raise self._locate(lost) from error

    def _locate(self, error: errors.VmxlabError) -> errors.VmxlabError:
        return error.locate(engine=self.title)


def _as_event(message: Message) -> QmpEvent:
    stamp = message.get("timestamp", {})
    time_s = 0.0
    if isinstance(stamp, Mapping):
        time_s = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
    data = message.get("data", {})
    return QmpEvent(str(message["event"]), data if isinstance(data, Mapping) else {}, time_s)
