"""cpio archives in the "newc" format, which the kernel unpacks as its first root file system.

The format is the one in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst: for each
file a header of hexadecimal numbers, its name and its data, each padded to 4 bytes; a file named TRAILER!!!
ends it. The same entries make the same bytes: times are 0, inodes are counted from 1.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_LIMIT = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the archive. `name` is its path without a slash in front; `mode` has type and permissions."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device file."""

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith("/") or "\0" in self.name:
            raise ValueError(f"an archive's file is named by a relative path, not {self.name!r}")

    @classmethod
    def directory(cls, name: str) -> Self:
        """A directory that everyone may read."""
        return cls(name, stat.S_IFDIR | 0o755)

    @classmethod
    def file(cls, name: str, data: bytes, *, executable: bool = False) -> Self:
        """An ordinary file."""
        return cls(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    @classmethod
    def character_device(cls, name: str, major: int, minor: int) -> Self:
        """A character device that only root may open."""
        return cls(name, stat.S_IFCHR | 0o600, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive of these entries, in this order. A directory must come before what is in it.

    Raises ValueError for a directory that is missing, a name that comes twice, a file of 4 GiB or more.
    """
    made: set[str] = set()
    parts: list[bytes] = []
    for inode, entry in enumerate(entries, 1):
        parent = entry.name.rpartition("/")[0]
        if parent and parent not in made:
            raise ValueError(f"the archive has no directory {parent!r} for {entry.name!r}")
        if entry.name in made:
            raise ValueError(f"the archive has {entry.name!r} twice")
        if len(entry.data) > _LIMIT:
            raise ValueError(f"{entry.name!r} has {len(entry.data)} bytes; a cpio archive takes {_LIMIT}")
        made.add(entry.name)
        parts += _member(inode, entry)
    parts += _member(0, Entry(_TRAILER, 0))
    return b"".join(parts)


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with each directory they need put in front of the first that needs it."""
    made: set[str] = set()
    result: list[Entry] = []
    for entry in entries:
        steps = entry.name.split("/")[:-1]
        for depth in range(1, len(steps) + 1):
            name = "/".join(steps[:depth])
            if name not in made:
                made.add(name)
                result.append(Entry.directory(name))
        if entry.name in made and stat.S_ISDIR(entry.mode):
            continue
        made.add(entry.name)
        result.append(entry)
    return result


def _member(inode: int, entry: Entry) -> list[bytes]:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % number for number in numbers) + name
    return [head, bytes(-len(head) % 4), entry.data, bytes(-len(entry.data) % 4)]
