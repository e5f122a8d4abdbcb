"""A passage: one thing that a serial log tells, in words and as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vmxlab.reports.tables import Value


class Kind(StrEnum):
    """What a passage is about."""

    ENGINE = "engine"
    REMARK = "remark"
    """Of the harness: an engine's last words, mostly."""
    TEXT = "text"
    """Of the monitor, or of whatever else was on the line."""
    BOOT = "boot"
    CAPABILITIES = "capabilities"
    CASE = "case"
    OUTCOME = "outcome"
    FAILURE = "failure"
    """The outcome of an instruction that failed."""
    EXIT = "exit"
    RULES = "rules"
    """What the rules of VM entry say of a VMCS that failed."""
    MEMORY = "memory"
    SWEEP = "sweep"
    FAULT = "fault"
    END = "end"
    """Of a case."""
    DONE = "done"
    TROUBLE = "trouble"
    """Damaged or missing lines, records that make no sense, @error."""
    DEATH = "death"
    """@panic, a restart, a post-mortem of the engine."""
    CLOSE = "close"
    """The last one: where and how the log ends."""


@dataclass(frozen=True, slots=True)
class Passage:
    """`line`: where it begins in the log, from 1. `head`: what it is about ("case 3", "exit 2 HLT").

    `text`: what there is to say of it; `notes`: more lines. `place`: RIP and the instruction there.
    """

    line: int
    kind: Kind
    head: str = ""
    text: str = ""
    place: str = ""
    notes: tuple[str, ...] = ()
    data: Mapping[str, Value] = field(default_factory=dict)

    def to_json(self) -> dict[str, Value]:
        """Every word, and the data beside it."""
        words: dict[str, Value] = {"line": self.line, "kind": self.kind.value}
        for name in ("head", "text", "place"):
            if getattr(self, name):
                words[name] = getattr(self, name)
        if self.notes:
            words["notes"] = list(self.notes)
        return words | dict(self.data)
