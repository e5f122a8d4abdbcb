"""`vmxlab diff`: two serial logs, what it prints of them, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmxlab.console.records import encode_record, parse_line

LOG = Path(__file__).parents[1] / "reports" / "serial.log"


@pytest.fixture
def other(folder: Path) -> Path:
    """The same log of another day: a register, an undefined field and a name are not the same."""
    path = folder / "other.log"
    path.write_bytes(b"\n".join(map(changed, LOG.read_bytes().splitlines())))
    return path


def changed(line: bytes) -> bytes:
    record = parse_line(line)
    if record is None or line.startswith(b"#"):
        return line
    values = dict(record.values)
    if values.get("rax") == "0x1c":
        values |= {"rax": "0x1d", "gla": "0x1000"}
    if values.get("name") == "ept":
        values["name"] = "renamed"
    return encode_record(record.kind, values).encode()


def test_log_is_the_same_as_itself(vmxlab_cli):
    result = vmxlab_cli("diff", LOG, LOG)
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith("7 cases are the same\n")
    assert "A  bochs 2.7 (corei7_skylake_x); monitor build 0x" in result.out


def test_difference_is_shown_by_case_exit_and_field(vmxlab_cli, other):
    result = vmxlab_cli("diff", LOG, other)
    assert result.status == 1
    assert "case 0 ports  (lines 7 and 7)" in result.out
    assert "exit 1 HLT  rax   0x1c        0x1d" in result.out
    assert "only in serial.log: case 2 ept" in result.out
    assert "only in other.log: case 2 renamed" in result.out
    assert "5 cases are the same, 1 differs, 1 only in serial.log, 1 only in other.log" in result.out


def test_what_may_differ_is_left_out_and_shown_with_all(vmxlab_cli, other):
    result = vmxlab_cli("diff", LOG, other)
    assert "guest linear address" not in result.out
    assert "left out: 1 value that may differ" in result.out
    everything = vmxlab_cli("diff", LOG, other, "--all")
    assert everything.status == 1
    assert "undefined: this VM exit has no guest-linear address (Vol. 3C, 28.2.1)" in everything.out


def test_json_has_both_kinds_of_differences(vmxlab_cli, other):
    result = vmxlab_cli("diff", "--json", LOG, other)
    assert result.status == 1
    assert result.json["same"] is False
    assert result.json["one"]["engine"].startswith("bochs 2.7")
    first = result.json["cases"][0]
    assert first["differences"] == [{"where": "exit 1 HLT", "what": "rax", "one": "0x1c", "other": "0x1d"}]
    assert first["left_out"][0]["section"] == "Vol. 3C, 28.2.1"
    assert [told["title"] for told in result.json["only_other"]] == ["case 2 renamed"]


def test_processors_that_differ_are_said_and_no_difference_of_the_cases(vmxlab_cli, folder):
    path = folder / "other.log"
    lines = LOG.read_bytes().splitlines()
    caps = next(record for line in lines if (record := parse_line(line)) and record.kind == "caps")
    path.write_bytes(
        LOG.read_bytes().replace(
            caps.line.encode(), encode_record("caps", {**caps.values, "m480": "0xd8100000000004"}).encode()
        )
    )
    result = vmxlab_cli("diff", LOG, path)
    assert result.status == 0
    assert "the processors differ in 1 " in result.out
    assert "revision_id" in vmxlab_cli("diff", "--all", LOG, path).out


@pytest.mark.parametrize("content", [b"", b"no log\n"])
def test_what_is_no_log_is_3(vmxlab_cli, folder, content):
    path = folder / "nothing"
    path.write_bytes(content)
    for pair in ((LOG, path), (path, LOG)):
        result = vmxlab_cli("diff", *pair)
        assert result.status == 3
        assert "is no serial log" in result.err


def test_missing_file_is_3_and_standard_input_twice_is_2(vmxlab_cli):
    assert vmxlab_cli("diff", LOG, "missing").status == 3
    assert vmxlab_cli("diff", "-", "-").status == 2
    assert vmxlab_cli("diff", LOG).status == 2


def test_logs_of_one_name_are_told_apart_by_their_folders(vmxlab_cli, folder):
    for name in ("monday", "tuesday"):
        (folder / name).mkdir()
        (folder / name / "serial.log").write_bytes(LOG.read_bytes())
    result = vmxlab_cli("diff", "monday/serial.log", "tuesday/serial.log")
    assert result.out.startswith("monday/serial.log   bochs")
