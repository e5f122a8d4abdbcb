"""The folder of the carriers that were built.

Each build has a folder of its own, named by what it was made of, with a manifest that holds the size and the
SHA-256 of each file. A folder appears by rename, when all in it is there; at each use the files are read and
compared, so that a damaged one is never started. One process builds at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "carrier.json"

_TEMPORARY = ".new-"
# Two checkouts with different monitors share the cache without building in turns.
_BUILDS_KEPT = 3


class Damaged(Exception):
    """A build whose files are not what its manifest says. The text says which."""


def default_folder() -> Path | None:
    """The carrier's part of the user's cache folder; None where there is no home to hold one."""
    from platformdirs import user_cache_path

    folder = user_cache_path("vmxlab", appauthor=False) / "carrier"
    return folder if folder.is_absolute() else None


class Store:
    """The builds below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._builds = folder / "builds"

    def path(self, key: str) -> Path:
        """The folder of a build, whether it is there or not."""
        return self._builds / key

    def names(self) -> list[str]:
        """The builds that are there, the last used first."""
        try:
            found = list(self._builds.iterdir())
        except FileNotFoundError:
            return []
        return [path.name for path in sorted(found, key=_last_used, reverse=True)]

    def manifest(self, key: str) -> dict[str, Any] | None:
        """What the manifest of a build says, if there is such a build; the files are not looked at."""
        try:
            manifest = json.loads((self.path(key) / MANIFEST).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def checked(self, key: str) -> dict[str, Any] | None:
        """The manifest of a build whose files are whole; None if there is no such build.

        Raises Damaged.
        """
        manifest = self.manifest(key)
        if manifest is None:
            if self.path(key).exists():
                raise Damaged(f"{self.path(key)}: there is no {MANIFEST}")
            return None
        try:
            files = manifest["files"].items()
            expected = [(name, int(state["bytes"]), str(state["sha256"])) for name, state in files]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Damaged(f"{self.path(key) / MANIFEST} can't be read") from None
        if manifest.get("key") != key or not expected:
            raise Damaged(f"{self.path(key) / MANIFEST} is not that of this build")
        for name, size, digest in expected:
            _check(self.path(key) / name, size, digest)
        with contextlib.suppress(OSError):
            os.utime(self.path(key) / MANIFEST)  # used now: see `drop_others`
        return manifest

    def add(self, key: str, made: Path, facts: Mapping[str, Any]) -> None:
        """Take the folder `made`, which lies in the store's, for the build `key`. Replaces a damaged one."""
        files = {}
        for path in sorted(made.iterdir()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        manifest = {"key": key, **facts, "files": files}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self._builds.mkdir(exist_ok=True)
        if self.path(key).exists():
            shutil.rmtree(self.path(key))
        made.rename(self.path(key))

    def drop_others(self, key: str) -> None:
        """Remove the builds that were not among the last used, and never this one."""
        others = [other for other in self.names() if other != key]
        for other in others[_BUILDS_KEPT - 1 :]:
            shutil.rmtree(self.path(other), ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Be the only one who builds, in this process or any other. Waits. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("another process builds the carrier: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder to build in, removed in the end. Needs the lock: what a killed process left goes too."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=self.folder, prefix=_TEMPORARY))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def clean(self) -> None:
        """Remove every build."""
        shutil.rmtree(self._builds, ignore_errors=True)


def _check(path: Path, size: int, digest: str) -> None:
    try:
        with path.open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise Damaged(f"{path} has {actual} bytes instead of {size}")
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise Damaged(f"{path} is not what was built (SHA-256)")
    except OSError as error:
        raise Damaged(f"{path} can't be read: {error.strerror}") from error


def _last_used(build: Path) -> int:
    try:
        return (build / MANIFEST).stat().st_mtime_ns
    except OSError:
        return 0
