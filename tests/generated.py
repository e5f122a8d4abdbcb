"""Options and summary of the property tests (tests/properties), which lie too deep for hooks of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

EXPLORED = "vmx_explored"
"""The name under which a test's counts are among its properties."""
_MAX_LINES = 40


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is generated."""
    group = parser.getgroup("vmxlab")
    group.addoption(
        "--vmx-examples", type=int, metavar="N", help="generated cases of each property test (else: a few)"
    )
    group.addoption(
        "--vmx-seed", type=int, metavar="SEED", help="the seed of generated cases (else: the same each time)"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the property tests have compared."""
    total: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                total.update(dict(report.user_properties).get(EXPLORED, {}))
    for line in _summary(total) if total else ():
        terminalreporter.write_line(line)


def _summary(total: Counter[str]) -> Iterator[str]:
    yield (
        f"vmxlab: {total['cases']} generated cases, {total['whole']} predicted to their end; "
        f"{total['exits']} exits, {total['predicted']} predicted; {total['compared']} values compared"
    )
    for kind in ("reason", "known", "unknown"):
        found = Counter({name: n for name, n in total.items() if name.startswith(f"{kind} ")})
        yield from (f"  {n:6} {name}" for name, n in found.most_common(_MAX_LINES))
