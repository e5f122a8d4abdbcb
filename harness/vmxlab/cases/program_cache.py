"""Assembled programs kept on disk, so that a suite pays for `as` once.

A cache is never a reason to fail and never believed blindly: an entry that can't be read, is cut short or
whose checksum is off is passed over and written again; a folder that can't be written is no error. Entries
appear by rename, so processes that share the folder see whole ones only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ENTRIES_PER_FOLDER = 128
"""256 folders of as many entries of one disk block each: at most about 130 MB."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """What is kept of a program: its bytes and the addresses of its labels."""

    code: bytes
    labels: Mapping[str, int]


def default_folder() -> Path | None:
    """The user's cache folder for programs; None where there is no home to hold one."""
    from platformdirs import user_cache_path

    folder = user_cache_path("vmxlab", appauthor=False) / "programs"
    return folder if folder.is_absolute() else None


class ProgramCache:
    """The entries below one folder. With no folder it holds nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str) -> Assembled | None:
        """The program stored under `key` (a hex digest), or None."""
        if self._folder is None:
            return None
        try:
            return _decode(self._path(self._folder, key).read_bytes(), key)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, program: Assembled) -> None:
        """Store `program` under `key`; does nothing where that is not possible."""
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, _encode(program, key))
            _prune(path.parent)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / key[2:]


def _encode(program: Assembled, key: str) -> bytes:
    payload = json.dumps({"code": program.code.hex(), "labels": dict(program.labels)}).encode()
    return _checksum(key, payload) + b"\n" + payload


def _decode(entry: bytes, key: str) -> Assembled:
    checksum, _, payload = entry.partition(b"\n")
    if checksum != _checksum(key, payload):
        raise ValueError("checksum")
    fields = json.loads(payload)
    return Assembled(bytes.fromhex(fields["code"]), fields["labels"])


def _checksum(key: str, payload: bytes) -> bytes:
    """Over the key too: an entry that got another's name is not that other."""
    return hashlib.sha256(key.encode() + b"\n" + payload).hexdigest().encode()


def _write_atomically(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _prune(folder: Path) -> None:
    """Drop the older half of a folder that has grown full."""
    with os.scandir(folder) as scan:
        entries = list(scan)
    if len(entries) <= _ENTRIES_PER_FOLDER:
        return
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime_ns)[: len(entries) // 2]:
        with contextlib.suppress(OSError):
            Path(entry.path).unlink()
