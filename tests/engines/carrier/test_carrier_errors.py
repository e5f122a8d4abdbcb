"""What keeps a carrier from being built, the command that builds it, and the one that is built here."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.cli import main
from vmxlab.engines.carrier.image import (
    MEMORY_BASE,
    carrier_availability,
    carrier_image,
    manifest_of,
)
from vmxlab.engines.carrier.store import default_folder
from vmxlab.engines.carrier.tools import NEEDED_MB, run
from vmxlab.engines.process import Child
from vmxlab.image.monitor import CarrierParts

from .conftest import LINUX, PARTS, RELEASE, build, bzimage, linux_files

# --- errors -------------------------------------------------------------------------------------------------


def failure(cache: Path, parts: CarrierParts = PARTS) -> errors.EngineUnavailable:
    with pytest.raises(errors.EngineUnavailable) as caught:
        carrier_image(parts, cache=cache)
    assert caught.value.engine == "kvm-in-bochs"
    assert list(cache.glob("builds/*")) == []
    return caught.value


def test_a_host_without_apt_is_told_what_is_missing(mirror, cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    error = failure(cache)
    assert "this host has no apt-get" in error.message
    assert "debian:12" in (error.advice or "")
    state = carrier_availability(PARTS, cache=cache)
    assert (state.ok, state.problem) == (
        False,
        "the carrier is built of Debian's packages, and this host has no apt-get and no dpkg-deb",
    )


def test_no_network_is_apts_message_and_leaves_what_was_there(mirror, cache):
    text = "Err:1 http://mirror\nE: Failed to fetch http://mirror/x.deb  Could not resolve 'mirror'"
    mirror.fail("download", text)
    mirror.fail("update", "E: nothing")
    mirror.fail("install-private", "E: Unable to locate package")
    error = failure(cache)
    assert "a package of the carrier can't be had" in error.message
    assert "Could not resolve 'mirror'" in error.message
    assert "network" in (error.advice or "")
    assert not list(cache.glob("packages/*"))
    mirror.heal()
    assert build(cache)[0].linux == "6.1.99"


def test_packages_nobody_knows_are_named_with_apts_words(mirror, cache):
    mirror.fail("install", "E: Unable to locate package linux-image-cloud-amd64")
    error = failure(cache)
    assert "Unable to locate package linux-image-cloud-amd64" in error.message
    assert "Debian 12" in (error.advice or "")


def test_a_download_with_another_hash_is_not_taken(mirror, cache):
    for path in (mirror.folder / "pool").glob("qemu*"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "another size or hash" in failure(cache).message
    assert not list(cache.glob("packages/qemu*"))


def test_a_package_that_can_not_be_unpacked_is_an_error(mirror, cache):
    mirror.publish("qemu-system-x86", "1:7.3", {}, damaged=True)
    error = failure(cache)
    assert "qemu-system-x86_1%3a7.3_amd64.deb can't be unpacked: dpkg-deb failed" in error.message


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("qemu-system-x86", {}, "qemu-system-x86 9-1 has no file usr/bin/qemu-system-x86_64-microvm"),
        (LINUX, {}, "has no file boot/vmlinuz-"),
        (LINUX, {f"boot/vmlinuz-{RELEASE}": bzimage()}, "irqbypass.ko"),
        ("zlib1g", {}, "needs libz.so.1, and no package"),
    ],
)
def test_a_package_without_the_file_wanted_is_named(mirror, cache, name, files, message):
    mirror.publish(name, "9-1", files)
    assert message in failure(cache).message


def test_a_kernel_linked_to_run_elsewhere_is_refused(mirror, cache, binaries):
    mirror.publish(LINUX, "9-1", linux_files(0x2000000, binaries["o"]))
    assert "linked to run at 0x2000000; the carrier is laid out for 0x1000000" in failure(cache).message


def test_programs_that_leave_too_little_memory_are_refused(mirror, cache):
    error = failure(cache, CarrierParts(PARTS.reset_stub, bytes(200 << 20)))
    assert "too little is left of 256 MB" in error.message


def test_a_stub_that_is_not_ours_is_refused(mirror, cache):
    assert "reset stub is damaged" in failure(cache, CarrierParts(bytes(1024), b"init")).message
    assert mirror.calls == []


@pytest.mark.parametrize("where", ["mkdtemp", "rename", "tool", "a tool without words"])
def test_no_space_is_one_error_with_path_and_size(mirror, cache, monkeypatch, where):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "tool":
        mirror.fail("download", "E: Write error - write (28: No space left on device)")
    elif where == "a tool without words":
        mirror.fail("download", "")
        usage = shutil.disk_usage(mirror.folder)
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=0))
    elif where == "mkdtemp":
        monkeypatch.setattr("tempfile.mkdtemp", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    error = failure(cache)
    assert "there is no space left" in error.message
    assert f"in {cache}: building the carrier takes up to {NEEDED_MB} MB" in error.message
    assert "XDG_CACHE_HOME" in (error.advice or "")


def test_a_cache_folder_that_is_a_file_is_an_error_that_names_it(mirror, cache):
    cache.write_text("in the way")
    error = failure(cache)
    assert f"{cache}, can't be used" in error.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_that_can_not_be_written_is_an_error(mirror, cache):
    cache.mkdir(mode=0o500)
    assert "Permission denied" in failure(cache).message


_BUILD = """\
import sys
from pathlib import Path
from vmxlab.engines.carrier.image import carrier_image
from vmxlab.image.monitor import CarrierParts
carrier_image(CarrierParts(b"VMXLABCR" + bytes(1016), b"init"), cache=Path(sys.argv[1]))
"""


def test_an_interrupt_ends_apt_and_leaves_nothing(mirror, cache):
    (mirror.folder / "hang").write_text("")
    process = subprocess.Popen([sys.executable, "-c", _BUILD, cache], stderr=subprocess.PIPE)
    while "download host" not in mirror.calls and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert list(cache.glob(".new-*")) == []
    assert list(cache.glob("packages/*")) == []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            assert not entry.readlink().is_relative_to(cache)
        except OSError:
            continue
    (mirror.folder / "hang").unlink()
    assert build(cache)[0].linux == "6.1.99"


def test_a_wait_that_is_interrupted_ends_the_tool(tmp_path, monkeypatch):
    pids = []

    def wait(child: Child, timeout_s: float) -> None:
        pids.append(child.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        run(["sleep", "60"], tmp_path)
    assert not Path(f"/proc/{pids[0]}").exists()


# --- can it be had ------------------------------------------------------------------------------------------


def test_availability_builds_nothing_and_knows_what_is_built(mirror, cache, monkeypatch):
    state = carrier_availability(PARTS, cache=cache)
    assert (state.ok, state.version, cache.exists()) == (True, None, False)
    build(cache)
    mirror.forget_calls()
    monkeypatch.setenv("PATH", "")  # what is built does not need apt any more
    for parts in (PARTS, None):
        state = carrier_availability(parts, cache=cache)
        assert (state.ok, state.version) == (True, "linux-6.1.99+qemu-7.2.22")
    assert not carrier_availability(CarrierParts(PARTS.reset_stub, b"new"), cache=cache).ok
    assert mirror.calls == []


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vmxlab/carrier"


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def command(mirror, tmp_path, monkeypatch, capfd):
    """Run `vmxlab carrier ...`: (exit status, standard output, standard error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("vmxlab.image.monitor.load_carrier_parts", lambda: PARTS)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["carrier", *arguments])
        return status, *capfd.readouterr()

    return run


def test_the_command_builds_and_says_what_is_in_it(command):
    status, out, err = command()
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert status == 0
    assert (lines["Linux"], lines["QEMU"]) == (f"6.1.99 ({RELEASE})", "7.2.22")
    assert "zlib1g" in lines
    assert "vmxlab: built the carrier" in err
    assert command()[2] == ""


def test_as_json_the_command_has_paths_versions_and_sizes(command):
    status, out, _ = command("--json")
    shown = json.loads(out)
    assert (status, shown["linux"], shown["packages"]["zlib1g"]) == (0, "6.1.99", "1:1.2.13")
    assert Path(shown["memory"]).stat().st_size == shown["files"]["memory.img"]["bytes"]


def test_the_command_cleans(command, tmp_path):
    command()
    status, out, err = command("--clean")
    assert (status, err) == (0, "")
    assert str(tmp_path / "home/vmxlab/carrier") in out
    assert not list(tmp_path.rglob("memory.img"))
    assert json.loads(command("--clean", "--json")[1])["removed"].endswith("carrier")


def test_what_can_not_be_had_is_a_message_and_status_3(command, mirror):
    mirror.fail("install", "E: Unable to locate package linux-image-cloud-amd64")
    status, out, err = command()
    assert (status, out) == (3, "")
    assert "vmxlab: error: the packages of the carrier can't be had" in err
    assert "Traceback" not in err


# --- the real one -------------------------------------------------------------------------------------------


def test_the_carrier_that_is_built_here_is_whole_and_of_known_versions():
    from vmxlab.image.monitor import load_carrier_parts

    try:
        parts = load_carrier_parts()
    except errors.ImageError as error:
        pytest.skip(error.message)
    if carrier_availability(parts).version is None:
        pytest.skip("the carrier is not built: vmxlab carrier")
    told: list[str] = []
    image = carrier_image(parts, tell=told.append)
    assert told == []
    assert image.release.startswith(image.linux.rpartition(".")[0])
    assert image.qemu[0].isdigit()
    with image.memory.open("rb") as file:
        file.seek(manifest_of(image)["start_info"] - MEMORY_BASE)
        assert file.read(4) == struct.pack("<I", 0x336EC578)
