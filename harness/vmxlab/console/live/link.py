"""The link of a live machine: scripts out, runs back, and what is known when there is none any more."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from vmxlab.console.rebuild import run_from_records
from vmxlab.console.run import End, Outcome, Run
from vmxlab.errors import L1Fault, LiveStateLost, MachineError, ProtocolError, VmxlabError

if TYPE_CHECKING:
    from vmxlab.console.lab import Lab
    from vmxlab.console.session import Session
    from vmxlab.image.code import LoadedCode

_E = TypeVar("_E", bound=VmxlabError)

_RECENT = 20
_ADVICE = "restart() sets it up anew, on a machine that is up"


class LiveLink:
    """Sends the scripts of one live machine to a lab's machine, as long as that is its own.

    It is until a case runs on it, another live machine begins, or it ends. `uninterrupted` makes a context
    for each exchange: whoever handles Ctrl-C puts one there that lets the machine answer first.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._numbers = itertools.count(1)
        self._ended: BaseException | None = None
        self._closed = False
        self.recent: deque[Run] = deque(maxlen=_RECENT)
        """What the last commands did, for whoever has to explain a failure."""
        self.uninterrupted: Callable[[], AbstractContextManager[object]] = nullcontext

    def begin(self, processors: int) -> Session:
        """Take the lab's machine, booted where none is up, with nothing set up on it."""
        self._ended, self._closed = None, False
        with self.uninterrupted():
            return self._lab.begin_live(self, processors)

    def close(self) -> None:
        """Give the machine back; the next case, or live machine, undoes what is set up on it."""
        self._closed = True
        self._lab.end_live(self)

    @property
    def alive(self) -> bool:
        """Whether what was set up is still there."""
        return self._lab.is_live(self)

    def send(
        self, units: Sequence[bytes], deadline_s: float | None = None, code: LoadedCode | None = None
    ) -> Run:
        """Run a script behind what the last one left. `Run.outcomes` tell of each instruction.

        `code` is what L2 may execute in it, for the log.

        Raises L1Fault where L1 took a fault, MachineError where the machine died or hung, LiveStateLost
        where it had gone before.
        """
        self._refuse_where_lost()
        number = next(self._numbers)
        try:
            with self.uninterrupted():
                session, records = self._lab.live_exchange(number, units, deadline_s, code)
        except BaseException as error:
            if not self.alive:
                self._ended = error
            raise
        run = run_from_records(records, engine=session.machine.info.title(), log_path=session.log.path)
        self.recent.append(run)
        if run.number != number:
            raise session.located(
                ProtocolError(f"live command {number} was sent, records of {run.number} came back")
            )
        if run.end is End.SCRIPT:
            raise session.located(ProtocolError("the monitor could not read a live command"))
        if run.faults:
            raise session.located(L1Fault(run.faults[-1]))
        return run

    def located(self, error: _E) -> _E:
        """The error, with the engine, the last record and the log."""
        return self._lab.session().located(error) if self.alive else error

    def _refuse_where_lost(self) -> None:
        if self.alive:
            return
        if self._closed:
            raise LiveStateLost("this live machine was closed", advice=_ADVICE)
        ended = self._ended
        if ended is None:
            raise LiveStateLost(
                "the machine has run a case, begun another live session, or been stopped since: "
                "what was set up is undone",
                advice=_ADVICE,
            )
        why = ended.message if isinstance(ended, VmxlabError) else "it was interrupted in a command"
        lost = LiveStateLost(f"the machine is gone: {why}", advice=_ADVICE)
        if isinstance(ended, MachineError):
            lost.locate(engine=ended.engine, last_record=ended.last_record, log_path=ended.log_path)
        raise lost


def last_outcome(run: Run, operation: str) -> Outcome:
    """The last outcome of `operation`, which is the command's own. KeyError where there is none."""
    for outcome in reversed(run.outcomes):
        if outcome.operation == operation:
            return outcome
    raise KeyError(operation)
