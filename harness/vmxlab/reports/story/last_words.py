"""How a log ends: what its last lines say, and what that usually means."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vmxlab.console.records import Record
from vmxlab.engines.base import MachineEnd
from vmxlab.reports.story import explain
from vmxlab.reports.story.explain import Place
from vmxlab.reports.story.lines import Line, readable
from vmxlab.reports.story.passage import Kind

_OPEN_LIST = b"@vmx ok="
_ASKED_FOR = (MachineEnd.STOPPED, MachineEnd.SHUTDOWN)


class State(Enum):
    """How a log ends."""

    WHOLE = "whole"
    EARLY = "ends early"
    DIED = "the machine died"
    NO_LOG = "no log"
    """No line of it is a record, or was meant as one."""


@dataclass(slots=True)
class LastWords:
    """What was said last, so far. `cut`: a line that was being said when the log, or the machine, ended."""

    cut: Line | None = None
    end: MachineEnd | None = None
    _last: tuple[int, Record] | None = None
    _deadline: bool = False
    _evidence: list[str] = field(default_factory=list)

    def record(self, number: int, record: Record) -> None:
        """A record has come, in line `number`: whoever speaks lives."""
        self._last = (number, record)
        self.end, self._deadline = None, False
        self._evidence.clear()

    def remark(self, text: str) -> Kind:
        """A remark of the harness; whether it tells of a death."""
        end = explain.end_in_remark(text)
        if end is not None or explain.is_deadline(text):
            self._deadline |= end is None
            if end is not MachineEnd.RUNNING:
                self.end = end or self.end
            return Kind.DEATH
        if explain.is_telling(text) and text not in self._evidence:
            self._evidence.append(text)
        return Kind.REMARK

    def judge(self, place: Place) -> tuple[State, list[str]]:
        """How the log ends at `place`, with the sentences that explain it."""
        state, sentences = self._judge(place)
        return state, [] if state is State.WHOLE else [*sentences, *self._quotations()]

    def _judge(self, place: Place) -> tuple[State, list[str]]:
        if self._last is not None and self._last[1].kind == "panic":
            return State.DIED, [explain.PANIC]
        if self.end is not None:
            said = f"{self.end.value[0].upper()}{self.end.value[1:]}."
            sentences = [said, *explain.explain_end(self.end, place)]
            sentences += [f"Its engine: {text}" for text in self._evidence[-explain.TELLING_LINES :]]
            return (self._state_at(place) if self.end in _ASKED_FOR else State.DIED), sentences
        if self._deadline:
            return State.DIED, explain.explain_deadline(place)
        return self._state_at(place), explain.explain_cut(place)

    def _state_at(self, place: Place) -> State:
        """Whether a log of which nobody says that the machine died is whole."""
        if place is Place.DONE:  # what comes after the last case may be cut: machines are stopped there
            return State.WHOLE
        return State.WHOLE if place is Place.IDLE and self.cut is None else State.EARLY

    def _quotations(self) -> list[str]:
        """The last record, and what was being said when the log ended."""
        words = []
        if self._last is not None:
            words.append(f"The last whole record is line {self._last[0]}: {self._last[1]}")
        if self.cut is not None:
            number, said = self.cut.number, readable(self.cut.content, self.cut.lost)
            words.append(f"Line {number} is cut: {said}")
            if self.cut.content.startswith(_OPEN_LIST):
                words.append(explain.OPEN_LIST)
        return words
