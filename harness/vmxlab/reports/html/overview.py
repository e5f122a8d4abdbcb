"""The page's overview: verdicts by engine, what to look at, known differences, exit reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode

from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.reports.html.text import printable
from vmxlab.reports.results.model import RecordedTest, TestVerdict
from vmxlab.reports.runs import reason_name

NO_ENGINE = "no engine"
"""What tests are listed under that run on none: of the harness itself."""

MAX_LISTED = 200
"""So many tests are listed as ones to look at; the list of all has the rest."""


@dataclass(slots=True)
class Row:
    """What ran on an engine."""

    tests: Counter[TestVerdict] = field(default_factory=Counter)
    cases: int = 0
    exits: int = 0


@dataclass(slots=True)
class Overview:
    """Counts as tests are added."""

    rows: dict[str, Row] = field(default_factory=dict)
    bad: list[RecordedTest] = field(default_factory=list)
    known: Counter[str] = field(default_factory=Counter)
    exits_of: Counter[int] = field(default_factory=Counter)
    cases_of: Counter[int] = field(default_factory=Counter)

    def add(self, test: RecordedTest) -> None:
        """Count a test, and keep it where somebody should look at it."""
        row = self.rows.setdefault(test.platform, Row())
        row.tests[test.verdict] += 1
        row.cases += len(test.cases)
        row.exits += sum(case.exits for case in test.cases)
        if test.verdict.is_bad:
            # Only what is listed of it: the cases of thousands of tests would fill the memory.
            self.bad.append(
                RecordedTest(test.id, test.name, test.verdict, test.engine, test.version, why=test.why)
            )
        if test.verdict is TestVerdict.KNOWN:
            self.known[test.why] += 1
        for case in test.cases:
            self.exits_of.update(case.reasons)
            self.cases_of.update(case.reasons.keys())

    # --- what the template asks for ----------------------------------------------------------------------

    @property
    def verdicts(self) -> Sequence[TestVerdict]:
        """The columns: those that occur."""
        return [verdict for verdict in TestVerdict if any(row.tests[verdict] for row in self.rows.values())]

    @property
    def by_engine(self) -> Sequence[tuple[str, Row]]:
        """The rows; tests that run on no engine come last."""
        return sorted(self.rows.items(), key=lambda item: (not item[0], item[0]))

    @property
    def to_look_at(self) -> Sequence[RecordedTest]:
        """The tests with a bad verdict, the worst first."""
        order = list(TestVerdict)
        return sorted(self.bad, key=lambda test: (order.index(test.verdict), test.name))

    @property
    def total(self) -> Row:
        """All engines together."""
        total = Row()
        for row in self.rows.values():
            total.tests.update(row.tests)
            total.cases += row.cases
            total.exits += row.exits
        return total

    @property
    def worst(self) -> TestVerdict:
        """The verdict on the whole."""
        tests = self.total.tests
        return next(
            (verdict for verdict in TestVerdict if verdict.is_bad and tests[verdict]), TestVerdict.PASS
        )

    @property
    def by_frequency(self) -> Sequence[tuple[int, str, int, int, float]]:
        """Exit reasons: number, name, exits, cases, and the cases as a share of the most frequent one's."""
        most = max(self.cases_of.values(), default=1)
        return [
            (number, reason_name(number), self.exits_of[number], cases, 100 * cases / most)
            for number, cases in sorted(self.cases_of.items(), key=lambda item: (-item[1], item[0]))
        ]

    @property
    def differences(self) -> Sequence[tuple[str, str, int]]:
        """Known differences that were met: key, what it is, in how many tests."""
        return [
            (key, str(KNOWN_DIFFERENCES.get(key, "")), count) for key, count in sorted(self.known.items())
        ]


def link(**state: object) -> str:
    """The fragment that shows something in the list: link(view="tests", v="fail")."""
    return "#" + urlencode({"view": "tests", **{key: printable(str(value)) for key, value in state.items()}})
