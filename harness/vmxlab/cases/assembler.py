"""GNU as: from statements of a case to an object file, and from its messages back to the case's lines.

The source is cut into statements here, not by `as`, for two reasons. A message must name the line of the
case and point at the statement, while several programs share one call of `as`. And a comment such as
`# 12 apples` at the start of a line would be taken by `as` for a line marker.

Each statement becomes one line of what `as` reads, so the number in a message leads back to its statement.
The object goes into an anonymous memory file: nothing is left on disk, whatever ends the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmxlab.errors import ProgramError

MESSAGES_SHOWN = 20
"""A program that is wrong everywhere is not shown in full."""

_TIME_LIMIT_S = 20
_OBJECT_LIMIT_BYTES = 64 << 20
_MEMORY_LIMIT_BYTES = 2 << 30

_STATEMENT = re.compile(
    r"""
      (?P<skip>     \#[^\n]* | /\*(?:[^*]|\*(?!/))*(?:\*/|\Z) )     # comments
    | (?P<end>      [;\n] )
    | (?P<text>     [^\#/;\n"']+
                  | "(?:\\[^\n]|[^"\\\n])*(?:"|(?=\n)|\Z)           # a string
                  | '(?:\\[^\n]|[^\\\n])'?                          # a character: 'a  '\n'  ';'
                  | . )
    """,
    re.VERBOSE,
)
_STRING = re.compile(r'"(?:\\.|[^"\\])*"?')
_READS_A_FILE = re.compile(r"(?<![\w.$])\.(?:incbin|include)\b", re.IGNORECASE)
_MESSAGE = re.compile(
    r"^(?P<file>.*?):(?:(?P<line>\d+):)?\s+(?P<kind>Error|Warning|Fatal error|Info): (?P<text>.*)$"
)
_LOST_LABEL = re.compile(r'^local label .*"(?P<number>\d+)" \(instance number')
_LISTING_ROW = re.compile(r"^\s*(?P<line>\d+) (?P<offset>[0-9a-f]{4,}) ", re.MULTILINE)

# What a plain statement may consist of: a mnemonic (with prefixes) and operands of names, numbers, brackets
# and segment overrides. Whatever could define a name or reach beyond its own bytes has another character,
# or is a reference to a numeric label such as 1b or 1f.
_PLAIN = re.compile(
    r"[a-z][a-z0-9]*(?:\s+(?:\b[c-gs]s:|(?!\b\d+[bf]\b)[\w\s,\[\]+*-])*)?\Z",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a source: `line` counts from 1, `column` from 0."""

    line: int
    column: int
    text: str

    @property
    def is_plain(self) -> bool:
        """True for an instruction that defines no name and is no directive, so that it can share a call."""
        return _PLAIN.match(self.text) is not None


@dataclass(frozen=True, slots=True)
class Unit:
    """One program on its way through `as`: its statements, and the lines that go before them."""

    source: str
    prelude: Sequence[str]
    statements: Sequence[Statement]


@dataclass(frozen=True, slots=True)
class Message:
    """What `as` said; `unit` and `statement` are None where it named no line of a program."""

    text: str
    unit: Unit | None = None
    statement: Statement | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What came of one call: the ELF object, or the messages (then the object is not to be used)."""

    elf: bytes
    messages: Sequence[Message]
    listing: str


@dataclass(frozen=True, slots=True)
class Tool:
    """The `as` of this machine. `identity` changes when the program does: it is part of each cache key."""

    path: Path
    identity: str


def find_tool() -> Tool:
    """The assembler on PATH.

    Its identity is taken from the file, not from `as --version`, which would cost as much as a program.

    Raises ProgramError where there is none.
    """
    found = shutil.which("as")
    if found is None:
        raise ProgramError(
            "a guest program written as text needs the GNU assembler, and there is no `as` on PATH",
            advice="apt-get install binutils (or give the program as bytes)",
        )
    path = Path(found).resolve()
    status = path.stat()
    return Tool(path, f"{path}:{status.st_size}:{status.st_mtime_ns}")


def split_statements(source: str) -> list[Statement]:
    """The statements of `source`, without comments; they end at a newline or ';', as for `as` on x86.

    Raises ProgramError for a directive that reads another file (a case must be self-contained) and for a
    comment without an end.
    """
    statements: list[Statement] = []
    parts: list[str] = []
    line, line_start, first = 1, 0, None
    for token in _STATEMENT.finditer(source + "\n"):
        text = token.group()
        if token.lastgroup == "end":
            if first is not None:
                statements.append(Statement(*first, "".join(parts).strip()))
            parts, first = [], None
        elif token.lastgroup == "skip":
            parts.append(" ")
            if text.startswith("/*") and not text.endswith("*/"):
                raise ProgramError(f"the comment that starts in line {line} of the guest program has no end")
        else:
            parts.append(text)
            if first is None and (begins := len(text) - len(text.lstrip())) < len(text):
                first = (line, token.start() + begins - line_start)
        if newlines := text.count("\n"):
            line += newlines
            line_start = token.start() + text.rindex("\n") + 1
    for statement in statements:
        if _READS_A_FILE.search(_STRING.sub('""', statement.text)):
            raise ProgramError(
                "a guest program can't read another file: a case must be self-contained",
                listing=show(Message("refused", Unit(source, (), ()), statement)),
                advice="put the bytes into the program itself, with .byte or .ascii",
            )
    return statements


def run_as(tool: Tool, units: Sequence[Unit], *, listing: bool = False) -> Output:
    """One call of `as` for all `units`. With `listing`, its listing (line numbers and offsets) comes too.

    A warning is a message like any other: all that `as` only warns of ("shortened", "truncated",
    "ambiguous operand size; using default") would be bytes that nobody wrote.

    Raises ProgramError where `as` itself can't run or is stopped by a limit.
    """
    lines = [".intel_syntax noprefix"]
    owners: dict[int, tuple[Unit, Statement]] = {}
    for unit in units:
        lines += unit.prelude
        for statement in unit.statements:
            lines.append(statement.text)
            owners[len(lines)] = (unit, statement)
    code, elf, stdout, stderr = _call(tool, "\n".join(lines) + "\n", ["-aln"] if listing else [])
    messages = _messages(stderr, owners)
    if code != 0 and not messages:
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise ProgramError(
            f"the assembler gave up ({reason}) and named no line",
            listing=stderr.strip(),
            advice="a program that grows without end is stopped; if it does not, does `as` know x86-64?",
        )
    return Output(elf, messages, stdout)


def _call(tool: Tool, text: str, options: Sequence[str]) -> tuple[int, bytes, str, str]:
    """Exit status, object, stdout and stderr of one call of `as`."""
    memory = os.memfd_create("vmxlab-program")
    try:
        output = ["-o", f"/proc/self/fd/{memory}"]
        command = [str(tool.path), "--64", "-mx86-used-note=no", *options, *output, "--"]
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[memory],
                env=environment,
            )
        except OSError as error:
            raise ProgramError(f"the assembler can't be started: {error.strerror}") from error
        with process:
            try:
                _limit(process.pid)
                stdout, stderr = process.communicate(text.encode(), timeout=_TIME_LIMIT_S)
            except subprocess.TimeoutExpired as error:
                raise ProgramError(
                    f"the assembler was not done after {_TIME_LIMIT_S} s",
                    advice="look for a .rept, .skip or .org with too large a count",
                ) from error
            finally:
                process.kill()  # no-op once it has ended
        elf = b"" if process.returncode else _read_all(memory)
        return process.returncode, elf, stdout.decode(errors="replace"), stderr.decode(errors="replace")
    finally:
        os.close(memory)


def _limit(pid: int) -> None:
    """Bound what one call may use. It reads nothing before this is done, as its input is sent afterwards."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_OBJECT_LIMIT_BYTES, _OBJECT_LIMIT_BYTES))
        resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0) if size else b""


def _messages(stderr: str, owners: Mapping[int, tuple[Unit, Statement]]) -> list[Message]:
    """The messages of `as`, each with the statement that it is about."""
    messages = []
    for row in stderr.splitlines():
        match = _MESSAGE.match(row)
        if match is None:
            continue
        text = match["text"].strip()
        unit, statement = owners.get(int(match["line"] or 0)) or _user_of_lost_label(text, owners)
        if match["kind"] != "Info" or unit is not None:
            messages.append(Message(text, unit, statement))
    return messages


def _user_of_lost_label(
    text: str, owners: Mapping[int, tuple[Unit, Statement]]
) -> tuple[Unit, Statement] | tuple[None, None]:
    """The statement with the reference, such as 1f, that `as` notices at the end of its input only."""
    label = _LOST_LABEL.match(text)
    if label is not None:
        reference = re.compile(rf"(?<!\w){label['number']}[bf]\b")
        for unit, statement in owners.values():
            if reference.search(statement.text):
                return unit, statement
    return None, None


def statement_at(unit: Unit, listing: str, offset: int) -> Statement | None:
    """The statement that made the byte at `offset`, from the listing of a call with this unit alone."""
    best = None
    first = 2 + len(unit.prelude)  # after .intel_syntax, and counted from 1
    for row in _LISTING_ROW.finditer(listing):
        index = int(row["line"]) - first
        if int(row["offset"], 16) <= offset and 0 <= index < len(unit.statements):
            best = unit.statements[index]
    return best


def show(message: Message) -> str:
    """One message for people: the line of the case, and below its statement what is wrong with it."""
    if message.unit is None or message.statement is None:
        return message.text
    statement = message.statement
    source_line = message.unit.source.split("\n")[statement.line - 1].rstrip()
    label = f"line {statement.line}: "
    # Tabs are kept, so that the mark stands under the statement whatever a tab is worth.
    indent = "".join(c if c == "\t" else " " for c in source_line[: statement.column])
    mark = "^" + "~" * (min(len(statement.text), len(source_line) - statement.column) - 1)
    return f"{label}{source_line}\n{' ' * len(label)}{indent}{mark} {message.text}"


def failure(messages: Iterable[Message], headline: str) -> ProgramError:
    """The error for a program that these messages are about."""
    shown = list(dict.fromkeys(show(message) for message in messages))  # .rept says the same again and again
    more = len(shown) - MESSAGES_SHOWN
    if more > 0:
        shown[MESSAGES_SHOWN:] = [f"... and {more} more"]
    return ProgramError(headline, listing="\n".join(shown))
