"""Building the carrier of packages, and keeping it."""

from __future__ import annotations

import fcntl
import hashlib
import struct
import threading

import pytest

from vmxlab.engines.carrier.image import (
    MEMORY_BASE,
    ROM_BYTES,
    CarrierImage,
    carrier_image,
    clean,
    manifest_of,
)
from vmxlab.image.monitor import CarrierParts

from .conftest import LINUX, PARTS, RELEASE, build, linux_files

# --- what is built ------------------------------------------------------------------------------------------


def test_kernel_start_info_and_initramfs_lie_where_the_stub_is_told(mirror, cache):
    image, told = build(cache)
    rom, memory = image.rom.read_bytes(), image.memory.read_bytes()
    assert len(rom) == ROM_BYTES
    stub = rom[-1024:]
    magic, base, size, entry, info = struct.unpack_from("<8s4I", stub)
    assert (magic, base, size, entry) == (b"VMXLABCR", MEMORY_BASE, len(memory), MEMORY_BASE)
    assert stub[24:] == PARTS.reset_stub[24:]
    assert not any(rom[:-1024])
    assert memory[:4] == b"\xf4\xf4\xf4\xf4"
    assert info == MEMORY_BASE + 0x5000  # behind .bss
    page = memory[info - base :]
    (modules_at,) = struct.unpack_from("<Q", page, 16)
    initramfs_at, initramfs_bytes = struct.unpack_from("<QQ", memory, modules_at - base)
    assert initramfs_at == info + 0x1000
    initramfs = memory[initramfs_at - base :][:initramfs_bytes]
    assert initramfs.startswith(b"070701")
    assert initramfs.rstrip(b"\0").endswith(b"TRAILER!!!")
    assert len(memory) % 4096 == 0
    assert (image.linux, image.release, image.qemu) == ("6.1.99", RELEASE, "7.2.22")
    assert told[-1] == "built the carrier: linux-6.1.99+qemu-7.2.22"


def test_the_initramfs_has_init_modules_qemu_and_the_libraries_it_needs(mirror, cache, binaries):
    content = build(cache)[0].memory.read_bytes()
    for name in (
        "dev/console",
        "init",
        "modules/irqbypass.ko",
        "modules/kvm.ko",
        "modules/kvm-intel.ko",
        "usr/bin/qemu-system-x86_64",
        "lib64/ld-linux-x86-64.so.2",
        "lib/x86_64-linux-gnu/libc.so.6",
        "lib/x86_64-linux-gnu/libodd.so.3",
        "lib/x86_64-linux-gnu/libz.so.1",
    ):
        assert name.encode() + b"\0" in content, name
    assert b"our init" in content
    assert binaries["qemu"] in content
    assert b"libother.so.1" not in content


def test_the_packages_it_was_made_of_are_named(mirror, cache):
    image, _ = build(cache)
    assert image.packages == {
        "libc6": "2.36-9",
        "libcurious": "3",
        LINUX: "6.1.99-2",
        "qemu-system-x86": "1:7.2+dfsg-7",
        "zlib1g": "1:1.2.13",
    }
    facts = manifest_of(image)
    assert facts["packages"] == image.packages
    assert facts["files"]["memory.img"]["sha256"] == hashlib.sha256(image.memory.read_bytes()).hexdigest()


def test_the_same_packages_make_the_same_bytes(mirror, tmp_path):
    first, second = build(tmp_path / "one")[0], build(tmp_path / "two")[0]
    assert first.memory.read_bytes() == second.memory.read_bytes()
    assert first.memory.parent.name == second.memory.parent.name


def test_only_needed_packages_are_kept(mirror, cache):
    build(cache)
    kept = {path.name.split("_")[0] for path in (cache / "packages").iterdir()}
    assert kept == {"libc6", "libcurious", LINUX, "qemu-system-x86", "zlib1g"}


# --- the cache ----------------------------------------------------------------------------------------------


def test_a_second_use_runs_nothing(mirror, cache, monkeypatch):
    first, _ = build(cache)
    mirror.forget_calls()
    monkeypatch.setenv("PATH", "")
    second, told = build(cache)
    assert (second, told, mirror.calls) == (first, [], [])


def test_changed_lists_with_the_same_versions_ask_apt_and_build_nothing(mirror, cache):
    first, _ = build(cache)
    mirror.forget_calls()
    mirror.update_host()
    second, told = build(cache)
    assert second == first
    assert mirror.calls == ["install host"]
    assert not any("built" in line for line in told)


def test_a_new_version_is_downloaded_and_built(mirror, cache, binaries):
    first, _ = build(cache)
    mirror.publish(LINUX, "6.1.100-1", linux_files(module=binaries["o"]))
    mirror.forget_calls()
    mirror.update_host()
    second, told = build(cache)
    assert (first.linux, second.linux) == ("6.1.99", "6.1.100")
    assert mirror.calls[:2] == ["install host", "download host"]
    assert any(line.startswith(f"downloading {LINUX} (") for line in told)
    assert not list((cache / "packages").glob("*6.1.99*"))


def test_another_init_makes_another_carrier_of_the_same_packages(mirror, cache):
    first, _ = build(cache)
    mirror.forget_calls()
    second, _ = build(cache, CarrierParts(PARTS.reset_stub, b"another init"))
    assert first.memory.parent != second.memory.parent
    assert mirror.calls == []
    assert build(cache)[1] == []  # the first is still there


def test_of_many_carriers_the_last_used_stay(mirror, cache):
    images = [build(cache, CarrierParts(PARTS.reset_stub, b"init %d" % n))[0] for n in range(5)]
    assert [image.memory.exists() for image in images] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("file", "damage", "word"),
    [
        ("memory.img", lambda data: data[:-1], "bytes instead of"),
        ("memory.img", lambda data: data[:100] + b"!" + data[101:], "SHA-256"),
        ("boot.rom", lambda _: None, "can't be read"),
        ("carrier.json", lambda data: data[:50], "can't be read"),
        ("carrier.json", lambda _: b"[]", "can't be read"),
        ("carrier.json", lambda _: b'{"files": {}}', "is not that of this build"),
        ("carrier.json", lambda _: None, "there is no carrier.json"),
    ],
)
def test_a_damaged_carrier_is_built_again_and_that_is_said(mirror, cache, file, damage, word):
    image, _ = build(cache)
    path = image.memory.parent / file
    whole = path.read_bytes()
    changed = damage(whole)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    mirror.forget_calls()
    again, told = build(cache)
    assert "damaged and is built again" in told[0]
    assert word in told[0]
    assert again == image
    assert path.read_bytes() == whole
    assert mirror.calls == []  # the packages were still there


def test_a_damaged_package_in_the_cache_is_downloaded_again(mirror, cache):
    build(cache)
    package = next((cache / "packages").glob("libc6*"))
    package.write_bytes(package.read_bytes()[:-1] + b"!")
    mirror.forget_calls()
    _, told = build(cache, CarrierParts(PARTS.reset_stub, b"new"))
    assert mirror.calls == ["download host"]
    assert any(line.startswith("downloading libc6 ") for line in told)


def test_a_resolution_that_can_not_be_read_is_asked_for_again(mirror, cache):
    build(cache)
    (cache / "resolution.json").write_text('{"format": 1')
    assert build(cache)[1]
    assert build(cache)[1] == []


def test_what_a_killed_process_left_is_removed_by_the_next_build(mirror, cache):
    (cache / ".new-old").mkdir(parents=True)
    (cache / ".new-old/memory.img").write_text("half")
    build(cache)
    assert not (cache / ".new-old").exists()


def test_two_at_once_build_once(mirror, cache):
    results: list[CarrierImage] = []
    threads = [threading.Thread(target=lambda: results.append(build(cache)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len(set(map(str, results))) == 1
    assert mirror.calls.count("install host") == 1


def test_one_that_waits_for_another_says_so(mirror, cache):
    cache.mkdir()
    told: list[str] = []
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def tell(line: str) -> None:
            told.append(line)
            if "waiting" in line:
                fcntl.flock(held, fcntl.LOCK_UN)

        carrier_image(PARTS, cache=cache, tell=tell)
    assert told[0] == "another process builds the carrier: waiting for it"


def test_clean_removes_builds_packages_and_lists(mirror, cache):
    build(cache)
    assert clean(cache) == cache
    assert [path.name for path in cache.iterdir()] == ["lock"]
    assert clean(cache / "nothing there") == cache / "nothing there"
    assert build(cache)[1]


# --- lists of our own ---------------------------------------------------------------------------------------


def test_where_the_host_knows_no_packages_lists_are_fetched(mirror, cache):
    mirror.fail("install-host", "E: Unable to locate package linux-image-cloud-amd64")
    build(cache)
    assert mirror.calls[:3] == ["install host", "update private", "install private"]
    assert set(mirror.calls[3:]) == {"download private"}
    mirror.forget_calls()
    assert build(cache)[1] == []
    assert mirror.calls == []


def test_a_version_that_is_gone_from_the_mirror_is_looked_for_in_newer_lists(mirror, cache):
    mirror.fail("download-host", "E: Failed to fetch http://mirror/x.deb  404  Not Found")
    image, _ = build(cache)
    assert image.linux == "6.1.99"
    assert mirror.calls[:4] == ["install host", "download host", "update private", "install private"]


def test_a_source_that_does_not_answer_matters_only_if_the_packages_are_unknown(mirror, cache):
    mirror.fail("install-host", "E: Unable to locate package")
    mirror.fail("update", "E: Failed to fetch http://other/InRelease")
    assert build(cache)[0].linux == "6.1.99"
