"""The carrier's disk: jobs are where init looks for them, limits are errors, nothing stays behind."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.engines.carrier import disk
from vmxlab.engines.carrier.disk import DISK_BYTES, CarrierDisk

MARK = b"\x02" + b"m" * 31
CARRIER = Path(__file__).parents[3] / "guest" / "carrier"


@pytest.fixture
def made(tmp_path):
    """A disk in tmp_path."""
    found = CarrierDisk(tmp_path / "x.disk", MARK)
    yield found
    found.close()


def open_descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def constant(name: str, file: str = "init.c") -> int:
    """A number of init's."""
    found = re.search(rf"\b{name} = (\d+)", (CARRIER / file).read_text())
    assert found is not None, name
    return int(found[1])


def job_of(path: Path) -> tuple[bytes, int, int, bytes, list[bytes]]:
    """A job as init reads it: struct job is not padded."""
    members = re.search(r"struct job \{(.*?)\n\};", (CARRIER / "init.c").read_text(), re.DOTALL)
    assert members is not None
    names = re.findall(r"^\t(\w+) (\w+)", members[1], re.MULTILINE)
    assert names == [
        ("char", "magic"),
        ("uint32_t", "image_bytes"),
        ("uint32_t", "words"),
        ("char", "mark"),
        ("char", "text"),
    ]
    with path.open("rb") as file:
        file.seek(constant("JOB_SECTOR") * constant("SECTOR_BYTES", "disk.h"))
        data = file.read(constant("JOB_SECTORS") * constant("SECTOR_BYTES", "disk.h"))
    magic, image_bytes, words, mark = struct.unpack_from("=8sII32s", data)
    return magic, image_bytes, words, mark, data[48:].split(b"\0")[:words]


def test_numbers_are_those_of_init():
    assert constant("SECTOR_BYTES", "disk.h") == disk.SECTOR_BYTES
    assert constant("JOB_SECTORS") * disk.SECTOR_BYTES == disk.JOB_BYTES
    assert constant("MARK_BYTES") == disk.MARK_BYTES
    assert constant("MAX_WORDS") == disk.MAX_WORDS
    assert "DATA_SECTOR = JOB_SECTORS" in (CARRIER / "init.c").read_text()
    assert disk.DATA_OFFSET == disk.JOB_BYTES


def test_job_is_where_init_looks_for_it(made):
    image = bytes(range(256)) * 300
    made.write_job(["qemu", "", "-cpu", "höst"], image)
    words = [b"qemu", b"", b"-cpu", "höst".encode()]
    assert job_of(made.path) == (b"VMXLABJB", len(image), 4, MARK, words)
    assert made.path.read_bytes()[disk.DATA_OFFSET :][: len(image)] == image
    assert made.read_data(len(image)) == image


def test_next_job_leaves_nothing_of_the_one_before(made):
    made.write_job(["a" * 1000, "b" * 1000], b"x" * 5000)
    made.write_job(["c"])
    assert made.path.read_bytes()[: disk.JOB_BYTES].rstrip(b"\0").endswith(MARK + b"c")
    assert job_of(made.path)[1:3] == (0, 1)


def test_disk_is_as_long_as_its_geometry_says_and_takes_no_room(made):
    text = " ".join(made.settings())
    cylinders, heads, sectors = (
        int(re.search(rf"{n}=(\d+)", text)[1]) for n in ("cylinders", "heads", "spt")
    )
    status = made.path.stat()
    assert status.st_size == cylinders * heads * sectors * 512 == DISK_BYTES
    assert status.st_blocks * 512 < 1 << 20
    assert status.st_mode & 0o077 == 0
    assert f"path={made.path.name}," in text


@pytest.mark.parametrize("count", [disk.MAX_WORDS, disk.MAX_WORDS + 1])
def test_no_more_words_than_init_has_room_for(made, count):
    words = ["w"] * count
    if count <= disk.MAX_WORDS:
        made.write_job(words)
        assert job_of(made.path)[2] == count
        return
    with pytest.raises(errors.EngineUnavailable, match=rf"{count} arguments of {2 * count} bytes"):
        made.write_job(words)


# The last byte of init's text must be 0 whatever the words are.
ROOM = disk.JOB_BYTES - 48 - 1


@pytest.mark.parametrize("over", [0, 1])
def test_no_longer_words_than_init_has_room_for(made, over):
    word = "w" * (ROOM - 1 + over)
    if not over:
        made.write_job([word])
        assert job_of(made.path)[4] == [word.encode()]
        assert made.path.read_bytes()[disk.JOB_BYTES - 1] == 0
        return
    with pytest.raises(errors.EngineUnavailable, match=rf"{ROOM} bytes"):
        made.write_job([word])


def test_word_with_a_zero_in_it_is_refused_and_says_so(made):
    with pytest.raises(errors.EngineUnavailable, match="zero byte"):
        made.write_job(["good", "b\0d"])


def test_image_that_is_longer_than_the_disk_is_refused(made):
    with pytest.raises(errors.EngineUnavailable, match="disk"):
        made.write_job(["qemu"], bytes(DISK_BYTES - disk.DATA_OFFSET + 1))
    assert made.path.stat().st_size == DISK_BYTES


def test_refused_job_leaves_the_one_before(made):
    made.write_job(["good"], b"image")
    with pytest.raises(errors.EngineUnavailable):
        made.write_job(["w"] * 1000, b"other")
    assert job_of(made.path)[4] == [b"good"]
    assert made.read_data(5) == b"image"


def test_hidden_disk_has_no_name_and_still_works(made, tmp_path):
    (tmp_path / "x.disk.lock").touch()  # Bochs makes it
    made.hide()
    assert list(tmp_path.iterdir()) == []
    made.write_job(["qemu"], b"image")
    assert made.read_data(5) == b"image"
    made.hide()


def test_close_leaves_nothing_behind(tmp_path):
    before = open_descriptors()
    made = CarrierDisk(tmp_path / "x.disk", MARK)
    (tmp_path / "x.disk.lock").touch()
    made.close()
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() == before


def test_file_that_lies_there_is_not_taken(tmp_path):
    (tmp_path / "x.disk").write_text("mine")
    with pytest.raises(errors.LogError, match=r"x\.disk can't be written") as caught:
        CarrierDisk(tmp_path / "x.disk", MARK)
    assert caught.value.log_path == tmp_path / "x.disk"
    assert (tmp_path / "x.disk").read_text() == "mine"


def test_no_room_for_the_file_leaves_none(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_descriptors()
    monkeypatch.setattr(disk.os, "ftruncate", full)
    with pytest.raises(errors.LogError, match="No space left") as caught:
        CarrierDisk(tmp_path / "x.disk", MARK)
    assert "free some space" in caught.value.advice
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() == before


def test_full_disk_is_an_error_with_advice(made, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "pwrite", full)
    with pytest.raises(errors.LogError, match="No space left") as caught:
        made.write_job(["qemu"], b"image")
    assert "free some space" in caught.value.advice


def test_disk_that_takes_only_a_part_is_an_error(made, monkeypatch):
    """As a file system does that becomes full in the middle."""
    real = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", lambda file, data, at: real(file, data[: len(data) // 2], at))
    with pytest.raises(errors.LogError, match="No space left"):
        made.write_job(["qemu"], b"image" * 1000)
