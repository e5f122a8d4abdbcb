"""A stream as numbered lines, whatever is in it: never more than so much of one line is held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

LONGEST_BYTES = 1 << 20
"""The longest line that is read as one. The monitor's have 1 KiB, remarks of code 10 KiB."""

SHOWN_CHARACTERS = 2000

_ERASED = re.compile(r"[^\x08]\x08 \x08")


class Line(NamedTuple):
    """A line without its end; `lost`: how many of its bytes were too many. `whole`: it has its end."""

    number: int
    content: bytes
    lost: int = 0
    whole: bool = True


@dataclass(slots=True)
class LineReader:
    """Cuts a stream into lines, piece by piece."""

    number: int = 1
    _rest: bytes = b""
    _lost: int = 0

    def feed(self, piece: bytes) -> Iterator[Line]:
        """The lines that `piece` completes."""
        *whole, rest = piece.split(b"\n")
        for part in whole:
            self._add(part)
            yield self._take(whole=True)
        self._add(rest)

    def close(self) -> Line | None:
        """What is left without an end, if anything is."""
        return self._take(whole=False) if self._rest or self._lost else None

    def _add(self, part: bytes) -> None:
        room = LONGEST_BYTES - len(self._rest)
        self._rest += part[:room]
        self._lost += max(0, len(part) - room)

    def _take(self, *, whole: bool) -> Line:
        content = self._rest.removesuffix(b"\r") if not self._lost else self._rest
        line = Line(self.number, content, self._lost, whole)
        self._rest, self._lost = b"", 0
        self.number += whole
        return line


def readable(content: bytes, lost: int = 0) -> str:
    """Bytes as text that does nothing to a terminal; what is too long to be shown is counted."""
    text = content.decode("utf-8", "backslashreplace")
    while len(text) <= SHOWN_CHARACTERS and _ERASED.search(text):  # keys that were taken back at the prompt
        text = _ERASED.sub("", text)
    text = text.expandtabs()
    shown = "".join(c if c.isprintable() else _escape(c) for c in text[:SHOWN_CHARACTERS])
    more = len(text) - SHOWN_CHARACTERS + lost
    return f"{shown} ... ({more} more)" if more > 0 and len(text) + lost > SHOWN_CHARACTERS else shown


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
