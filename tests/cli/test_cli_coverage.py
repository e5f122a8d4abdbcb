"""`vmxlab coverage`: the table out of what a session wrote."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmxlab.reports.coverage_file import CoverageWriter
from vmxlab.sdm.exit_reasons import ExitReason

SUITE = """
from vmxlab import Case, SecondaryControls
def test_cpuid_exits(vmxlab):
    vmxlab.run(Case(program="cpuid; hlt"))
def test_other(vmxlab):
    vmxlab.run(Case(program="invd; cpuid; hlt"))
"""


def write(path: Path, engine: str, *reasons: int, status: int = 0) -> Path:
    writer = CoverageWriter(path)
    line = {"kind": "seen", "test": "t.py::test", "engine": engine, "version": "1|2", "models": ["m"]}
    writer.write({**line, "reasons": list(reasons), "entry_failures": []})
    writer.close([], status)
    return path


@pytest.fixture
def file(folder: Path) -> Path:
    """What a session on Bochs wrote."""
    return write(folder / "coverage.jsonl", "bochs", 10, 12)


@pytest.mark.slow
def test_a_session_of_pytest_is_read(vmxlab_cli, folder: Path) -> None:
    (folder / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--vmx-engine", "bochs"]
    subprocess.run([*command, "--vmx-coverage", "out.jsonl"], cwd=folder, check=True, capture_output=True)
    result = vmxlab_cli("coverage", "out.jsonl")
    assert result.status == 1
    rows = {
        line.split()[1]: line.split(maxsplit=2)[2] for line in result.out.splitlines() if line[:2].strip()
    }
    assert rows["CPUID"] == "test_it.py::test_cpuid_exits (+1)"
    assert rows["INVD"] == "test_it.py::test_other"
    assert rows["RDTSC"] == "NOT SEEN"
    assert rows["PCONFIG"] == "processor lacks it (IA32_VMX_PROCBASED_CTLS2[59])"
    assert rows["SPP"] == "NOT SEEN", "another model has it"
    assert rows["RSM"].startswith("not reachable: ")
    lines = result.out.splitlines()
    assert any(line.endswith(f"3 of {len(ExitReason)} reasons seen") for line in lines)
    assert any("not seen, and nothing says why: " in line for line in lines)


def test_json_is_for_programs(vmxlab_cli, file) -> None:
    result = vmxlab_cli("coverage", file, "--json", "--minimum", "bochs=3")
    assert result.status == 1
    shown = result.json
    assert shown["engines"] == [{"engine": "bochs", "version": "1|2", "models": ["m"], "seen": 2}]
    cells = {row["reason"]: row["cells"][0] for row in shown["reasons"]}
    assert cells["CPUID"] == {"status": "seen", "what": "t.py::test", "more": 0}
    assert shown["defects"][-1] == "bochs 1|2: 2 reasons seen, at least 3 were wanted"


def test_markdown_is_a_page_with_a_table_that_no_text_breaks(vmxlab_cli, file, folder) -> None:
    other = write(folder / "other.jsonl", "kvm", 12, status=1)
    text = vmxlab_cli("coverage", file, other, "--markdown").out
    assert text.startswith("# Exit reasons seen\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(ExitReason) + 2
    assert {line.replace("\\|", "").count("|") for line in table} == {5}
    assert "| 10 | CPUID | t.py::test | NOT SEEN |" in table


def test_all_is_well_where_nothing_is_left_to_explain(vmxlab_cli, file, monkeypatch) -> None:
    monkeypatch.setattr("vmxlab.reports.coverage.Coverage.defects", lambda self, minimum: [])
    assert vmxlab_cli("coverage", file).status == 0


@pytest.mark.parametrize("minimum", ["bochs", "bochs=x", "nonsense=5", "bochs=5,", "bochs=-1"])
def test_a_minimum_that_makes_no_sense_is_a_usage_error(vmxlab_cli, file, minimum) -> None:
    result = vmxlab_cli("coverage", file, "--minimum", minimum)
    assert result.status == 2
    assert "--minimum" in result.err


def test_no_file_and_two_formats_are_usage_errors(vmxlab_cli, file) -> None:
    assert vmxlab_cli("coverage").status == 2
    assert vmxlab_cli("coverage", file, "--json", "--markdown").status == 2


@pytest.mark.parametrize("content", [b"", b"\0\xff", b"{}\n", b'{"kind": "head", "format": 1}\n'])
def test_a_file_that_is_none_is_an_error_with_its_name_and_no_traceback(vmxlab_cli, folder, content) -> None:
    (folder / "bad").write_bytes(content)
    for name in ("bad", "missing", "."):
        result = vmxlab_cli("coverage", name)
        assert result.status == 3
        assert result.err.startswith("vmxlab: error: ")
        assert name in result.err
        assert "Traceback" not in result.err


def test_on_a_terminal_the_table_is_as_wide_as_the_terminal(file) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "vmxlab.cli", "coverage", str(file)]
    environment = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment):
        os.close(follower)
        text = b""
        while True:
            try:
                news = os.read(leader, 65536)
            except OSError:
                break
            if not news:
                break
            text += news
    os.close(leader)
    assert b"\x1b[" in text
    assert b"NOT SEEN" in text


def test_the_committed_table_meets_the_bars_and_calls_nothing_unreachable_that_was_seen() -> None:
    page = Path(__file__).parents[2] / "docs" / "coverage.md"
    if not page.exists():
        pytest.skip("docs/coverage.md is not made yet: make coverage")
    text = page.read_text()
    assert "Made by `vmxlab coverage`" in text
    assert "called not reachable" not in text
    assert "NOT SEEN" not in text
    for engine, minimum in (("bochs", 55), ("kvm-in-bochs", 45)):
        (count,) = re.findall(
            rf"^- {engine} \S+: (\d+) of {len(ExitReason)} reasons seen$", text, re.MULTILINE
        )
        assert int(count) >= minimum
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [int(row[0].strip("| ")) for row in rows] == [int(reason) for reason in ExitReason]
