"""What the tests of cases share."""

from __future__ import annotations

import subprocess

import pytest

from vmxlab.cases import assembler


@pytest.fixture
def as_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command of each process that is started while the test runs."""
    started: list[list[str]] = []
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(command)
        return real(command, **options)

    monkeypatch.setattr(assembler.subprocess, "Popen", popen)
    return started
