"""The files that an engine writes, and what to say when they can't be written."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from vmxlab import errors

_TAIL_BYTES = 256 << 10

_ADVICE = {
    errno.ENOSPC: "free some space there, or name another directory for the logs",
    errno.EDQUOT: "the disk quota is used up: remove old logs, or name another directory for them",
    errno.EROFS: "the file system is read-only: name another directory for the logs",
    errno.EACCES: "make the directory writable for this user, or name another one for the logs",
    errno.EPERM: "make the directory writable for this user, or name another one for the logs",
}
_OTHER_ADVICE = "name another directory for the logs"


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The files of one machine: `directory`/`stem`.log and others with the same stem."""

    directory: Path
    stem: str

    @property
    def log(self) -> Path:
        """The engine's own log."""
        return self.directory / f"{self.stem}.log"

    @property
    def output(self) -> Path:
        """What the process wrote to its standard output and error."""
        return self.directory / f"{self.stem}.out"

    def write(self, suffix: str, text: str) -> Path:
        """Write a small file beside the log. Raises LogError."""
        path = self.directory / f"{self.stem}{suffix}"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise log_error(path, error) from error
        return path


def claim(directory: Path, engine: str) -> LogFiles:
    """Take the first free number in a directory: "bochs-1", "bochs-2", ...

    Nothing that lies there is overwritten, and two processes that share the directory never get the same
    number. Raises LogError.
    """
    directory = directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise log_error(directory, error) from error
    for number in itertools.count(1):
        files = LogFiles(directory, f"{engine}-{number}")
        try:
            os.close(os.open(files.log, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        except FileExistsError:
            continue
        except OSError as error:
            raise log_error(files.log, error) from error
        return files
    raise AssertionError("unreachable")


def log_error(path: Path, error: OSError) -> errors.LogError:
    """The LogError for a file that can't be written."""
    advice = _ADVICE.get(error.errno or 0, _OTHER_ADVICE)
    problem = errors.LogError(f"the log {path} can't be written: {error.strerror or error}", advice=advice)
    problem.locate(log_path=path)
    return problem


def tail(path: Path, lines: int) -> str:
    """The last lines of a log; empty if there is none. Reads a bounded part of a large file."""
    return "\n".join(last_lines(path)[-lines:])


def last_lines(path: Path) -> list[str]:
    """All lines within the last 256 KiB of a log; none if it can't be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = text.splitlines()
    return found[1:] if size > _TAIL_BYTES else found
