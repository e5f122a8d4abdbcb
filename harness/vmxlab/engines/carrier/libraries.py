"""Which shared libraries a program needs, without running anything: the host may be another architecture.

A dynamic ELF file names the libraries it needs (DT_NEEDED) and the loader (PT_INTERP); each library names
more of them (System V ABI, "Dynamic Section").
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmxlab.engines.carrier.tools import unavailable

LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64", "lib", "usr/lib")
"""Where Debian's packages have libraries, before and after /usr was merged."""

_LINKS_FOLLOWED = 8


@dataclass(frozen=True, slots=True)
class Needs:
    """What an ELF file asks for."""

    libraries: tuple[str, ...]
    """Names of libraries, as in DT_NEEDED."""
    loader: str | None
    """Path of the loader; None for a library."""


@dataclass(frozen=True, slots=True)
class Closure:
    """All that a program needs."""

    loader: str | None
    found: dict[str, Path]
    missing: tuple[str, ...]


def needs_of(content: bytes, name: str) -> Needs:
    """What this ELF file needs. Raises EngineUnavailable for what is none for x86-64; `name` is for that."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    try:
        elf = ELFFile(io.BytesIO(content))
        if elf["e_machine"] != "EM_X86_64":
            raise unavailable(f"{name} is not for x86-64 but {elf['e_machine']}", advice=None)
        libraries: list[str] = []
        loader = None
        for segment in elf.iter_segments():
            if isinstance(segment, DynamicSegment):
                tags: Any = segment.iter_tags("DT_NEEDED")
                libraries += [tag.needed for tag in tags]
            elif isinstance(segment, InterpSegment):
                loader = segment.get_interp_name()
    except (ELFError, ValueError, KeyError, AttributeError) as error:
        raise unavailable(
            f"{name} is no ELF file: {error}",
            advice="remove what is cached and try again: vmxlab carrier --clean",
        ) from error
    return Needs(tuple(libraries), loader)


def find_library(tree: Path, name: str) -> Path | None:
    """The file of a library in a tree of unpacked packages; links are followed within the tree."""
    for folder in LIBRARY_FOLDERS:
        path = follow(tree, f"{folder}/{name}")
        if path is not None:
            return path
    return None


def follow(tree: Path, name: str) -> Path | None:
    """The ordinary file that a path in a tree leads to; absolute links are the tree's own. None for none."""
    path = tree / name
    for _ in range(_LINKS_FOLLOWED):
        if not path.is_symlink():
            return path if path.is_file() else None
        target = path.readlink()
        path = tree / target.relative_to("/") if target.is_absolute() else path.parent / target
    return None


def closure(program: Path, find: Callable[[str], Path | None]) -> Closure:
    """What a program needs, directly and through its libraries; `find` says where a library is.

    Libraries come in the order in which they are first named. Those that `find` has not are `missing`.
    """
    first = needs_of(program.read_bytes(), program.name)
    found: dict[str, Path] = {}
    missing: list[str] = []
    waiting = list(first.libraries)
    if first.loader is not None:
        waiting.append(Path(first.loader).name)
    while waiting:
        name = waiting.pop(0)
        if name in found or name in missing:
            continue
        path = find(name)
        if path is None:
            missing.append(name)
            continue
        found[name] = path
        waiting += needs_of(path.read_bytes(), name).libraries
    return Closure(first.loader, found, tuple(missing))
