"""A TCP connection from a child process of ours, and from nobody else.

Any process of the host may connect to a port of 127.0.0.1. Which one did, the kernel tells: the other end is
a socket with an inode number, and the child's descriptors say whether it holds that socket.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from pathlib import Path

from vmxlab.engines.process import Child
from vmxlab.engines.streams import peer_is_gone

# Netlink's sock_diag(7): one question, one answer, where reading /proc/net/tcp takes milliseconds.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NO_COOKIE = 0xFFFFFFFF
_EXIT_GRACE_S = 2.0
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_SOCKET_ID = struct.Struct("=2s2s16s16sIII")  # ports, addresses (network order), interface, cookie
_ANSWER_INODE = struct.Struct("=I")
_INODE_OFFSET = _HEADER.size + 4 + _SOCKET_ID.size + 16

Address = tuple[str, int]


def listen_on_loopback() -> socket.socket:
    """A listener on a free port of 127.0.0.1, for one peer."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def accept_from(listener: socket.socket, child: Child, deadline_s: float) -> socket.socket | None:
    """The connection that a child makes to a listener; those of other processes are closed.

    None if the child ended before it connected. Raises TimeoutError after the deadline.
    """
    end = time.monotonic() + deadline_s
    while True:
        if not child.wait_for(listener, end - time.monotonic()):
            if child.poll() is not None:
                return None
            raise TimeoutError
        connection, _ = listener.accept()
        if is_held_by(child.pid, connection) or _is_last_word_of(child, connection):
            # Commands to the guest are short: don't hold them back for the acknowledgement of the last.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()


def _is_last_word_of(child: Child, connection: socket.socket) -> bool:
    """Whether this may come from a child that is about to end, or has.

    Its descriptors are gone by then, and nothing can be asked any more; what it sent is still wanted. The
    kernel closes them some time before the process can be waited for.
    """
    ending = peer_is_gone(connection) or not _descriptors(child.pid)
    return ending and child.wait(_EXIT_GRACE_S) is not None


def is_held_by(pid: int, connection: socket.socket) -> bool:
    """Whether a process holds the other end of a loopback connection.

    Where the kernel does not tell (neither sock_diag nor /proc/net/tcp), it is taken on trust.
    """
    try:
        peer, own = connection.getpeername(), connection.getsockname()
    except OSError:  # the peer has gone again
        return False
    try:
        inode = _inode_by_netlink(peer, own)
    except OSError:
        try:
            inode = _inode_by_proc(peer, own)
        except OSError:
            return True
    wanted = f"socket:[{inode}]"
    for descriptor in _descriptors(pid):
        with contextlib.suppress(OSError):
            if str(descriptor.readlink()) == wanted:
                return True
    return False


def _descriptors(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def _inode_by_netlink(local: Address, remote: Address) -> int:
    identity = _SOCKET_ID.pack(
        local[1].to_bytes(2, "big"),
        remote[1].to_bytes(2, "big"),
        socket.inet_aton(local[0]),
        socket.inet_aton(remote[0]),
        0,
        _NO_COOKIE,
        _NO_COOKIE,
    )
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0) + identity
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        netlink.send(header + request)
        answer = netlink.recv(8192)
    kind = _HEADER.unpack_from(answer)[1]
    if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _INODE_OFFSET + _ANSWER_INODE.size:
        raise OSError("sock_diag knows no such socket")
    return int(_ANSWER_INODE.unpack_from(answer, _INODE_OFFSET)[0])


def _inode_by_proc(local: Address, remote: Address) -> int:
    wanted = [_as_in_proc(local), _as_in_proc(remote)]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        columns = line.split()
        if columns[1:3] == wanted:
            return int(columns[9])
    return 0


def _as_in_proc(address: Address) -> str:
    # The kernel prints the address as a 32-bit number in the host's byte order: 127.0.0.1 is 0100007F.
    host, port = address
    return f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
