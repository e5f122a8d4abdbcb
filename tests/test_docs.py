"""The reports for other projects, docs/upstream: whole, listed, and about what the tests say today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmxlab.console.entry_differences import CHANGES
from vmxlab.engines.differences import KNOWN_DIFFERENCES

ROOT = Path(__file__).parents[1]
REPORTS = sorted(path for path in (ROOT / "docs" / "upstream").glob("*.md") if path.name != "README.md")

each_report = pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)


def test_each_known_difference_in_the_checks_of_vm_entry_has_its_report():
    assert CHANGES.keys() - {path.stem for path in REPORTS} == set()


def test_list_of_the_reports_has_each_with_its_title():
    listed = re.findall(
        r"^\| \[(.*)\]\((.*)\) \| (.*) \|$", (REPORTS[0].parent / "README.md").read_text(), re.M
    )
    titles = {path: path.read_text().splitlines()[0].partition(": ")[2] for path in REPORTS}
    assert listed == [(path.stem, path.name, title) for path, title in titles.items()]


@each_report
def test_report_names_a_known_difference_and_its_section(report):
    text = report.read_text()
    assert f"| key | `{report.stem}` |" in text
    assert report.stem in KNOWN_DIFFERENCES
    assert KNOWN_DIFFERENCES[report.stem].section.removeprefix("Vol. 3C, ").split()[0] in text


@each_report
def test_test_in_a_report_is_the_one_that_runs(report):
    text = report.read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    (file,) = set(re.findall(r"^pytest (\S+)", text, re.M))
    assert all(function in (ROOT / file).read_text() for function in code.strip().split("\n\n\n"))
    assert f'vmx_known_difference("{report.stem}")' in code
