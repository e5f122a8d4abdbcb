"""The session: pexpect on a machine's serial stream.

pexpect waits for what ends something (a prompt, the end of a case, a panic, the end of the stream); the
records in between are parsed from what it collected. Waiting case by case keeps its buffer short, which is
what makes a megabyte of log cheap to wait through.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import pexpect
from pexpect import fdpexpect

from vmxlab.console.log import SerialLog
from vmxlab.console.records import BrokenLine, Record, RecordReader
from vmxlab.errors import CaseError, MachineDied, MachineHung, ProtocolError, VmxlabError
from vmxlab.image.protocol import CONSOLE_FRAME, CONSOLE_PROMPT, PROTOCOL_VERSION
from vmxlab.structures import Capabilities

if TYPE_CHECKING:
    from vmxlab.engines.base import Machine

_E = TypeVar("_E", bound=VmxlabError)

_PROMPT = CONSOLE_PROMPT.encode()


_IMAGE_NAP_S = 0.001
"""Reading an image's records has no hurry: a read for each few bytes would cost more than the parsing."""


class _Event(IntEnum):
    """What is waited for."""

    END = 0
    PANIC = 1
    DONE = 2
    PROMPT = 3
    BOOT = 4
    EOF = 5
    TIMEOUT = 6


# What was found before ended at a line's end or a prompt, so the buffer starts with a line.
_EVENTS = re.compile(
    rb"(?:^|\n)(?:"
    rb"@end (?P<END>)[^\n]*\n|@panic (?P<PANIC>)[^\n]*\n|@done (?P<DONE>)[^\n]*\n|@boot (?P<BOOT>)[^\n]*\n|"
    rb"(?P<PROMPT>)" + re.escape(_PROMPT) + rb")"
)


class _Searcher:
    """What pexpect asks for the first event in its buffer, instead of a list of patterns.

    pexpect's own searcher looks through the whole buffer at each piece that comes, which takes more time than
    all else where a case has hundreds of records. This one looks at what is new.
    """

    eof_index = int(_Event.EOF)
    timeout_index = int(_Event.TIMEOUT)
    match: re.Match[bytes]
    start: int
    end: int

    def search(self, buffer: bytes, fresh: int, window: int | None = None) -> int:
        """The event that is found, or -1; `fresh` bytes at the buffer's end were not searched before."""
        # The last line that had come may have been cut, and so may its line end be an event's beginning.
        match = _EVENTS.search(buffer, max(0, buffer.rfind(b"\n", 0, len(buffer) - fresh)))
        if match is None:
            return -1
        assert match.lastgroup is not None
        self.match, (self.start, self.end) = match, match.span()
        return _Event[match.lastgroup]


class _Stream(fdpexpect.fdspawn):  # type: ignore[misc]
    """pexpect on a machine's serial socket, with every byte in the log."""

    def __init__(self, serial: socket.socket, log: SerialLog) -> None:
        super().__init__(serial.fileno(), maxread=65536, timeout=None, use_poll=True)
        self.delayafterread = None
        self.delaybeforesend = None
        self.logfile_read = log
        self.nap_s = 0.0
        """How long to wait before a read: with a stream that comes in drops, so that more comes at once."""
        self._serial = serial
        self._is_tcp = serial.family == socket.AF_INET

    def read_nonblocking(self, size: int = 1, timeout: float | None = -1) -> bytes:
        """See `fdspawn`. Acknowledges what came at once.

        Bochs sends byte by byte, and its kernel holds a byte back until the one before is acknowledged
        (Nagle's algorithm, RFC 896): with the usual delay of an acknowledgement that is 40 ms a case.
        """
        if self.nap_s:
            time.sleep(self.nap_s)
        try:
            data: bytes = super().read_nonblocking(size, timeout)
        except ConnectionResetError as error:  # an end like any other: what came before it must not be lost
            raise pexpect.EOF("the peer left without reading all that was sent to it") from error
        if self._is_tcp:
            self._serial.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


class Session:
    """A conversation with a booted monitor. Made for a running machine; `boot` comes first.

    `boot_record` and `capabilities` are known after it. Any method raises MachineDied, MachineHung,
    ProtocolError or LogError, with the last record and the log's path.
    """

    def __init__(self, machine: Machine, log: SerialLog) -> None:
        self.machine = machine
        self.log = log
        self.reader = RecordReader()
        self.records: list[Record] = []
        """Records that no case has claimed yet."""
        self.boot_record: Record | None = None
        self.capabilities: Capabilities | None = None
        self._spawn = _Stream(machine.serial, log)
        self._broken_seen = 0
        self._early: _Event | None = None

    @property
    def has_vmx(self) -> bool:
        """CPUID.1:ECX.VMX[bit 5], as the boot record tells it."""
        return self.boot_record is not None and bool(self.boot_record.number("vmx"))

    # --- life ------------------------------------------------------------------------------------------

    def boot(self, deadline_s: float) -> None:
        """Wait for the prompt of an image without cases, and keep what the monitor said of the processor."""
        limit = time.monotonic() + deadline_s
        while self._wait(limit, "the monitor's prompt") is not _Event.PROMPT:
            pass
        self._take_boot_records()
        if self.boot_record is None:
            raise self.located(ProtocolError("the monitor's prompt came without its boot record"))

    def boot_image(self, deadline_s: float) -> None:
        """Wait until the monitor of an image with cases has started; `read_cases` goes on from there."""
        event = self._wait(time.monotonic() + deadline_s, "the monitor's first record")
        self._early = None if event is _Event.BOOT else event  # where that record came damaged
        self._take_boot_records()

    def _take_boot_records(self) -> None:
        for record in self.records:
            if record.kind == "boot":
                self.boot_record = record
                if record.number("protocol") != PROTOCOL_VERSION:
                    raise self.located(
                        ProtocolError(
                            f"the image speaks protocol {record.values['protocol']}, "
                            f"this harness {PROTOCOL_VERSION:#x}",
                            advice="make the image again with this version of vmxlab",
                        )
                    )
            elif record.kind == "caps":
                self.capabilities = capabilities_from_record(record)

    # --- cases -----------------------------------------------------------------------------------------

    def run_frame(self, frame: bytes, deadline_s: float) -> list[Record]:
        """Send a frame at the prompt and give the records of the case it holds."""
        self.records = []
        limit = time.monotonic() + deadline_s
        self._send(bytes([CONSOLE_FRAME]) + frame, limit)
        while self._wait(limit, "the end of the case") is not _Event.PROMPT:
            pass
        self._refuse_damage()
        cases = self._take_cases()
        if len(cases) != 1:
            raise self.located(ProtocolError(f"one case was sent, records of {len(cases)} came back"))
        return cases[0]

    def read_cases(self, deadline_s: float) -> list[list[Record]]:
        """The records of an image's next case; empty when all are done.

        More than one where a damaged line hid the end of a case. A case whose records are damaged or
        missing is not told apart here: `run_from_records` finds that.
        """
        limit = time.monotonic() + deadline_s
        self._spawn.nap_s = _IMAGE_NAP_S
        event, self._early = self._early, None
        while event is None or event is _Event.BOOT:
            event = self._wait(limit, "the end of the next case")
        self._take_boot_records()
        if event is _Event.END:
            return self._take_cases()
        self._refuse_errors()
        return []

    def _take_cases(self) -> list[list[Record]]:
        records, self.records = self.records, []
        starts = [i for i, record in enumerate(records) if record.starts_case]
        return [records[i:j] for i, j in pairwise([*starts, len(records)])]

    def _refuse_errors(self) -> None:
        for record in self.records:
            if record.kind == "error":
                raise self.located(
                    ProtocolError(
                        f"the monitor refused what it was given: {record.values.get('what')}",
                        advice="the image is damaged or was made for another monitor; make it again",
                    )
                )

    def _refuse_damage(self) -> None:
        """Raise where lines of the stream are damaged, or the monitor refused what it was sent."""
        self._refuse_errors()
        broken = self.take_broken()
        if broken:
            raise self.located(
                ProtocolError(f"{len(broken)} lines of the serial stream are damaged; the first: {broken[0]}")
            )

    def take_broken(self) -> list[BrokenLine]:
        """The damaged lines since the last call."""
        broken = self.reader.broken[self._broken_seen :]
        self._broken_seen += len(broken)
        return broken

    def command(self, line: str, deadline_s: float) -> str:
        """Type a command at the prompt; what it printed, without the echo.

        CaseError for a line that could be mistaken for the monitor's own: one with an '@' or a line end.
        """
        if not line.isprintable() or not line.isascii() or "@" in line:
            raise CaseError(f"{line!r} is no command", advice="one line of ASCII text without '@'")
        limit = time.monotonic() + deadline_s
        self._send(line.encode("ascii") + b"\r", limit)
        text = b""
        while True:
            event = self._wait(limit, f"the prompt after {line!r}")
            text += self._before
            if event is _Event.PROMPT:
                break
        return text.decode("ascii", "replace").partition("\r\n")[2].rstrip("\r")

    # --- waiting ---------------------------------------------------------------------------------------

    _before: bytes = b""
    """What the last wait brought, less the prompt."""

    def _wait(self, limit: float, what: str) -> _Event:
        """Wait for the next event, keeping all records before it."""
        event = _Event(self._guard(lambda: self._expect(limit)))
        after = self._spawn.after if isinstance(self._spawn.after, bytes) else b""
        text = (self._spawn.before or b"") + after
        self._before = text[: -len(_PROMPT)] if event is _Event.PROMPT else text
        self.records += self.reader.feed(text)
        match event:
            case _Event.PANIC:
                raise self._died(f"the monitor panicked while the harness waited for {what}")
            case _Event.EOF:
                self.reader.close()
                raise self._died(f"the machine ended while the harness waited for {what}")
            case _Event.TIMEOUT:
                raise self._hung(
                    f"nothing more came before the deadline; the harness waited for {what}",
                    advice="the log ends where the machine got stuck; "
                    "Limits(seconds=...) gives a case more time",
                )
        return event

    def _expect(self, limit: float) -> int:
        index: int = self._spawn.expect_loop(_Searcher(), max(0.0, limit - time.monotonic()))
        return index

    def _send(self, data: bytes, limit: float) -> None:
        """Send all of it, though the machine may take it slowly."""
        serial = self.machine.serial
        serial.settimeout(max(0.1, limit - time.monotonic()))
        try:
            self._guard(lambda: serial.sendall(data))
        finally:
            serial.settimeout(None)

    def _guard(self, do: Callable[[], Any]) -> Any:
        """A stream that breaks is a machine that died."""
        try:
            return do()
        except TimeoutError as error:
            raise self._hung("the machine does not take what it is sent") from error
        except (ConnectionError, BrokenPipeError) as error:
            raise self._died("the serial stream broke") from error
        except OSError as error:
            raise self._died(f"the serial stream can't be read ({error})") from error

    def _hung(self, what: str, *, advice: str | None = None) -> MachineHung:
        with contextlib.suppress(VmxlabError):
            self.log.remark(f"deadline: {what}")
        return self.located(MachineHung(what, advice=advice))

    def _died(self, what: str) -> MachineDied:
        with contextlib.suppress(Exception):
            self.log.remark(self.machine.postmortem())
        advice = "the log's last lines say what the engine saw"
        return self.located(MachineDied(f"{what}: {self.machine.end().value}", advice=advice))

    def located(self, error: _E) -> _E:
        """The error, with this engine, the last record and the log."""
        last = self.reader.last
        return error.locate(
            engine=self.machine.info.title(),
            last_record=last.line if last else None,
            log_path=self.log.path,
        )


def capabilities_from_record(record: Record) -> Capabilities:
    """The capability MSRs of a "caps" record: keys mNNN, NNN the MSR's number."""
    return Capabilities({int(key[1:], 16): int(value, 16) for key, value in record.values.items()})
