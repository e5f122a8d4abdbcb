"""The serial log: every byte the machine sent, kept as it came, whatever else happens."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import BinaryIO

from vmxlab.console.records import encode_record
from vmxlab.errors import LogError
from vmxlab.image.code import LoadedCode


class SerialLog:
    """A file that takes the serial stream. Lines that start with '#' are the harness's own remarks.

    Raises LogError where it can't be created or written (no permission, no space): a run whose log is lost
    is not a run.
    """

    def __init__(self, folder: Path) -> None:
        """Make the next free serial-N.log in `folder`: no log overwrites what another machine left."""
        self.path = folder
        self._at_line_start = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._create(folder)
        except OSError as error:
            raise self._error("can't be created", error) from error

    def _create(self, folder: Path) -> BinaryIO:
        for number in itertools.count(1):
            self.path = folder / f"serial-{number}.log"
            try:
                return self.path.open("xb", buffering=0)
            except FileExistsError:
                continue
        raise AssertionError("itertools.count ended")

    def write(self, data: bytes) -> None:
        """Append what arrived. Called by pexpect for each piece it reads."""
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            if data:
                self._at_line_start = data.endswith(b"\n")
        except OSError as error:
            raise self._error("can't be written", error) from error

    def flush(self) -> None:
        """Nothing is buffered (pexpect calls this)."""

    def remark(self, text: str) -> None:
        """Lines of the harness. What the machine left without an end is a line of its own."""
        lines = [b"# " + line.encode("utf-8", "replace") + b"\n" for line in text.splitlines()]
        self.write(b"".join(lines if self._at_line_start else [b"\n", *lines]))

    def code(self, number: int, code: LoadedCode) -> None:
        """Remark the code of case `number`, which is about to start.

        A reader of the log finds these records as it finds the monitor's own (`vmxlab.image.code`); they cost
        nothing on the wire.
        """
        lines = [encode_record("code", values) for values in code.records(number)]
        if lines:
            self.remark("\n".join(lines))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _error(self, what: str, error: OSError) -> LogError:
        return LogError(
            f"the serial log {self.path} {what}: {os.strerror(error.errno or 0)}",
            advice="free some space there, or choose another folder (--log-dir, --vmx-log-dir)",
        ).locate(log_path=self.path)
