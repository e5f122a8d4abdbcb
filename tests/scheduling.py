"""What of the suite runs on kvm-in-bochs, and which worker of pytest-xdist runs what.

This is for a session that names no engine, whose tests run on kvm-in-bochs only by their marker
`vmx_also_on`. A case there takes a tenth of a second and more, so a test with many parameters runs with a few
of them; with all of them where the engine is named, as `make test-kvm` does.

The engine takes ten seconds to come up, in each worker that has a test for it. So all of these tests are one
worker's, and the other tests are spread as whole files, as some boot carriers of their own. What takes
longest is begun first.
"""

from __future__ import annotations

from collections.abc import Iterable

CORE_PARAMETERS = 3
"""With so many of its parameters a test runs on kvm-in-bochs."""

ON_THE_CARRIER = "tests on kvm-in-bochs"

_FIRST = (
    ON_THE_CARRIER,
    "tests/engines/test_engines_kvm_in_bochs.py",
    "tests/engines/",
    "tests/plugin/",
    "tests/faults/",
    "tests/console/",
    "tests/cli/",
    "tests/properties/",
    "tests/reports/test_reports_html_browser.py",
    "tests/exits/",
)


def unit_of(test_id: str) -> str:
    """The unit that a test belongs to: what one worker runs without a break."""
    return ON_THE_CARRIER if _is_on_the_carrier(test_id) else test_id.partition("::")[0]


def place_of(unit: str) -> int:
    """The lower, the earlier it is begun. The units of one place are begun with the one of most tests."""
    return next((place for place, start in enumerate(_FIRST) if unit.startswith(start)), len(_FIRST))


def beyond_the_core(test_ids: Iterable[str]) -> set[str]:
    """Those on kvm-in-bochs that are left out: of each test all but some, from its first to its last."""
    tests: dict[str, list[str]] = {}
    for test_id in test_ids:
        if _is_on_the_carrier(test_id):
            tests.setdefault(test_id.partition("[")[0], []).append(test_id)
    left_out: set[str] = set()
    for ids in tests.values():
        last, steps = len(ids) - 1, CORE_PARAMETERS - 1
        left_out |= set(ids) - {ids[last * step // steps] for step in range(CORE_PARAMETERS)}
    return left_out


def _is_on_the_carrier(test_id: str) -> bool:
    return "[kvm-in-bochs-" in test_id
