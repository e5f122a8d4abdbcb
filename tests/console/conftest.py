"""A machine made of a pair of sockets, for the harness to talk to; the other end is the test's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vmxlab.console.log import SerialLog
from vmxlab.console.session import Session
from vmxlab.engines.base import EngineInfo, MachineEnd
from vmxlab.image.protocol import PROTOCOL_VERSION

INFO = EngineInfo("paper", "1.0", "model-x", "the test says so")
PROMPT = b"vmx> "


@dataclass
class PaperMachine:
    """What a session needs of `vmxlab.engines.base.Machine`."""

    serial: socket.socket
    info: EngineInfo = INFO
    ending: MachineEnd = MachineEnd.RUNNING
    calls: list[str] = field(default_factory=list)

    def end(self) -> MachineEnd:
        return self.ending

    def postmortem(self) -> str:
        self.calls.append("postmortem")
        return "the evidence\nin two lines"

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def nested_entries(self) -> int | None:
        return None

    def stop(self) -> None:
        self.calls.append("stop")
        self.serial.close()


class Peer:
    """The monitor's end of the serial line, played by a test.

    Each `send` arrives as one piece, however the harness reads: the sockets keep the limits of messages.
    """

    def __init__(self, end: socket.socket, machine: PaperMachine) -> None:
        self.socket = end
        self.machine = machine

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            if piece:
                self.socket.send(piece)

    def hang_up(self, end: MachineEnd = MachineEnd.TRIPLE_FAULT) -> None:
        self.machine.ending = end
        self.socket.close()

    def received(self) -> bytes:
        return self.socket.recv(1 << 20, socket.MSG_DONTWAIT)


@pytest.fixture
def paper() -> tuple[type[Peer], type[PaperMachine]]:
    """The two classes, for sockets of another kind."""
    return Peer, PaperMachine


@pytest.fixture
def serial_pair() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """serial_pair() -> two ends whose messages stay apart; closed after the test."""
    made: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.close()


@pytest.fixture
def peer(serial_pair) -> Peer:
    """The other end of `session`."""
    mine, theirs = serial_pair()
    return Peer(mine, PaperMachine(theirs))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SerialLog]:
    """A serial log in a fresh folder."""
    made = SerialLog(tmp_path / "logs")
    yield made
    made.close()


@pytest.fixture
def session(peer: Peer, log: SerialLog) -> Session:
    """A session with the machine that `peer` plays."""
    return Session(peer.machine, log)


@pytest.fixture
def open_session(serial_pair, log) -> Callable[[], tuple[Session, Peer]]:
    """open_session() -> (session, peer), as often as wanted; they share the log."""

    def make() -> tuple[Session, Peer]:
        mine, theirs = serial_pair()
        peer = Peer(mine, PaperMachine(theirs))
        return Session(peer.machine, log), peer

    return make


@pytest.fixture
def record() -> Callable[..., bytes]:
    """record(kind, **values) -> the bytes of its line."""
    from vmxlab.console.records import encode_record

    return lambda kind, **values: encode_record(kind, values).encode() + b"\r\n"


@pytest.fixture
def boot_text(record) -> Callable[..., bytes]:
    """boot_text() -> what a monitor says until its first prompt."""

    def make(*, vmx: int = 1, protocol: int = PROTOCOL_VERSION, prompt: bytes = b"\r\n" + PROMPT) -> bytes:
        boot = record("boot", protocol=protocol, loader="rom", maxphyaddr=40, vmx=vmx)
        caps = record("caps", m480=0xDA_0400_0000_002B, m481=0x7F_0000_0016)
        return b"some text\r\n" + boot + (caps if vmx else b"") + prompt

    return make


@pytest.fixture
def case_text(record) -> Callable[..., bytes]:
    """case_text(number, reasons) -> the records of a case that exits for these reasons."""

    def make(
        number: int = 0, reasons: tuple[int, ...] = (12,), *, why: str = "stop", name: str = ""
    ) -> bytes:
        named = {"name": name} if name else {}
        lines = [record("case", id=number, **named), record("vmx", ok="vmxon,vmclear,vmptrld,vmwrite:0x5f")]
        for n, reason in enumerate(reasons):
            entered = {} if n else {"by": "vmlaunch"}
            lines.append(record("exit", n=n, **entered, reason=reason, rip=0x8000 + n))
        return b"".join([*lines, record("end", id=number, why=why, exits=len(reasons))])

    return make


@pytest.fixture
def full_log(log: SerialLog) -> Iterator[SerialLog]:
    """A log on a device without space."""
    log.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        log._file = full
        yield log
