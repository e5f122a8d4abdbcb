"""What the serial sockets of all engines need: an end that comes after the last byte."""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
import termios
import threading
import time

# A socket that holds less is not full: 200 KiB, the least that Linux gives by default when more is asked for,
# are more than 500 packets of one byte.
_MAY_BE_FULL_BYTES = 256
_DRAIN_S = 5.0
_DRAIN_STEP_S = 0.001
# What the emulator holds back comes when the reader has made room; it needs a moment for that.
_QUIET_S = 0.25


def peer_is_gone(sock: socket.socket) -> bool:
    """Whether the other end was closed, though bytes may still wait to be read."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def hang_up(sock: socket.socket) -> None:
    """End a reader's stream: it reads what is there, and then the end.

    Where the socket may be full because the reader is slow, QEMU may hold back up to 16 bytes more, which
    shutting the socket now would drop. Then the end waits until the reader has caught up, some seconds at
    most.
    """
    if _waiting_bytes(sock) < _MAY_BE_FULL_BYTES:
        _shut(sock)
    else:
        threading.Thread(target=_hang_up_when_read, args=(sock,), name="vmxlab-hang-up", daemon=True).start()


def _hang_up_when_read(sock: socket.socket) -> None:
    last_seen = time.monotonic()
    deadline = last_seen + _DRAIN_S
    while last_seen + _QUIET_S > time.monotonic() < deadline:
        if _waiting_bytes(sock):
            last_seen = time.monotonic()
        time.sleep(_DRAIN_STEP_S)
    _shut(sock)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)


def _waiting_bytes(sock: socket.socket) -> int:
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)
    except (OSError, ValueError):  # closed meanwhile
        return 0
    return count[0]
