"""The host's apt-get and dpkg-deb, run for the carrier.

They run without root and install nothing: apt gets an empty list of installed packages and a folder of ours
for all that it writes. What goes wrong is an EngineUnavailable that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vmxlab import errors
from vmxlab.engines.logs import last_lines
from vmxlab.engines.process import spawn

ENGINE = "kvm-in-bochs"

NEEDED_MB = 250
"""What the cache may take while a carrier is built: 165 MB with Debian 12, and older carriers."""

TOOLS = ("apt-get", "dpkg-deb")

_WAIT_S = 60.0
_FULL_BYTES = 1 << 20
_LINES_SHOWN = 6
_NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded|enough free space")
_CONTAINER_ADVICE = (
    'run it in a Debian container, such as: docker run --rm -v "$PWD":/vmxlab -w /vmxlab debian:12; '
    "or take another engine: --engine bochs"
)


class ToolFailed(errors.EngineUnavailable):
    """apt-get or dpkg-deb ended with an error; `output` is the end of what it said."""

    output: str = ""


def unavailable(message: str, *, advice: str | None) -> errors.EngineUnavailable:
    """An error of the carrier, with the engine's name in it."""
    return errors.EngineUnavailable(message, advice=advice).locate(engine=ENGINE)


def missing_tools() -> list[str]:
    """Which of the tools are not on PATH."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def not_debian(missing: Sequence[str]) -> errors.EngineUnavailable:
    """The error for a host without Debian's tools."""
    return unavailable(
        f"the carrier is built of Debian's packages, and this host has no {' and no '.join(missing)}",
        advice=_CONTAINER_ADVICE,
    )


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """Run a tool in a folder and wait for its end; the last lines it printed, on both streams.

    The tool dies with us, and is ended when we are interrupted. Raises ToolFailed where it fails, OSError
    (ENOSPC) where that is for want of space, EngineUnavailable where it can't be started.
    """
    if shutil.which(command[0]) is None:
        raise not_debian([command[0]])
    output = _free_name(folder, command[0])
    child = spawn(command, engine=ENGINE, output=output, environment={"LC_ALL": "C", **(environment or {})})
    try:
        while (status := child.wait(_WAIT_S)) is None:
            pass
    finally:
        child.kill()
        child.close()
    lines = last_lines(output)
    if status == 0:
        return lines
    said = "\n".join(line for line in lines if line.strip())
    # On a full disk the tool's own words may not have been written either.
    if _NO_SPACE.search(said) or shutil.disk_usage(folder).free < _FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    shown = "\n".join(said.splitlines()[-_LINES_SHOWN:])
    ended = f"failed with status {status}" if status > 0 else f"was ended by signal {-status}"
    problem = ToolFailed(f"{command[0]} {ended}:\n{shown}" if shown else f"{command[0]} {ended}")
    problem.output = shown
    raise problem.locate(engine=ENGINE)


def _free_name(folder: Path, tool: str) -> Path:
    return next(path for n in itertools.count(1) if not (path := folder / f"{tool}-{n}.out").exists())


# --- the cache folder ---------------------------------------------------------------------------------------


def no_space(folder: Path) -> errors.EngineUnavailable:
    """The error for a file system that is full."""
    return unavailable(
        f"there is no space left in {folder}: building the carrier takes up to {NEEDED_MB} MB",
        advice="free some space there, or name another cache folder: XDG_CACHE_HOME=/elsewhere",
    )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system below the cache folder refuses into one clear error."""
    try:
        yield
    except errors.LogError as error:
        # The output of a tool lies there as well.
        cause = error.__cause__
        raise _disk_error(folder, cause if isinstance(cause, OSError) else OSError(str(error))) from error
    except OSError as error:
        raise _disk_error(folder, error) from error


def _disk_error(folder: Path, error: OSError) -> errors.EngineUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(folder)
    where = error.filename or folder
    why = os.strerror(error.errno) if error.errno else str(error)
    return unavailable(
        f"the cache folder of the carrier, {folder}, can't be used: {where}: {why}",
        advice="make it writable for this user, or name another cache folder: XDG_CACHE_HOME=/elsewhere",
    )
