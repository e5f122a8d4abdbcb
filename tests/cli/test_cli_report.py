"""`vmxlab report`: a page out of what a session wrote, or of a serial log."""

from __future__ import annotations

from pathlib import Path

import pytest

LOG = Path(__file__).parents[1] / "console" / "bochs.log"


def test_a_log_becomes_a_page(vmxlab_cli, folder: Path) -> None:
    result = vmxlab_cli("report", LOG, "-o", "pages/report.html")
    page = folder / "pages" / "report.html"
    assert result.status == 0
    assert result.out == (
        f"1 test (1 fail), 6 cases, 7 exits\nreport  {page}  {page.stat().st_size / 1e6:.1f} MB\n"
    )
    assert page.read_text().startswith("<!doctype html>")


def test_session_that_was_cut_short_is_said(vmxlab_cli, folder: Path) -> None:
    (folder / "results.jsonl").write_text('{"kind": "head", "format": 1, "of": "vmxlab results"}\n')
    result = vmxlab_cli("report", "results.jsonl")
    assert result.status == 0
    assert result.err == (
        "vmxlab: results.jsonl has no end: the session was cut short, and tests may be missing here.\n"
    )
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "Missing argument 'FILE...'"),
        (["none"], 3, "none can't be read: No such file or directory"),
        (["empty"], 3, "neither a file of results nor a serial log with a case in it"),
        ([str(LOG), "-o", "empty/report.html"], 3, "the report empty/report.html can't be written"),
    ],
)
def test_what_can_not_be_read_or_written_is_named(vmxlab_cli, folder, arguments, status, words) -> None:
    (folder / "empty").touch()
    result = vmxlab_cli("report", *arguments)
    assert result.status == status
    assert words in result.err
    assert "Traceback" not in result.err
