"""Calls of the command line, each in a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmxlab.cli import main


@dataclass(frozen=True, slots=True)
class Result:
    """What a call left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Vmxlab = Callable[..., Result]


def processes_in(folder: Path) -> list[int]:
    """Processes that work in a folder or below it, as an engine does in its log folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                where = (entry / "cwd").readlink()
            except OSError:
                continue
            if where.is_relative_to(folder):
                found.append(int(entry.name))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory: an empty one. No machine may be left in it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert processes_in(tmp_path) == []


@pytest.fixture
def vmxlab_cli(folder: Path, capfd: pytest.CaptureFixture[str]) -> Vmxlab:
    """Run the command line in this process: `vmxlab_cli("run", "--engine", "bochs")`."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return call
