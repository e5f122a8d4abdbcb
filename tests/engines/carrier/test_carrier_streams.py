"""The serial lines of a carrier: what passes between Bochs and machines, and where it ends."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmxlab.engines.carrier.disk import MARK_BYTES
from vmxlab.engines.carrier.streams import Streams

MARK = b"\x02" + b"0123456789abcdef0123456789abcde"
PATIENCE_S = 10

assert len(MARK) == MARK_BYTES


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.settimeout(PATIENCE_S)
    return near, far


class Wires:
    """Streams with a Bochs that the test plays: `serial`, `monitor` and `control` are its ends."""

    def __init__(self) -> None:
        ours, theirs = zip(*(tcp_pair() for _ in range(3)), strict=True)
        self.serial, self.monitor, self.control = theirs
        self.lines: list[str] = []
        self.ends = 0
        self.news = threading.Condition()
        self.streams = Streams(*ours, mark=MARK, on_line=self._line, on_end=self._end)
        self.streams.start()

    def _line(self, line: str) -> None:
        with self.news:
            self.lines.append(line)
            self.news.notify_all()

    def _end(self) -> None:
        with self.news:
            self.ends += 1
            self.news.notify_all()

    def machine(self) -> socket.socket:
        """A new machine's serial socket."""
        sock = self.streams.attach_serial()
        sock.settimeout(PATIENCE_S)
        return sock

    def wait_for(self, condition: Callable[[], object]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < limit, "it did not come"
            time.sleep(0.001)

    def marks(self, count: int) -> None:
        self.wait_for(lambda: self.streams.serial.marks_seen >= count)

    def close(self) -> None:
        self.streams.close()
        for sock in (self.serial, self.monitor, self.control):
            sock.close()


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires()
    with contextlib.closing(made):
        yield made


def read_to_end(sock: socket.socket) -> bytes:
    got = b""
    while data := sock.recv(65536):
        got += data
    return got


def read_exactly(sock: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        data = sock.recv(count - len(got))
        assert data, f"the stream ended after {got!r}"
        got += data
    return got


def nothing_comes(sock: socket.socket, seconds: float = 0.05) -> bool:
    return not select.select([sock], [], [], seconds)[0]


# --- from Bochs to a machine -------------------------------------------------------------------------------


def test_bytes_arrive_and_a_mark_ends_the_stream(wires):
    with wires.machine() as machine:
        wires.serial.sendall(b"all of it" + MARK)
        assert read_to_end(machine) == b"all of it"
    wires.marks(1)


@pytest.mark.parametrize("cut", range(1, MARK_BYTES))
def test_mark_in_two_pieces_is_a_mark(wires, cut):
    with wires.machine() as machine:
        wires.serial.sendall(b"before" + MARK[:cut])
        # What is certainly no mark does not wait for the rest.
        assert read_exactly(machine, 6) == b"before"
        wires.serial.sendall(MARK[cut:])
        assert read_to_end(machine) == b""


def test_mark_byte_by_byte_is_a_mark(wires):
    with wires.machine() as machine:
        for number in b"ab" + MARK:
            wires.serial.sendall(bytes([number]))
            time.sleep(0.001)
        assert read_to_end(machine) == b"ab"


@pytest.mark.parametrize("length", [1, 2, MARK_BYTES // 2, MARK_BYTES - 1])
def test_false_start_of_a_mark_is_handed_on_with_what_follows(wires, length):
    with wires.machine() as machine:
        wires.serial.sendall(MARK[:length])
        assert nothing_comes(machine)
        wires.serial.sendall(b"!")
        assert read_exactly(machine, length + 1) == MARK[:length] + b"!"


def test_false_start_right_before_a_mark(wires):
    with wires.machine() as machine:
        for piece in (MARK[:20], MARK[:9], MARK[:31], MARK):
            wires.serial.sendall(piece)
            time.sleep(0.005)
        assert read_to_end(machine) == MARK[:20] + MARK[:9] + MARK[:31]


def test_random_bytes_in_random_pieces_pass_unchanged(wires):
    choice = random.Random(3)
    # Full of starts of marks.
    data = b"".join(MARK[: choice.randrange(MARK_BYTES)] + choice.randbytes(3) for _ in range(300))
    assert MARK not in data
    with wires.machine() as machine:
        rest = data + MARK
        while rest:
            count = choice.randrange(1, 400)
            wires.serial.sendall(rest[:count])
            rest = rest[count:]
        assert read_to_end(machine) == data


def test_what_follows_a_mark_reaches_nobody(wires):
    with wires.machine() as first:
        wires.serial.sendall(b"one" + MARK + b"between")
        assert read_to_end(first) == b"one"
    wires.marks(1)
    with wires.machine() as second:
        wires.serial.sendall(b"two" + MARK)
        assert read_to_end(second) == b"two"


def test_marks_that_come_together_are_all_counted(wires):
    with wires.machine() as machine:
        wires.serial.sendall(b"x" + MARK + MARK + b"y" + MARK)
        assert read_to_end(machine) == b"x"
    wires.marks(3)
    assert wires.streams.serial.marks_seen == 3


def test_bytes_without_a_machine_are_dropped_and_marks_still_seen(wires):
    wires.serial.sendall(b"to nobody" + MARK + b"nor this")
    wires.marks(1)
    time.sleep(0.02)
    with wires.machine() as machine:
        wires.serial.sendall(b"to somebody" + MARK)
        assert read_to_end(machine) == b"to somebody"


def test_slow_reader_gets_every_byte_and_none_from_behind_the_mark(wires):
    data = random.Random(4).randbytes(6 << 20).replace(MARK[:1], b".")
    with wires.machine() as machine:
        wires.serial.sendall(data + MARK + b"for the next one" + MARK)
        wires.marks(2)  # all has been taken from Bochs, though nobody reads
        assert read_to_end(machine) == data


def test_lines_do_not_mix(wires):
    serial, monitor = wires.streams.attach()
    with serial, monitor:
        serial.settimeout(PATIENCE_S)
        monitor.settimeout(PATIENCE_S)
        wires.serial.sendall(b"serial" + MARK)
        wires.monitor.sendall(b"monitor")
        assert read_to_end(serial) == b"serial"
        assert read_exactly(monitor, 7) == b"monitor"
        assert (wires.streams.serial.marks_seen, wires.streams.monitor.marks_seen) == (1, 0)
        monitor.sendall(b"still there")
        assert read_exactly(wires.monitor, 11) == b"still there"


def test_new_machine_ends_the_stream_of_the_old_one(wires):
    with wires.machine() as first, wires.machine() as second:
        assert read_to_end(first) == b""
        wires.serial.sendall(b"hello")
        assert read_exactly(second, 5) == b"hello"


def test_harness_that_closes_its_end_stops_nothing(wires):
    machine = wires.machine()
    wires.serial.sendall(b"x")
    read_exactly(machine, 1)
    machine.close()
    wires.serial.sendall(b"y" * 100_000 + MARK)
    wires.marks(1)
    assert wires.ends == 0
    with wires.machine() as again:
        wires.serial.sendall(b"z")
        assert read_exactly(again, 1) == b"z"


# --- from a machine to Bochs -------------------------------------------------------------------------------


def test_what_the_harness_sends_arrives_in_order_however_slowly_it_is_taken(wires):
    data = random.Random(5).randbytes(3 << 20)
    with wires.machine() as machine:
        sender = threading.Thread(target=machine.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += wires.serial.recv(1 << 17)
            time.sleep(0.0005)
        sender.join()
    assert got == data


def test_sender_is_held_back_while_bochs_takes_nothing(wires):
    with wires.machine() as machine:
        machine.setblocking(False)
        sent, quiet_since = 0, time.monotonic()
        while time.monotonic() < quiet_since + 0.2:
            with contextlib.suppress(BlockingIOError):
                sent += machine.send(b"." * 65536)
                quiet_since = time.monotonic()
            assert sent < 64 << 20
        machine.settimeout(PATIENCE_S)
        assert len(read_exactly(wires.serial, sent)) == sent


def test_mark_takes_the_place_of_what_waits(wires):
    wires.streams.serial.outside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with wires.machine() as machine:
        machine.setblocking(False)
        sent, quiet_since = 0, time.monotonic()
        while time.monotonic() < quiet_since + 0.1:
            with contextlib.suppress(BlockingIOError):
                sent += machine.send(b"." * 65536)
                quiet_since = time.monotonic()
    wires.wait_for(lambda: wires.streams.serial.inside is None)
    assert wires.streams.serial._to_bochs
    wires.streams.put_mark(wires.streams.serial)
    got = b""
    while not got.endswith(MARK):
        got += wires.serial.recv(1 << 17)
    assert got[: -len(MARK)].strip(b".") == b""
    assert len(got) < sent + len(MARK)
    assert nothing_comes(wires.serial)


def test_next_machine_does_not_send_what_the_last_one_left(wires):
    first = wires.machine()
    first.sendall(b"first")
    assert read_exactly(wires.serial, 5) == b"first"
    first.close()
    wires.streams.put_mark(wires.streams.serial)
    with wires.machine() as second:
        second.sendall(b"second")
        assert read_exactly(wires.serial, MARK_BYTES + 6) == MARK + b"second"


# --- init --------------------------------------------------------------------------------------------------


def test_command_is_a_line(wires):
    wires.streams.command("start")
    wires.streams.command("end")
    assert read_exactly(wires.control, 10) == b"start\nend\n"


def test_lines_of_init_in_any_pieces(wires):
    text = b"@carrier ready\n@carrier ended exit=1\n\n@carrier x\xffy\n"
    for number in text:
        wires.control.sendall(bytes([number]))
        time.sleep(0.0005)
    wires.control.sendall(text + b"@carrier half")
    wires.wait_for(lambda: len(wires.lines) >= 8)
    assert wires.lines == ["@carrier ready", "@carrier ended exit=1", "", "@carrier x�y"] * 2
    wires.control.sendall(b" done\n")
    wires.wait_for(lambda: len(wires.lines) == 9)
    assert wires.lines[-1] == "@carrier half done"


def test_a_carrier_that_takes_no_command_is_an_error_in_time(wires, monkeypatch):
    monkeypatch.setattr("vmxlab.engines.carrier.streams._COMMAND_S", 0.1)
    with pytest.raises(TimeoutError, match="takes no command"):
        for _ in range(1000):
            wires.streams.command("x" * 100_000)


# --- the end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["serial", "monitor", "control"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_end_of_bochs_ends_the_streams_behind_what_came_and_is_told_once(wires, which, how):
    serial, monitor = wires.streams.attach()
    with serial, monitor:
        for sock in (serial, monitor):
            sock.settimeout(PATIENCE_S)
        wires.serial.sendall(b"last words")
        wires.monitor.sendall(b"{}")
        time.sleep(0.02)
        gone = getattr(wires, which)
        if how == "reset":
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        assert read_to_end(serial) == b"last words"
        assert read_to_end(monitor) == b"{}"
        wires.wait_for(lambda: wires.ends)
        wires.streams.join(PATIENCE_S)
        assert not wires.streams.is_alive()
    wires.streams.close()
    assert wires.ends == 1


def test_start_of_a_mark_is_handed_on_when_bochs_ends(wires):
    with wires.machine() as machine:
        wires.serial.sendall(b"last" + MARK[:7])
        time.sleep(0.02)
        wires.serial.close()
        assert read_to_end(machine) == b"last" + MARK[:7]


def test_command_after_the_end_of_bochs_is_an_error(wires):
    wires.control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wires.control.close()
    wires.wait_for(lambda: wires.ends)
    with pytest.raises(OSError):
        wires.streams.command("start")


def test_close_ends_everything_and_may_come_early():
    wires = Wires()
    serial, monitor = wires.streams.attach()
    with serial, monitor:
        serial.settimeout(PATIENCE_S)
        wires.close()
        assert serial.recv(1) == b""
        assert monitor.recv(1) == b""
    assert wires.ends == 1
    assert not [thread for thread in threading.enumerate() if thread is wires.streams]


def test_machine_that_is_attached_while_the_thread_waits_is_served_at_once(wires):
    for number in range(50):
        with wires.machine() as machine:
            machine.sendall(b"%02d" % number)
            assert read_exactly(wires.serial, 2) == b"%02d" % number
            wires.serial.sendall(b"ok" + MARK)
            assert read_to_end(machine) == b"ok"
