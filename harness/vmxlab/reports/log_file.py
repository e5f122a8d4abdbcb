"""The bytes of a serial log: of a file, or of standard input as they come."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vmxlab.errors import LogError

_PIECE_BYTES = 1 << 16


def read_log(path: Path) -> Iterator[bytes]:
    """The pieces of a log; "-" is standard input, piece by piece as it comes. Raises LogError."""
    descriptor = None
    try:
        if str(path) == "-":
            descriptor = os.dup(sys.stdin.fileno())
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        while piece := os.read(descriptor, _PIECE_BYTES):
            yield piece
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _unreadable(path: Path, error: OSError | ValueError) -> LogError:
    name = "standard input" if str(path) == "-" else str(path)
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return LogError(
        f"the log {name} can't be read: {why}",
        advice="name a file that the monitor's serial line was written to, or - for standard input",
    )
