"""What the page's list is made of, and what is searched: a little of every test and case."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from vmxlab.reports.html.parts import Place
from vmxlab.reports.html.text import printable
from vmxlab.reports.results.model import RecordedCase, RecordedTest, TestVerdict
from vmxlab.reports.runs import describe_exit, reason_name

VERDICTS = tuple(TestVerdict)


class _Table:
    """Values that many rows have, each by its number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, value: Hashable) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class Index:
    """Takes tests with their cases; `item` is what the page gets.

    Every distinct description of an exit is in it, so that a search finds a port wherever it was met.
    """

    def __init__(self) -> None:
        self._files = _Table()
        self._platforms = _Table()
        self._engines = _Table()
        self._descriptions = _Table()
        self._reasons: dict[int, str] = {}
        self._first: dict[Hashable, int] = {}
        self._tests: list[list[Any]] = []
        self._cases: list[list[Any]] = []

    def add(self, test: RecordedTest, place: Place, case_places: list[Place]) -> None:
        """A test, and where its details and those of its cases lie."""
        file, _, name = test.name.partition("::")
        self._tests.append(
            [
                self._files.number(file),
                name or file,
                VERDICTS.index(test.verdict),
                self._platforms.number(test.platform),
                test.seconds,
                test.why,
                printable(test.id),
                len(self._cases),
                len(test.cases),
                place,
            ]
        )
        for case, case_place in zip(test.cases, case_places, strict=True):
            self._cases.append(self._case(case, case_place))

    def _case(self, case: RecordedCase, place: Place) -> list[Any]:
        run = case.run
        self._reasons |= {number: reason_name(number) for number in case.reasons}
        descriptions = (*(describe_exit(exit_) for exit_ in run.exits), *case.unkept)
        words = dict.fromkeys(map(self._descriptions.number, descriptions))
        return [
            run.name or f"case {run.number}",
            case.verdict.value,
            self._engines.number(run.engine),
            case.exits,
            list(case.reasons),
            list(words),
            place,
        ]

    def _order(self, test: list[Any]) -> tuple[object, ...]:
        """By file, as several workers mix them; in it as they came, and each test's engines together."""
        file, name = test[0], test[1]
        return self._files.values[file], self._first.setdefault((file, name), len(self._first)), test[3]

    def item(self) -> dict[str, Any]:
        """All of it."""
        return {
            "verdicts": [[verdict.value, verdict.words] for verdict in VERDICTS],
            "files": self._files.values,
            "platforms": self._platforms.values,
            "engines": self._engines.values,
            "descriptions": self._descriptions.values,
            "reasons": dict(sorted(self._reasons.items())),
            "tests": sorted(self._tests, key=self._order),
            "cases": self._cases,
        }
