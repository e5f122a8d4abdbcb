"""The disk between the harness and a running carrier: what is too long for a serial line.

A file of the host that Bochs reads and writes at each access, so what is written here is what the carrier's
init (guest/carrier/init.c) reads next. It has no name once Bochs has opened it: nothing stays behind,
whatever ends the harness.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from vmxlab import errors
from vmxlab.engines.logs import log_error

SECTOR_BYTES = 512
JOB_BYTES = 16 * SECTOR_BYTES
DATA_OFFSET = JOB_BYTES
MARK_BYTES = 32
MAX_WORDS = 120

# Bochs wants a disk's geometry, and the file exactly so long: 160 cylinders are 82 MB, more than the RAM of a
# machine. The file is sparse.
HEADS, SECTORS_PER_TRACK, CYLINDERS = 16, 63, 160
DISK_BYTES = CYLINDERS * HEADS * SECTORS_PER_TRACK * SECTOR_BYTES

_HEADER = struct.Struct(f"<8sII{MARK_BYTES}s")
_MAGIC = b"VMXLABJB"


class CarrierDisk:
    """One disk file. `path` is for Bochs, and gone after `hide`."""

    def __init__(self, path: Path, mark: bytes) -> None:
        self.path = path
        self._mark = mark
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise log_error(path, error) from error
        try:
            os.ftruncate(self._file, DISK_BYTES)
        except OSError as error:
            self.close()
            raise log_error(path, error) from error

    def settings(self) -> list[str]:
        """The lines of the bochsrc. Its other disk controllers are off."""
        geometry = f"cylinders={CYLINDERS}, heads={HEADS}, spt={SECTORS_PER_TRACK}"
        return [
            "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
            f"ata0-master: type=disk, mode=flat, path={self.path.name}, {geometry}, biosdetect=none",
            *(f"ata{number}: enabled=0" for number in (1, 2, 3)),
        ]

    def write_job(self, words: Sequence[str], image: bytes = b"") -> None:
        """Put a job on the disk: QEMU's arguments and the image that it boots, or the modules' parameters.

        Raises EngineUnavailable for words that are too many or too long, LogError if the disk is full.
        """
        text = b"".join(word.encode() + b"\0" for word in words)
        if len(words) > MAX_WORDS or _HEADER.size + len(text) >= JOB_BYTES:
            raise _refused(
                f"{len(words)} arguments of {len(text)} bytes are more than the carrier takes "
                f"({MAX_WORDS} arguments, {JOB_BYTES - _HEADER.size - 1} bytes)",
                "give fewer switches",
            )
        if any("\0" in word for word in words):
            raise _refused("no argument can have a zero byte in it", "leave it out")
        if len(image) > DISK_BYTES - DATA_OFFSET:
            raise _refused(
                f"an image of {len(image)} bytes is more than the carrier's disk takes "
                f"({DISK_BYTES - DATA_OFFSET} bytes)",
                "boot a smaller image",
            )
        header = _HEADER.pack(_MAGIC, len(image), len(words), self._mark)
        self._write((header + text).ljust(JOB_BYTES, b"\0"), 0)
        self._write(image, DATA_OFFSET)

    def read_data(self, length: int) -> bytes:
        """What init has put there."""
        return os.pread(self._file, length, DATA_OFFSET)

    def _write(self, data: bytes, offset: int) -> None:
        try:
            written = os.pwrite(self._file, data, offset)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise log_error(self.path, error) from error

    def hide(self) -> None:
        """Take the file's name away, and that of the lock which Bochs makes beside it."""
        for path in (self.path, self.path.with_name(self.path.name + ".lock")):
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Give the file back."""
        self.hide()
        os.close(self._file)


def _refused(problem: str, advice: str) -> errors.EngineUnavailable:
    return errors.EngineUnavailable(f"engine kvm-in-bochs: {problem}", advice=advice)
