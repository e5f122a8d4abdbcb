"""Guest programs: what a case has the processor do under the monitor, written as assembly text.

    >>> assemble("in al, 0x60; hlt").code
    b'\\xe4`\\xf4'

The text is Intel syntax without prefixes, as GNU as reads it with `.intel_syntax noprefix`: statements end at
a newline or ';', '#' starts a comment, labels and directives are there. What comes back is final: the
program knows its address, so nothing is left to link.

One start of `as` costs more than hundreds of snippets, so `assemble_many` puts all plain ones into one
call, and what was assembled once is kept, in memory and in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, cached_property

from vmxlab.cases import assembler, object_file
from vmxlab.cases.assembler import Message, Statement, Unit, split_statements, statement_at
from vmxlab.cases.object_file import Place
from vmxlab.cases.program_cache import Assembled, ProgramCache, default_folder
from vmxlab.errors import OutOfRange, ProgramError

MAX_PROGRAM_BYTES = 0x8000
DEFAULT_ORIGIN = 0x8000

_CACHE_FORMAT = 1
"""Part of each key; raise it when what is made of a source changes."""

_NO_SYMBOLS: Mapping[str, int] = {}
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

# In Intel syntax these are registers, sizes and operators: `as` would take a constant of that name for them.
_RESERVED = re.compile(
    r"""(?:[re]?(?:[abcd]x|[sd]i|[sb]p|ip) | [abcd][hl] | [sd]il | [sb]pl | r(?:[89]|[12]\d|3[01])[dwbl]?
        | [c-gs]s | (?:cr|dr|tr|db|k|st|mm|bnd|tmm|[xyz]mm)\d+ | st | [er]iz | flat
        | byte | tbyte | (?:d|f|q|o|mm|[xyz]mm)?word | near | far | short | offset | ptr
        | and | or | xor | not | mod | shl | shr | eq | ne | lt | le | gt | ge)\Z""",
    re.VERBOSE | re.IGNORECASE,
)


class Mode(Enum):
    """What the guest processor takes the bytes for."""

    LONG = "64-bit"
    PROTECTED = "32-bit"
    REAL = "16-bit"

    @property
    def bits(self) -> int:
        """64, 32 or 16: the default size of an address."""
        return int(self.value.removesuffix("-bit"))


@dataclass(frozen=True, slots=True)
class Program:
    """A guest program ready to be loaded at `origin`; `symbols` are its labels with their addresses."""

    code: bytes
    origin: int
    mode: Mode
    source: str
    symbols: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Request:
    """A program to assemble: its text, and the constants that it may use by name (`symbols`).

    `origin` is the address (in real mode: the offset) of the first byte, which all labels count from.

    Raises ProgramError for a source that is not text, OutOfRange for an origin or a constant that the mode
    or 64 bits can't hold, and ProgramError for a constant's name that `as` would take for something else.
    """

    source: str
    mode: Mode = Mode.LONG
    origin: int = DEFAULT_ORIGIN
    symbols: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_text(self.source)
        if not 0 <= self.origin < 1 << self.mode.bits:
            limit = f"an address of {self.mode.value} code has {self.mode.bits} bits"
            raise OutOfRange("origin", self.origin, limit)
        object.__setattr__(self, "symbols", dict(self.symbols))
        for name, value in self.symbols.items():
            if not _SYMBOL.match(name) or _RESERVED.match(name):
                raise ProgramError(
                    f"a constant can't be called {name!r}",
                    advice="letters, digits and _, and not a register or a word of the assembler",
                )
            if not -(1 << 63) <= value < 1 << 64:
                raise OutOfRange(f"constant {name}", value, "it must fit in 64 bits")


def _check_text(source: object) -> None:
    if not isinstance(source, str):
        raise ProgramError(f"a guest program's source is text, not {type(source).__name__}")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise ProgramError(f"the guest program holds {source[error.start]!r}, which is not text") from error
    text = _with_plain_newlines(source)
    found = _CONTROL_CHARACTER.search(text)
    if found is not None:
        line = text.count("\n", 0, found.start()) + 1
        raise ProgramError(f"the guest program holds the control character {found.group()!r} in line {line}")


def _with_plain_newlines(source: str) -> str:
    return source.replace("\r\n", "\n")


@dataclass(frozen=True, slots=True)
class _Job:
    """A request that no cache knew, on its way through `as`."""

    key: str
    request: Request
    statements: Sequence[Statement]

    @property
    def shareable(self) -> bool:
        """Whether it can go into one call with others: no name in it can bind to one of theirs."""
        return bool(self.statements) and all(statement.is_plain for statement in self.statements)

    def unit(self, section: str) -> Unit:
        constants = [f".set {name}, {value}" for name, value in self.request.symbols.items()]
        prelude = [f'.section {section}, "ax", @progbits', f".code{self.request.mode.bits}", *constants]
        return Unit(_with_plain_newlines(self.request.source), prelude, self.statements)

    def place(self, section: str) -> Place:
        bits = self.request.mode.bits
        limit = min(MAX_PROGRAM_BYTES, (1 << bits) - self.request.origin)
        return Place(section, self.request.origin, bits, limit)


class Assembler:
    """Turns requests into programs and remembers them; `cache` is where it keeps them beyond the process."""

    def __init__(self, cache: ProgramCache) -> None:
        self._cache = cache
        self._known: dict[str, Assembled] = {}

    @cached_property
    def _tool(self) -> assembler.Tool:
        return assembler.find_tool()

    def assemble_many(self, requests: Sequence[Request]) -> list[Program]:
        """The programs of `requests`, in their order, with as few calls of `as` as their names allow.

        Raises ProgramError for the first one that fails. By then all the good ones are cached: a caller who
        wants each one's own error can go on with single calls and pays only for the bad ones.
        """
        keys = [self._key(request) for request in requests]
        errors: dict[str, ProgramError] = {}
        jobs = []
        for key, request in dict(zip(keys, requests, strict=True)).items():
            if self._recall(key):
                continue
            try:
                statements = split_statements(_with_plain_newlines(request.source))
            except ProgramError as error:
                errors[key] = error
            else:
                jobs.append(_Job(key, request, statements))
        for group in _groups(jobs):
            errors |= self._assemble_group(group)
        for key in keys:
            if key in errors:
                raise errors[key]
        return [self._program(request, key) for request, key in zip(requests, keys, strict=True)]

    def _key(self, request: Request) -> str:
        """All that the bytes depend on, as a digest."""
        if not request.source.strip():
            return ""  # no bytes, whatever else is asked: needs no assembler
        parts = [_CACHE_FORMAT, self._tool.identity, request.source, request.mode.name, request.origin]
        return hashlib.sha256(json.dumps([*parts, sorted(request.symbols.items())]).encode()).hexdigest()

    def _recall(self, key: str) -> bool:
        if key not in self._known:
            stored = self._cache.get(key) if key else Assembled(b"", {})
            if stored is None:
                return False
            self._known[key] = stored
        return True

    def _program(self, request: Request, key: str) -> Program:
        known = self._known[key]
        return Program(known.code, request.origin, request.mode, request.source, dict(known.labels))

    def _assemble_group(self, group: Sequence[_Job]) -> dict[str, ProgramError]:
        """Assemble and keep each of the group: in one call if that works out. Returns the errors by key."""
        done: dict[str, Assembled] = {}
        if len(group) > 1:
            with contextlib.suppress(ProgramError):  # whose it is shows when each is tried alone
                done = _assemble_together(self._tool, group)
        errors: dict[str, ProgramError] = {}
        for job in group:
            if job.key not in done:
                try:
                    done[job.key] = _assemble_alone(self._tool, job)
                except ProgramError as error:
                    errors[job.key] = error
        self._known |= done
        for key, program in done.items():
            self._cache.put(key, program)
        return errors


def _groups(jobs: Iterable[_Job]) -> list[list[_Job]]:
    """The jobs that go through `as` together: plain ones with the same constants. The others go alone."""
    shared: dict[tuple[tuple[str, int], ...], list[_Job]] = {}
    alone = []
    for job in jobs:
        if job.shareable:
            shared.setdefault(tuple(sorted(job.request.symbols.items())), []).append(job)
        else:
            alone.append([job])
    return [*shared.values(), *alone]


def _assemble_together(tool: assembler.Tool, jobs: Sequence[_Job]) -> dict[str, Assembled]:
    """The programs of one call for all `jobs`, each in a section of its own. One that is missing has to be
    tried alone; where `as` has complaints, the jobs without go through it once more.

    Raises ProgramError where `as` gives up.
    """
    sections = [f".text.{number}" for number in range(len(jobs))]
    units = [job.unit(section) for job, section in zip(jobs, sections, strict=True)]
    output = assembler.run_as(tool, units)
    if output.messages:
        bad = {id(message.unit) for message in output.messages}
        good = [job for job, unit in zip(jobs, units, strict=True) if id(unit) not in bad]
        return _assemble_together(tool, good) if good and len(good) < len(jobs) else {}
    places = [job.place(section) for job, section in zip(jobs, sections, strict=True)]
    return {
        job.key: Assembled(loaded.code, {})
        for job, loaded in zip(jobs, object_file.load(output.elf, places), strict=True)
        if not loaded.problems and not loaded.labels
    }


def _assemble_alone(tool: assembler.Tool, job: _Job) -> Assembled:
    """The program of a call of its own.

    Raises ProgramError with the messages of `as`, or with what the object holds that can't be loaded.
    """
    if not job.statements:
        return Assembled(b"", {})
    unit = job.unit(".text")
    output = assembler.run_as(tool, [unit])
    if output.messages:
        raise assembler.failure(output.messages, "the guest program does not assemble")
    (loaded,) = object_file.load(output.elf, [job.place(".text")])
    if not loaded.problems:
        return Assembled(loaded.code, loaded.labels)
    listing = assembler.run_as(tool, [unit], listing=True).listing
    messages = [
        Message(p.text) if p.offset is None else Message(p.text, unit, statement_at(unit, listing, p.offset))
        for p in loaded.problems
    ]
    raise assembler.failure(messages, "the guest program can't be loaded")


@cache
def _shared_assembler() -> Assembler:
    """The one that the functions below use: made when first wanted, as it looks for the user's folders."""
    return Assembler(ProgramCache(default_folder()))


def assemble(
    source: str,
    mode: Mode = Mode.LONG,
    origin: int = DEFAULT_ORIGIN,
    symbols: Mapping[str, int] = _NO_SYMBOLS,
) -> Program:
    """Assemble one guest program for the address `origin`; `symbols` are constants it may use by name.

    No source at all is a program of no bytes. At most `MAX_PROGRAM_BYTES` come out.

    Raises ProgramError whose `listing` shows each message under the line of `source` that it is about, and
    OutOfRange for an origin or a constant that does not fit.
    """
    return assemble_many([Request(source, mode, origin, symbols)])[0]


def assemble_many(requests: Sequence[Request]) -> list[Program]:
    """Assemble all `requests`, those that can share a call of `as` in one. See `Assembler.assemble_many`."""
    return _shared_assembler().assemble_many(requests)
