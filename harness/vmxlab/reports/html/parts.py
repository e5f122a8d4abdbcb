"""The details of a page, packed: JSON in pieces, each compressed by itself, so that opening one is quick.

A piece is base64 of zlib, which a browser takes apart by DecompressionStream("deflate"). Nothing of what
stands in it can end the element that holds it.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Iterator

PART_BYTES = 256 * 1024
"""A piece is closed when its JSON is so long."""

Place = list[int]
"""The number of a piece, and of an item in it."""


class Parts:
    """Takes items that JSON knows, and says where each lies."""

    def __init__(self) -> None:
        self._packed: list[str] = []
        self._open: list[str] = []
        self._open_bytes = 0

    def add(self, item: object) -> Place:
        """Pack an item."""
        text = json.dumps(item, separators=(",", ":"))
        place = [len(self._packed), len(self._open)]
        self._open.append(text)
        self._open_bytes += len(text)
        if self._open_bytes >= PART_BYTES:
            self._close()
        return place

    def packed(self) -> Iterator[str]:
        """All pieces, in order; nothing may be added behind this."""
        if self._open:
            self._close()
        yield from self._packed

    def _close(self) -> None:
        self._packed.append(packed(f"[{','.join(self._open)}]"))
        self._open, self._open_bytes = [], 0


def packed(text: str) -> str:
    """Text as the page holds it. JSON is ASCII here: a lone surrogate is an escape like any other."""
    return b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")
