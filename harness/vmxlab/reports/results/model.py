"""What is known of a session when it is over: its tests, their cases, and the structures of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vmxlab.console.run import Run, Verdict
from vmxlab.reports.disassembly import Code


class TestVerdict(Enum):
    """What became of a test: the five verdicts, and the two kinds of failures that were expected.

    The value is what stands in a file; what a verdict is called for people, and in which order, is here too.
    """

    __test__ = False  # a name that pytest would take for a test class

    CRASH = "crash"
    """It failed because the target died, or stopped answering."""
    FAIL = "fail"
    ERROR = "error"
    """Our own fault, the test's or the case's: the processor did not get to answer."""
    KNOWN = "known"
    """It failed as expected, for a known difference of the engine."""
    XFAIL = "xfail"
    """It failed as expected, for another reason."""
    SKIP = "skip"
    PASS = "pass"

    @property
    def words(self) -> str:
        """ "known difference"."""
        return {"known": "known difference", "xfail": "expected failure"}.get(self.value) or str(self.value)

    @property
    def is_bad(self) -> bool:
        """Whether somebody should look at it."""
        return self in (TestVerdict.CRASH, TestVerdict.FAIL, TestVerdict.ERROR)


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """A rule of VM entry that a failed one broke, in words; `values` are the fields that it reads."""

    rule: str
    section: str
    sentence: str
    values: Mapping[str, str]
    detail: str


@dataclass(frozen=True, slots=True)
class RecordedCase:
    """A case. `run` is made of its records alone; what these don't hold stands beside it.

    `exits` is how many there were, `reasons` how many by basic exit reason. `run` may hold the first only;
    `left_out` says how many records are missing here for that, and `unkept` has the descriptions of those
    exits. `log_lines` are what the log holds of it. Of a case from a bare log nothing but the run is known:
    `code`, `source` and all behind it are empty.
    """

    run: Run
    verdict: Verdict
    why: str
    exits: int
    reasons: Mapping[int, int]
    log_lines: Sequence[str]
    left_out: int = 0
    unkept: Sequence[str] = ()
    code: Code | None = None
    program: bytes = b""
    at_entry: Mapping[str, int] | None = None
    source: str = ""
    mode: str = ""
    controls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By the name of a ControlSet what was written, and what the baseline writes."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """VMCS fields that the case gives."""
    io_bitmap: str | None = None
    """The digest of a structure, or `facts.ALL` or `facts.NONE`."""
    msr_bitmap: str | None = None
    ept: str | None = None
    eptp: int | None = None
    broken: tuple[BrokenRule, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordedTest:
    """A test. `name` is its id without the engine; `engine` is "" for one that runs on none.

    `why` is one line: the reason of a skip, the known difference. `text` is the failure, as pytest shows it.
    `new_structures` are those that no test before had, by their digests.
    """

    id: str
    name: str
    verdict: TestVerdict
    engine: str = ""
    version: str = ""
    seconds: float | None = None
    why: str = ""
    text: str = ""
    sections: Sequence[tuple[str, str]] = ()
    cases: Sequence[RecordedCase] = ()
    new_structures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def platform(self) -> str:
        """ "bochs 2.7"; "" for a test that runs on no engine."""
        return f"{self.engine} {self.version}".rstrip()
