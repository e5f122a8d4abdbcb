"""The serial lines of a carrier, each a stream of its own to the harness.

Bochs keeps its connections as long as it lives, but QEMUs come and go in it. So each machine gets a socket of
its own; what passes between it and the line ends at a *mark*, which the carrier's init puts into the stream
behind the last byte of a QEMU. No byte of one machine reaches the next, and none is lost before the end.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

from vmxlab.engines.carrier.disk import MARK_BYTES

_READ_BYTES = 65536
# What is waiting for Bochs stays with its sender: it takes some KiB a second.
_HELD_BACK_BYTES = 65536
_SEND_BUFFER_BYTES = 4 << 20
_COMMAND_S = 5.0


class Line:
    """One line: Bochs's socket on one side, a machine's on the other, where there is one.

    All but `pair` is for the thread of `Streams`, under its lock.
    """

    def __init__(self, outside: socket.socket, mark: bytes) -> None:
        self.outside = outside
        self.inside: socket.socket | None = None
        self.marks_seen = 0
        self._mark = mark
        self._from_bochs = b""
        self._to_machine = b""
        self._to_bochs = b""
        self._ends = False

    # --- who is behind it ------------------------------------------------------------------------------

    def attach(self) -> socket.socket:
        """A new socket for a machine; what came for the last one is dropped."""
        self.detach()
        self.inside, machine_end = socket.socketpair()
        self.inside.setblocking(False)
        self.inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._from_bochs = self._to_machine = self._to_bochs = b""
        self._ends = False
        return machine_end

    def detach(self) -> None:
        """End the machine's stream."""
        if self.inside is not None:
            self.inside.close()
            self.inside = None

    def end(self) -> None:
        """End the machine's stream behind what is still to be delivered."""
        self._ends = True
        self._deliver()

    def end_with_bochs(self) -> None:
        """As `end`: no more comes, so the start of a mark was none."""
        self._hand_on(self._from_bochs)
        self._from_bochs = b""
        self.end()
        self.detach()

    def put_mark(self) -> None:
        """Send the mark towards the carrier, in place of what waits there."""
        self._to_bochs = self._mark
        self.push()

    # --- moving bytes ----------------------------------------------------------------------------------

    def wants(self) -> list[tuple[socket.socket, int]]:
        """What to wait for."""
        wanted = [(self.outside, select.POLLIN | (select.POLLOUT if self._to_bochs else 0))]
        if self.inside is not None:
            events = select.POLLOUT if self._to_machine else 0
            if len(self._to_bochs) < _HELD_BACK_BYTES:
                events |= select.POLLIN
            wanted.append((self.inside, events))
        return wanted

    def take_from_bochs(self) -> bool:
        """Read what came. False: Bochs has gone."""
        try:
            data = self.outside.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            return False
        # Bochs sends byte by byte, each held back until the one before is acknowledged (RFC 896).
        self.outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._from_bochs += data
        self._sort()
        return True

    def take_from_machine(self) -> None:
        """Read what the harness sent; at its end nothing is behind this line any more."""
        if self.inside is None:
            return
        try:
            data = self.inside.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._to_bochs += data
            self.push()
        else:
            self.detach()

    def push(self) -> None:
        """Send what can be sent, both ways."""
        if self._to_bochs:
            with contextlib.suppress(OSError):
                self._to_bochs = self._to_bochs[self.outside.send(self._to_bochs) :]
        self._deliver()

    def _sort(self) -> None:
        """Hand on what is no part of a mark; a mark ends the stream."""
        *pieces, rest = self._from_bochs.split(self._mark)
        for piece in pieces:
            self._hand_on(piece)
            self.marks_seen += 1
            self.end()
        # The start of a mark may be the last that came.
        cut = rest.rfind(self._mark[:1], max(0, len(rest) - MARK_BYTES + 1))
        if cut < 0 or not self._mark.startswith(rest[cut:]):
            cut = len(rest)
        self._hand_on(rest[:cut])
        self._from_bochs = rest[cut:]
        self._deliver()

    def _hand_on(self, data: bytes) -> None:
        # A slow reader may still have to take what was sent before a mark; what is behind it is not its own.
        if not self._ends:
            self._to_machine += data

    def _deliver(self) -> None:
        if self.inside is None:
            self._to_machine = b""
            return
        try:
            while self._to_machine:
                self._to_machine = self._to_machine[self.inside.send(self._to_machine) :]
        except BlockingIOError:
            return
        except OSError:  # the harness has closed its end
            self.detach()
            return
        if self._ends:
            self.detach()


class Streams(threading.Thread):
    """The thread that serves a carrier's lines: serial and QMP of its QEMU, and init's own.

    `on_line` is called with each line of text that init sends; `on_end` when Bochs has gone. Both in the
    thread, without the lock.
    """

    def __init__(
        self,
        serial: socket.socket,
        monitor: socket.socket,
        control: socket.socket,
        *,
        mark: bytes,
        on_line: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="vmxlab-carrier", daemon=True)
        self.lock = threading.RLock()
        self.serial = Line(serial, mark)
        self.monitor = Line(monitor, mark)
        self._control = control
        self._text = b""
        self._on_line = on_line
        self._on_end = on_end
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        for sock in (serial, monitor, control):
            sock.setblocking(False)

    def attach(self) -> tuple[socket.socket, socket.socket]:
        """New sockets for a machine: its serial line and its QMP."""
        with self.lock:
            ends = self.serial.attach(), self.monitor.attach()
        self.poke()
        return ends

    def attach_serial(self) -> socket.socket:
        """A new socket for the serial line; QMP stays as it is."""
        with self.lock:
            end = self.serial.attach()
        self.poke()
        return end

    def put_mark(self, line: Line) -> None:
        """Send the mark down a line."""
        with self.lock:
            line.put_mark()
        self.poke()

    def command(self, word: str) -> None:
        """Send init a command. Raises OSError if Bochs has gone."""
        data = word.encode() + b"\n"
        limit = time.monotonic() + _COMMAND_S
        while data:
            with self.lock, contextlib.suppress(BlockingIOError):
                data = data[self._control.send(data) :]
            if data:
                if time.monotonic() > limit:
                    raise TimeoutError("the carrier takes no command")
                time.sleep(0.001)

    def poke(self) -> None:
        """Have the thread look again at what to wait for."""
        with contextlib.suppress(OSError):
            self._wake.send(b"!")

    def close(self) -> None:
        """End the thread, and with it every stream."""
        self._closing = True
        self.poke()
        if self.is_alive():
            self.join()
        for sock in (self.serial.outside, self.monitor.outside, self._control, self._wake, self._woken):
            sock.close()

    def run(self) -> None:
        """See `threading.Thread.run`."""
        while not self._closing and self._serve():
            pass
        with self.lock:
            self.serial.end_with_bochs()
            self.monitor.end_with_bochs()
        self._on_end()

    def _serve(self) -> bool:
        """Wait for something and do it. False: Bochs has gone."""
        poller = select.poll()
        with self.lock:
            wanted = [*self.serial.wants(), *self.monitor.wants()]
            lines = (self.serial, self.monitor)
            outside = {line.outside.fileno(): line for line in lines}
            inside = {line.inside.fileno(): line for line in lines if line.inside is not None}
        for sock, events in [*wanted, (self._control, select.POLLIN), (self._woken, select.POLLIN)]:
            if sock.fileno() >= 0:
                poller.register(sock, events)
        alive = True
        texts: list[str] = []
        ready = poller.poll()
        with self.lock:
            for descriptor, events in ready:
                can_read = events & ~select.POLLOUT
                if descriptor == self._woken.fileno():
                    self._woken.recv(4096)
                elif descriptor == self._control.fileno():
                    alive = self._take_control(texts) and alive
                elif descriptor in outside and can_read:
                    alive = outside[descriptor].take_from_bochs() and alive
                elif descriptor in inside and can_read:
                    self._take_inside(inside[descriptor], descriptor)
            self.serial.push()
            self.monitor.push()
        for text in texts:
            self._on_line(text)
        return alive

    def _take_inside(self, line: Line, descriptor: int) -> None:
        # It may have been replaced while we waited.
        if line.inside is not None and line.inside.fileno() == descriptor:
            line.take_from_machine()

    def _take_control(self, texts: list[str]) -> bool:
        try:
            data = self._control.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if data:
            self._control.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        *lines, self._text = (self._text + data).split(b"\n")
        texts += [line.decode("ascii", "replace") for line in lines]
        return bool(data)
