"""In GitHub Actions a failed test is an annotation at its line: what failed, on which engine, what differed.

    ::error file=tests/test_it.py,line=7,title=test_it[bochs-2.7-...]::AssertionError: ...

GitHub takes such lines from a step's output ("Workflow commands for GitHub Actions"). They stand at the end,
each at a line's beginning. Where the plugin pytest-github-actions-annotate-failures is installed, it is left
to that one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

_OTHER_PLUGIN = "pytest_github_actions_annotate_failures"
_MAX_LINES = 30


def in_github_actions(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this runs as a step of a workflow."""
    return environment.get("GITHUB_ACTIONS") == "true"


class Annotations:
    """A plugin that gathers what failed and says it at the end; for the process that was started."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See pytest."""
        if report.failed:
            facts = getattr(report, "vmxlab", {}).get("failed", [])
            when = "" if report.when == "call" else f" ({report.when})"
            file, line, name = report.location
            self._add(report, file, line, f"{name}{when}", facts)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """See pytest."""
        if report.failed:
            file, line, _ = report.location or (report.nodeid, None, "")
            self._add(report, file, line, f"{report.nodeid} (collection)", [])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """See pytest."""
        if not self._config.pluginmanager.hasplugin(_OTHER_PLUGIN):
            for line in self._lines:
                terminalreporter.write_line(line)

    def _add(
        self,
        report: pytest.TestReport | pytest.CollectReport,
        file: str,
        line: int | None,
        title: str,
        facts: list[str],
    ) -> None:
        path = self._config.rootpath / file
        number = None if line is None else line + 1
        entries = getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", [])
        place = getattr(entries[0], "reprfileloc", None) if entries else None
        if place is not None:
            path, number = self._config.invocation_params.dir / place.path, place.lineno
        message = [*_message(report), *facts]
        if len(message) > _MAX_LINES:
            cut = len(message) - _MAX_LINES
            message = [*message[: _MAX_LINES - len(facts)], f"... {cut} more lines in the log", *facts]
        properties = {"file": _in_workspace(path), "line": number, "title": title}
        self._lines.append(command(properties, "\n".join(message)))


def _message(report: pytest.TestReport | pytest.CollectReport) -> Iterator[str]:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    yield from text.splitlines()


def _in_workspace(path: Path) -> str:
    """A path as GitHub wants it, relative to the repository."""
    workspace = Path(os.environ.get("GITHUB_WORKSPACE", Path.cwd())).resolve()
    path = path.resolve()
    return str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)


def command(properties: Mapping[str, object], message: str) -> str:
    """The workflow command for an error."""
    words = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in properties.items() if value)
    return f"::error {words}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
