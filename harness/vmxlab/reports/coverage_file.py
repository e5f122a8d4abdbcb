"""The coverage file: which exit reasons the tests of a session have seen, on what, and what they lacked.

A line is a JSON object with its `kind`. "head" comes first. Then, by test (its id without the engine):

    seen       it passed; the basic exit reasons of its cases, VM-entry failures apart
    lacking    it was skipped, as no processor of the engine has `feature`, which `bit` tells
    differs    it failed as expected, for the known difference `key`

and at last a "processor" for each model, with its capability MSRs, and "end" with the number of lines before
it: a file without it was cut short.

The file of a session's results (`reports.results.file`) has these lines too, and a "test" for each test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from vmxlab.errors import CoverageError, VmxlabError

if TYPE_CHECKING:
    from vmxlab.console.run import Run
    from vmxlab.engines.base import EngineInfo
    from vmxlab.structures import Capabilities

FORMAT = 1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, order=True)
class Platform:
    """An engine in one version: a column of the coverage table."""

    engine: str
    version: str

    def __str__(self) -> str:
        return f"{self.engine} {self.version}"


@dataclass(frozen=True, slots=True)
class Seen:
    """A test that passed. `reasons` and `entry_failures` are basic exit reasons, in order of appearance."""

    test: str
    platform: Platform
    models: tuple[str, ...]
    reasons: tuple[int, ...]
    entry_failures: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lacking:
    """A test that was skipped for a capability."""

    test: str
    platform: Platform
    feature: str
    bit: str


@dataclass(frozen=True, slots=True)
class Differs:
    """A test that failed as expected for a known difference."""

    test: str
    platform: Platform
    key: str


@dataclass(frozen=True, slots=True)
class Processor:
    """A model that tests may have run on. `is_default`: the one that they run on without a need."""

    platform: Platform
    model: str
    is_default: bool
    capabilities: Capabilities


@dataclass(slots=True)
class CoverageFile:
    """What a file holds. `status` is pytest's exit status."""

    path: Path
    status: int = 0
    seen: list[Seen] = field(default_factory=list)
    lacking: list[Lacking] = field(default_factory=list)
    differs: list[Differs] = field(default_factory=list)
    processors: list[Processor] = field(default_factory=list)


# --- writing -----------------------------------------------------------------------------------------------


def seen_line(where: Mapping[str, str], runs: Sequence[Run]) -> dict[str, object]:
    """The line of a test that passed. `where` has "test", "engine" and "version"."""
    exits = [exit for run in runs for exit in run.exits]
    models = dict.fromkeys(run.engine.rpartition("(")[2].rstrip(")") for run in runs if run.engine)
    return {
        "kind": "seen",
        **where,
        "models": list(models),
        "reasons": list(dict.fromkeys(int(e.reason) for e in exits if not e.entry_failed)),
        "entry_failures": list(dict.fromkeys(int(e.reason) for e in exits if e.entry_failed)),
    }


def processor_line(info: EngineInfo, capabilities: Capabilities, *, is_default: bool) -> dict[str, object]:
    """The line of a processor model."""
    return {
        "kind": "processor",
        "engine": info.name,
        "version": info.version,
        "model": info.model,
        "default": is_default,
        "msrs": capabilities.to_dict(),
    }


class CoverageWriter:
    """Writes a coverage file, line by line. Raises CoverageError where it can't be written.

    `what` it is called in messages, and `head` what its first line says besides: of a file of results.
    """

    def __init__(
        self, path: Path, *, what: str = "coverage", head: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        self._path = path.absolute()
        self._what = what
        self._lines = 0
        try:
            self._file = self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        self.write({"kind": "head", "format": FORMAT, "of": f"vmxlab {what}", **head})

    def write(self, line: Mapping[str, object]) -> None:
        """One line, which is in the file when this returns."""
        self.write_text(json.dumps(line))

    def write_text(self, line: str) -> None:
        """The same for a line that is JSON already."""
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error
        self._lines += 1

    def close(self, processors: Iterable[Mapping[str, object]], status: int) -> None:
        """Write the processors, each model once, and the end."""
        models = {(line["engine"], line["version"], line["model"]): line for line in processors}
        for _, line in sorted(models.items(), key=lambda item: str(item[0])):
            self.write(line)
        self.write({"kind": "end", "lines": self._lines, "status": status})
        self._file.close()

    def _failed(self, error: OSError) -> CoverageError:
        return CoverageError(
            f"the {self._what} file {self._path} can't be written: {os.strerror(error.errno or 0)}"
        )


# --- reading -----------------------------------------------------------------------------------------------


def read_coverage(path: Path) -> CoverageFile:
    """Read a coverage file, or what a file of results says of coverage.

    Raises CoverageError, with the number of the line that is wrong.
    """
    reader = LinesReader(path)
    number = 0
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        reader.take(number, line)
    if not reader.ended:
        raise CoverageError(
            f"{path}, line {number + 1}: the end is missing: the file, or the session, was cut short"
            if number
            else f"{path}, line 1: the file is empty",
            advice="run the tests again, to their end",
        )
    return reader.file


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is no text"
        raise CoverageError(
            f"the coverage file {path} can't be read: {why}",
            advice="pytest --vmx-coverage FILE writes one",
        ) from error


class LinesReader:
    """Takes the lines of a coverage file, or of a file of results, one by one.

    `file` is what they say of coverage; `ended` whether the end has come. A "head" and the "test"s of a file
    of results go to these. `what` the file is called in messages, and `option` is the one that writes it.
    """

    def __init__(
        self,
        path: Path,
        *,
        what: str = "coverage",
        option: str = "--vmx-coverage",
        head: Callable[[Mapping[str, Any]], None] = lambda head: None,
        test: Callable[[Line], None] = lambda line: None,
    ) -> None:
        self.file = CoverageFile(path)
        self.ended = False
        self._what = what
        self._option = option
        self._head = head
        self._takers: Mapping[str, Callable[[Line], None]] = {
            "seen": self._seen,
            "lacking": self._lacking,
            "differs": self._differs,
            "processor": self._processor,
            "test": test,
        }

    def take(self, number: int, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._wrong(number, f"this is no line of a {self._what} file")
        try:
            self._take(number, Line(value))
        except WrongLine as wrong:
            raise self._wrong(number, str(wrong)) from None
        except VmxlabError as error:
            raise self._wrong(number, error.message) from None

    def _take(self, number: int, line: Line) -> None:
        kind = line.get("kind", str)
        if (number == 1) != (kind == "head"):
            raise WrongLine(f"a {self._what} file starts with its head, and has one")
        if self.ended:
            raise WrongLine("the file goes on behind its end")
        if kind == "head":
            if line.get("format", int) != FORMAT:
                raise WrongLine(
                    f"the format is {line.get('format', int)}, this version of vmxlab reads {FORMAT}"
                )
            self._head(line.values)
        elif kind == "end":
            if line.get("lines", int) != number - 1:
                raise WrongLine(
                    f"{line.get('lines', int)} lines were written before the end, {number - 1} are here"
                )
            self.file.status, self.ended = line.get("status", int), True
        elif kind in self._takers:
            self._takers[kind](line)
        else:
            raise WrongLine(f"there is no line of kind {kind!r}")

    def _wrong(self, number: int, problem: str) -> CoverageError:
        return CoverageError(
            f"{self.file.path}, line {number}: {problem}",
            advice=f"a {self._what} file is what pytest {self._option} FILE writes",
        )

    def _seen(self, line: Line) -> None:
        reasons, failures = line.items("reasons", int), line.items("entry_failures", int)
        models = line.items("models", str)
        self.file.seen.append(Seen(line.get("test", str), line.platform, models, reasons, failures))

    def _lacking(self, line: Line) -> None:
        feature, bit = line.get("feature", str), line.get("bit", str)
        self.file.lacking.append(Lacking(line.get("test", str), line.platform, feature, bit))

    def _differs(self, line: Line) -> None:
        self.file.differs.append(Differs(line.get("test", str), line.platform, line.get("key", str)))

    def _processor(self, line: Line) -> None:
        from vmxlab.structures import Capabilities

        capabilities = Capabilities.from_dict(line.get("msrs", dict))
        default, model = line.get("default", bool), line.get("model", str)
        self.file.processors.append(Processor(line.platform, model, default, capabilities))


class WrongLine(Exception):
    """What is wrong with a line."""


class Line:
    """A line's values, each of the kind that it must be."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @property
    def platform(self) -> Platform:
        return Platform(self.get("engine", str), self.get("version", str))

    def get(self, key: str, kind: type[_T]) -> _T:
        value = self.values.get(key)
        if type(value) is not kind:
            raise WrongLine(
                f"{key!r} is missing" if key not in self.values else f"{key!r} is no {kind.__name__}"
            )
        return value

    def items(self, key: str, kind: type[_T]) -> tuple[_T, ...]:
        values = self.get(key, list)
        if not all(type(value) is kind for value in values):
            raise WrongLine(f"{key!r} is no list of {kind.__name__}")
        return tuple(values)
