"""A serial log told as a story, as it comes: bytes in, passages out.

    teller = Storyteller()
    for piece in stream:
        for passage in teller.feed(piece):
            ...
    for passage in teller.close():  # the last one says where and how the log ends
        ...

Nothing that stands in a log makes it raise: what can't be read is a passage that says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vmxlab.console.records import Record, damage_of, parse_line
from vmxlab.console.run import Run, Verdict
from vmxlab.console.session import capabilities_from_record
from vmxlab.errors import VmxlabError
from vmxlab.image.protocol import CONSOLE_PROMPT
from vmxlab.oracle.entry import Environment
from vmxlab.reports.disassembly import Code
from vmxlab.reports.story import explain
from vmxlab.reports.story.case import CaseTeller, environment_of
from vmxlab.reports.story.explain import Place
from vmxlab.reports.story.last_words import LastWords, State
from vmxlab.reports.story.lines import Line, LineReader, readable
from vmxlab.reports.story.machine import count_of, told_boot, told_capabilities, told_fault, told_panic
from vmxlab.reports.story.passage import Kind, Passage
from vmxlab.reports.tables import Value
from vmxlab.structures import Capabilities

_PROMPT = CONSOLE_PROMPT.encode()
_REMARK = b"# "
_ENGINE = "engine: "

_IN_A_CASE = frozenset({"vmx", "exit", "vmcs", "snapshot", "sweep", "memory", "fault", "end"})


@dataclass(frozen=True, slots=True)
class Told:
    """A case that was told, for a reader who wants them all."""

    line: int
    title: str
    is_live: bool
    run: Run
    code: Code | None
    broken_rules: tuple[str, ...]


@dataclass(slots=True)
class Storyteller:
    """Reads one log. `keep`: what came of each case is kept in `told`; `with_data`: see `CaseTeller`."""

    keep: bool = False
    with_data: bool = False
    told: list[Told] = field(default_factory=list)
    engine: str = ""
    boot: Record | None = None
    capabilities: Capabilities | None = None
    state: State = State.EARLY
    damaged: int = 0
    """Lines that are damaged, and records that are missing or make no sense."""
    cases: int = 0
    exits: int = 0
    verdicts: set[Verdict] = field(default_factory=set)
    """Of the cases."""
    refused: int = 0
    """@error records."""
    deaths: int = 0
    """Panics, restarts in the middle of a case, machines whose engine says that they died."""
    _lines: LineReader = field(default_factory=LineReader)
    _case: CaseTeller | None = None
    _codes: dict[int, list[Record]] = field(default_factory=dict)
    _sent: int | None = None
    """The case whose code the harness has just written: it is the next to come."""
    _live_codes: list[Record] = field(default_factory=list)
    _live_before: CaseTeller | None = None
    _environment: Environment | None = None
    _place: Place = Place.BEFORE_BOOT
    _held: Line | None = None
    """A damaged line: what a machine was saying when it died, if the engine's last words follow."""
    _words: LastWords = field(default_factory=LastWords)
    _typed: bool = False
    """Something was typed at the last prompt."""
    _meant: bool = False
    _any: bool = False

    # --- the stream -------------------------------------------------------------------------------------

    def feed(self, piece: bytes) -> Iterator[Passage]:
        """What the lines tell that `piece` completes."""
        for line in self._lines.feed(piece):
            yield from self._line(line)

    def close(self) -> Iterator[Passage]:
        """The stream has ended: what is left, and how the log ends."""
        rest = self._lines.close()
        if rest is not None:
            yield from self._last_line(rest)
        if self._held is not None:
            self._words.cut, self._held = self._held, None
        if self._case is not None:
            yield from self._case.finish_vmcs(cut=True)
        yield self._close()

    def _line(self, line: Line) -> Iterator[Passage]:
        self._any = True
        content = line.content
        if content.startswith(_REMARK) and b"@code" not in content[:8]:
            yield from self._remark(line)
            return
        record = None if line.lost else parse_line(content)
        if not content.strip():
            return
        if self._held is not None:
            yield self._broken(self._held)
            self._held = None
        if record is not None:
            self._meant = True
            yield from self._record(line, record)
        elif not line.lost and damage_of(content) is not None:
            self._meant = True
            self._held = line
        else:
            yield from self._text(line)

    def _last_line(self, line: Line) -> Iterator[Passage]:
        """What stands behind the last line end: a prompt, or what was cut."""
        self._any = True
        content = line.content
        record = None if line.lost else parse_line(content)
        if record is not None or content == _PROMPT or content.startswith(_REMARK):
            yield from self._line(line)
        elif content.strip():
            if self._held is not None:
                yield self._broken(self._held)
            if content.startswith(_PROMPT) and damage_of(content) is None:
                self._held = None
                yield from self._text(line)
            else:
                self._held = line
                self._meant |= damage_of(content) is not None

    # --- lines that are no records ----------------------------------------------------------------------

    def _text(self, line: Line) -> Iterator[Passage]:
        content = line.content
        if content.startswith(_PROMPT):
            if self._case is None or not self._case.by_hand:
                yield from self._leave("the prompt is back")
            self._place = Place.IDLE
            self._meant = True
            self._typed = bool(content[len(_PROMPT) :].strip())
            if not self._typed:
                return
        yield Passage(line.number, Kind.TEXT, "", readable(content, line.lost))

    def _remark(self, line: Line) -> Iterator[Passage]:
        self._meant = True
        text = readable(line.content[len(_REMARK) :], line.lost)
        if text.startswith(_ENGINE):
            self.engine = text.removeprefix(_ENGINE)
            yield Passage(line.number, Kind.ENGINE, "engine", self.engine)
            return
        kind = self._words.remark(text)
        yield Passage(line.number, kind, "machine" if kind is Kind.DEATH else "", text)

    def _broken(self, line: Line) -> Passage:
        self.damaged += 1
        if self._case is not None:
            self._case.whole = False
        why = damage_of(line.content) or "not a whole record"
        text = f"line {line.number}: {why}: {readable(line.content)}"
        return Passage(line.number, Kind.TROUBLE, "broken line", text)

    # --- records ----------------------------------------------------------------------------------------

    def _record(self, line: Line, record: Record) -> Iterator[Passage]:
        if record.kind != "code":
            self._words.record(line.number, record)
        if line.content.startswith(_PROMPT):
            self._place = Place.IDLE
        try:
            yield from self._known(line.number, record)
        except (KeyError, ValueError, VmxlabError) as error:
            self.damaged += 1
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            text = f"line {line.number}: a record that makes no sense ({why}): {readable(line.content)}"
            yield Passage(line.number, Kind.TROUBLE, "record", text)
        if record.kind != "code":
            self._sent = None

    def _known(self, line: int, record: Record) -> Iterator[Passage]:
        match record.kind:
            case "code":
                self._take_code(record)
            case "boot":
                yield from self._take_boot(line, record)
            case "caps":
                yield self._take_caps(line, record)
            case "case" | "live":
                yield from self._leave(f"{record.kind} {record.number('id')} begins")
                yield from self._enter(line, record)
            case "done":
                yield from self._leave("the image is done")
                self._place = Place.DONE
                yield Passage(
                    line, Kind.DONE, "done", f"the image ran {count_of(record.number('cases'), 'case')}"
                )
            case "error":
                self.refused += 1
                what = record.values["what"]
                yield Passage(line, Kind.TROUBLE, "error", f"{what}: {explain.explain_error(what)}")
            case "panic":
                self.deaths += 1
                yield told_panic(line, record)
            case "fault" if self._case is None or self._case.by_hand:
                yield told_fault(line, record)
            case kind if kind in _IN_A_CASE:
                yield from self._in_a_case(line, record)
            case _:
                yield Passage(line, Kind.TEXT, record.kind, f"a record of a kind not known here: {record}")

    def _take_code(self, record: Record) -> None:
        number = record.number("id")
        if self._case is not None and self._case.builder.number == number:
            self._case.add_code([record])
        else:
            Code.from_records([record])
            self._codes.setdefault(number, []).append(record)
            self._sent = number

    def _take_boot(self, line: int, record: Record) -> Iterator[Passage]:
        if self.boot is not None:
            yield from self._restart(line)
        self.boot, self._place = record, Place.BOOT
        self._live_codes.clear()
        self._live_before = None
        yield told_boot(line, record)

    def _restart(self, line: int) -> Iterator[Passage]:
        self._end_by_hand()
        case, where = self._case, self._where()
        if case is None:
            yield Passage(line, Kind.TEXT, "restart", where)
            return
        self.deaths += 1
        yield from case.finish_vmcs()
        self._finish(case)
        yield Passage(line, Kind.DEATH, "restart", where, notes=(explain.RESTART,))

    def _take_caps(self, line: int, record: Record) -> Passage:
        self.capabilities = capabilities_from_record(record)
        self._environment = environment_of(self.boot, record) if self.boot is not None else None
        return told_capabilities(line, record, self.capabilities)

    # --- cases ------------------------------------------------------------------------------------------

    def _enter(self, line: int, record: Record | None) -> Iterator[Passage]:
        """A case begins; `record` None: its start is missing."""
        case = CaseTeller(line, self._environment, self.with_data)
        if record is None and self._place is Place.IDLE and self._typed:
            case.by_hand = True
            self._case = case
            yield Passage(line, Kind.CASE, "by hand", "")
            return
        if record is None:
            case.whole = False
            self._case = case
            self.damaged += 1
            yield Passage(line, Kind.TROUBLE, "missing", "the start of this case")
            if self._sent is not None:
                case.add_code(self._codes.pop(self._sent))
            return
        case.is_live = record.kind == "live"
        passages = list(case.start(record))
        self._case = case
        codes = self._codes.pop(case.builder.number, [])
        if case.is_live:  # L2's memory and registers stay from one command to the next
            self._live_codes += codes
            codes = self._live_codes
            if self._live_before is not None:
                case.registers = self._live_before.registers
        else:
            self._live_codes.clear()
        if codes:
            case.add_code(codes)
        yield from passages

    def _in_a_case(self, line: int, record: Record) -> Iterator[Passage]:
        if record.kind == "exit" and record.number("n") == 0:
            self._end_by_hand(with_exits=True)
        if self._case is None:
            yield from self._enter(line, None)
        case = self._case
        assert case is not None
        was_whole = case.whole
        yield from case.take(line, record)
        self.damaged += was_whole and not case.whole
        self.exits += record.kind == "exit"
        if record.kind == "end":
            self._finish(case)
            self._place = Place.BETWEEN

    def _end_by_hand(self, *, with_exits: bool = False) -> None:
        """What was done at the prompt is over, which nothing tells; `with_exits`: if it had any."""
        case = self._case
        if case is not None and case.by_hand and (case.builder.exits or not with_exits):
            self._case = None

    def _leave(self, what: str) -> Iterator[Passage]:
        """Something came that no open case can be followed by."""
        self._end_by_hand()
        case = self._case
        if case is None:
            return
        yield from case.finish_vmcs()
        self.damaged += 1
        case.whole = False
        self._finish(case)
        yield Passage(self._lines.number, Kind.TROUBLE, "missing", f"the end of {case.title}; {what}")

    def _finish(self, case: CaseTeller) -> None:
        self._case = None
        self._live_before = case if case.is_live else None
        self.cases += 1
        run = case.run()
        self.verdicts.add(run.verdict)
        if self.keep:
            self.told.append(Told(case.line, case.title, case.is_live, run, case.code, case.broken))

    # --- the end ----------------------------------------------------------------------------------------

    def _where(self) -> str:
        if self._case is not None:
            return self._case.where
        return self._place.value

    def _close(self) -> Passage:
        self._end_by_hand()
        case, place = self._case, self._place
        where = self._where()
        if case is not None:
            place = case.place
            self._finish(case)
        elif place is Place.IDLE and self._sent is not None:
            place, where = Place.SENT, f"at the prompt: case {self._sent} was sent"
        if not self._meant:
            return self._no_log()
        self.state, notes = self._words.judge(place)
        self.deaths += self.state is State.DIED
        if case is not None:
            notes[:0] = [f"That is {place.value}.", *case.program(place)]
        counts = f"{count_of(self.cases, 'case')}, {count_of(self.exits, 'exit')}"
        if self.damaged:
            counts += f", {count_of(self.damaged, 'line')} damaged, missing, or without sense"
        head = {State.WHOLE: "whole", State.DIED: "died"}.get(self.state, "ends early")
        text = f"{counts}; it ends {where}" if self.state is State.WHOLE else f"{where} ({counts})"
        return self._last_passage(head, text, notes)

    def _no_log(self) -> Passage:
        self.state = State.NO_LOG
        text = "no line of it is a record of the monitor" if self._any else "it is empty"
        return self._last_passage("no log", text, [explain.NO_LOG])

    def _last_passage(self, head: str, text: str, notes: list[str]) -> Passage:
        data: dict[str, Value] = {
            "state": self.state.value,
            "cases": self.cases,
            "exits": self.exits,
            "damaged": self.damaged,
            "machine": self._words.end.name if self._words.end is not None else None,
        }
        return Passage(self._lines.number, Kind.CLOSE, head, text, notes=tuple(notes), data=data)
