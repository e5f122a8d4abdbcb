"""A log that can't be kept: a typed error that says where and what to do, and the machine is stopped."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmxlab.console.log import SerialLog
from vmxlab.console.run import Verdict
from vmxlab.errors import LogError

from .conftest import PATIENCE_S, STREAM, assert_goes_on, caught, good, is_gone


def test_folder_that_is_a_file_is_a_log_error(open_lab, tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    for folder in (place, place / "below"):
        lab = open_lab(log_dir=folder)
        error = caught(lab, good())
        assert type(error) is LogError
        assert str(folder) in error.message
        assert error.log_path is not None
        assert "--log-dir" in error.advice
        assert lab.machines == []
        assert [run.verdict for run in lab.run_all([good(1), good(2)])] == [Verdict.ERROR] * 2


def full_after(monkeypatch, count):
    """A disk that has room for so many more bytes of a serial log."""
    real = SerialLog._create

    class Full:
        def __init__(self, file):
            self.file = file
            self.left = count

        def write(self, data):
            if self.left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= len(data)
            return self.file.write(data)

        def close(self):
            self.file.close()

    monkeypatch.setattr(SerialLog, "_create", lambda self, folder: Full(real(self, folder)))


@pytest.mark.parametrize(
    "room",
    [pytest.param(0, id="at-once"), pytest.param(200, id="booting"), pytest.param(4000, id="in-a-case")],
)
def test_serial_log_that_can_not_be_written_any_more_ends_the_case_and_the_machine(lab, monkeypatch, room):
    with monkeypatch.context() as patch:
        full_after(patch, room)
        error = caught(lab, STREAM)
        assert type(error) is LogError
        assert "No space left on device" in error.message
        assert "free some space" in error.advice
        assert error.engine.startswith("bochs")
        assert error.log_path.exists()
        assert is_gone(lab.machine.pid)
    assert_goes_on(lab)


def test_full_disk_leaves_a_verdict_of_each_case_of_an_image(lab, monkeypatch):
    lab.session()
    with monkeypatch.context() as patch:
        full_after(patch, 4000)
        runs = lab.run_image([good(0), STREAM, good(2)])
    assert [run.verdict.name for run in runs] == ["PASS", "ERROR", "PASS"]
    assert type(runs[1].error) is LogError
    assert_goes_on(lab)


_ON_SMALL_DISK = """
import json, os, subprocess, sys
from pathlib import Path
from vmxlab import Case, Limits
from vmxlab.console.lab import Lab
from vmxlab.errors import VmxlabError

place = Path(sys.argv[1])
mount = ["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "vmxlab-test", place]
if subprocess.run(mount, capture_output=True).returncode:
    sys.exit("no mount")
stream = Case(program="again: cpuid; jmp again", limits=Limits(exits=10_000_000, seconds=60))
machines = []
with Lab("bochs", log_dir=place) as lab:
    real = lab.engine.open
    lab.engine.open = lambda *a, **k: machines.append(real(*a, **k)) or machines[-1]
    try:
        lab.run(stream)
    except VmxlabError as error:
        print(json.dumps({
            "kind": type(error).__name__, "text": str(error), "path": str(error.log_path),
            "alive": [m.pid for m in machines if os.path.exists(f"/proc/{m.pid}")], "machines": len(machines),
        }))
"""


@pytest.mark.parametrize(
    ("size", "machines"),
    [pytest.param("16k", 0, id="no-room-for-the-image"), pytest.param("200k", 1, id="full-in-a-case")],
)
def test_really_full_disk_is_a_log_error(tmp_path, size, machines):
    """On a file system of that size, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", _ON_SMALL_DISK, place, size],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    if "no mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("can't mount a small file system here")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["kind"] == "LogError"
    assert "No space left on device" in said["text"]
    assert "free some space" in said["text"]
    assert Path(said["path"]).parent == place
    assert (said["machines"], said["alive"]) == (machines, [])


def test_folder_for_the_logs_of_a_lab_without_one_that_can_not_be_made_is_a_log_error(
    open_lab, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(LogError) as error:
        open_lab(log_dir=None)
    assert str(tmp_path / "missing") in error.value.message


def test_logs_of_a_lab_without_a_folder_go_with_it(open_lab, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lab = open_lab(log_dir=None)
    path = lab.run(good()).log_path
    assert path.exists()
    assert path.is_relative_to(tmp_path)
    lab.close()
    assert list(tmp_path.iterdir()) == []
