"""Records: the machine-readable lines of a serial log.

    @exit n=0x0 reason=0x1e qual=0x600000 len=0x2 rip=0x8000 rax=0x1*7c01

A record starts with '@' and a kind, goes on with key=value pairs and ends with '*' and the CRC-16/XMODEM of
what stands between '@' and '*'. All other text is for people. A line that was meant as a record and does not
check is a `BrokenLine`: counted, shown, never taken for data.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_CRC_BYTES = 5  # '*' and four hexadecimal digits
_RECORD = re.compile(rb"@[a-z]+( [a-z0-9]+=[^ =*]+)*\*[0-9a-f]{4}$")
# Whatever begins or ends as a record does was meant as one, or was one before a byte of it was lost. What the
# harness remarks is text, such as registers in the words of an emulator, unless it begins as a record.
_SUSPECT = re.compile(
    rb"^(?:vmx> |# )?@(?:[a-z]|$)|^(?!# )(?:.*\*[0-9a-f]{4}$|.*\w=0x[0-9a-f]+ \w+=0x)", re.DOTALL
)


class Record(NamedTuple):
    """One record: its kind, its values (text as it stands), and the line it was (without its end)."""

    kind: str
    values: Mapping[str, str]
    line: str

    def number(self, key: str, default: int | None = None) -> int:
        """The value of `key` as a number; `default` where the record has no such key (else KeyError)."""
        text = self.values.get(key)
        if text is None:
            if default is None:
                raise KeyError(key)
            return default
        return int(text, 16)

    @property
    def starts_case(self) -> bool:
        """Whether a case, or a command of a live session, begins here; the record "end" ends both."""
        return self.kind in ("case", "live")

    def __str__(self) -> str:
        return self.line


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that looks like a record and does not check. `number` counts the machine's lines from 1."""

    number: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.why}: {self.text!r}"


def damage_of(line: bytes) -> str | None:
    """Why a line (without its end) that holds no record is damage; None where it is text for people."""
    if not _SUSPECT.search(line):
        return None
    return "the checksum does not fit" if _RECORD.search(line) else "not a whole record"


def parse_line(line: bytes) -> Record | None:
    """The record in a line (without its end); None where the line holds none, or a damaged one."""
    start = line.find(b"@")
    if start < 0 or line[-_CRC_BYTES:-4] != b"*":
        return None
    try:
        if line[-4:] != b"%04x" % crc_hqx(line[start + 1 : -_CRC_BYTES], 0):
            return None
        text = line[start:].decode("ascii")
        words = text[1:-_CRC_BYTES].split(" ")
        return Record(words[0], dict([word.split("=", 1) for word in words[1:]]), text)
    except ValueError:
        return None


@dataclass(slots=True)
class RecordReader:
    """Takes the serial stream in pieces and gives its records in order; keeps what it could not read.

    `broken`: lines that were meant as records and do not check. `last`: the last record seen. `lines`: how
    many lines there were.
    """

    broken: list[BrokenLine] = field(default_factory=list)
    last: Record | None = None
    lines: int = 0
    _rest: bytes = b""

    def feed(self, piece: bytes) -> Iterator[Record]:
        """The records that `piece` completes."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        for line in whole:
            record = self._line(line)
            if record is not None:
                yield record

    def close(self) -> None:
        """The stream has ended: a line without its end is a broken one, if it was meant as a record."""
        rest, self._rest = self._rest, b""
        if rest and _SUSPECT.search(rest):
            self.lines += 1
            self._break(rest, "cut short")

    def _line(self, line: bytes) -> Record | None:
        self.lines += 1
        line = line.rstrip(b"\r")
        record = parse_line(line)
        if record is not None:
            self.last = record
        elif (why := damage_of(line)) is not None:
            self._break(line, why)
        return record

    def _break(self, line: bytes, why: str) -> None:
        self.broken.append(BrokenLine(self.lines, line.decode("ascii", "backslashreplace"), why))


def encode_record(kind: str, values: Mapping[str, str | int]) -> str:
    """The line of a record, as the monitor would write it (without its end)."""
    words = [kind] + [f"{k}={v:#x}" if isinstance(v, int) else f"{k}={v}" for k, v in values.items()]
    body = " ".join(words)
    return f"@{body}*{crc_hqx(body.encode('ascii'), 0):04x}"


def parse_log(log: bytes) -> tuple[list[Record], list[BrokenLine]]:
    """All records of a whole log, and all broken lines."""
    reader = RecordReader()
    records = list(reader.feed(log))
    reader.close()
    return records, reader.broken
