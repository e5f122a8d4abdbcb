"""pytest --vmx-oracle: every run of every test is checked by the oracle as well (`Run.check()`).

A test whose runs differ from what the SDM says fails, unless each difference is a known one of the engine.
How much the oracle knew is said at the end: exits predicted, exits it could not tell, and why it could not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from vmxlab.pytest_plugin.fixture import TestAtHand

if TYPE_CHECKING:
    from vmxlab.console.check import Comparison
    from vmxlab.console.run import Run

_WORKER = "vmx_oracle"
_MAX_REASONS = 12

Counts = Counter[str]
"""By "predicted", "unknown", "compared", "differences", "known KEY", "why ..."."""


class OracleCheck:
    """A plugin that checks the runs of each test.

    `test` gives the test at hand, `about` the engine's name and version of a test's item; None for a test
    that runs on none.
    """

    def __init__(
        self,
        test: Callable[[], TestAtHand],
        about: Callable[[pytest.Item], tuple[str, str] | None],
    ) -> None:
        self._test = test
        self._about = about
        self.counts: Counts = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """See pytest. A test that failed by itself is left alone."""
        yield
        about = self._about(item)
        if about is None:
            return
        test = self._test()
        found = [(run, self._check(run, *about)) for run in test.runs]
        test.differing += [run for run, lines in found if lines]
        new = [line for _, lines in found for line in lines]
        if new:
            pytest.fail("not what the SDM says:\n" + "\n".join(new), pytrace=False)

    def _check(self, run: Run, engine: str, version: str) -> list[str]:
        """The differences of a run that are not known ones of the engine."""
        from vmxlab.console.check import compare
        from vmxlab.console.known import explain

        if run.compiled is None or run.verdict_on_error is not None:
            return []
        comparison = compare(run)
        self._count(comparison)
        new = []
        for difference, key in explain(comparison.differences, engine, version):
            self.counts["differences" if key is None else f"known {key}"] += 1
            if key is None:
                new.append(f"case {run.number}{run.name and f' ({run.name})'}: {difference}")
        return new

    def _count(self, comparison: Comparison) -> None:
        self.counts["runs"] += 1
        self.counts["whole"] += comparison.prediction.complete
        self.counts["predicted"] += comparison.exits_predicted
        self.counts["unknown"] += comparison.exits_unknown
        self.counts["compared"] += comparison.compared
        if comparison.prediction.unknown is not None:
            self.counts[f"why {comparison.prediction.unknown.why}"] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """See pytest. A worker of pytest-xdist hands over what it counted."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_WORKER] = dict(self.counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """See pytest-xdist."""
        self.counts.update(getattr(node, "workeroutput", {}).get(_WORKER, {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """See pytest."""
        for line in summary(self.counts):
            terminalreporter.write_line(line)


def summary(counts: Counts) -> list[str]:
    """What the oracle knew, in lines."""
    known = {key.removeprefix("known "): n for key, n in counts.items() if key.startswith("known ")}
    why = Counter({key.removeprefix("why "): n for key, n in counts.items() if key.startswith("why ")})
    lines = [
        f"vmxlab: oracle: {counts['runs']} runs, {counts['whole']} predicted to their end; "
        f"{counts['predicted']} exits predicted, {counts['unknown']} unknown; "
        f"{counts['compared']} values compared, "
        f"{counts['differences']} new differences, {sum(known.values())} known"
    ]
    lines += [f"  known difference {key}: {n}" for key, n in sorted(known.items())]
    lines += [f"  unknown in {n}: {reason}" for reason, n in why.most_common(_MAX_REASONS)]
    if len(why) > _MAX_REASONS:
        lines.append(f"  ... and {len(why) - _MAX_REASONS} more reasons")
    return lines
