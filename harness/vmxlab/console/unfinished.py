"""Runs that came to no end: of a case whose machine went away, and of one that never ran."""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import TYPE_CHECKING

from vmxlab.cases.case import Case
from vmxlab.console.rebuild import run_from_records
from vmxlab.console.run import End, Run, Verdict
from vmxlab.errors import MachineError, MachineHung, MissingCapability, ProtocolError, VmxlabError

if TYPE_CHECKING:
    from vmxlab.console.session import Session


def crashed_run(error: MachineError, case: Case, number: int, session: Session) -> Run:
    """What had arrived of a case when its machine went away; of damaged records, those before the damage."""
    error.locate(case=case.name or f"case {number}")
    records = session.records
    starts = [i for i, record in enumerate(records) if record.starts_case]
    records = records[starts[-1] :] if starts else []

    def partial(count: int) -> Run | None:
        try:
            return run_from_records(
                records[:count],
                case,
                engine=session.machine.info.title(),
                log_path=session.log.path,
                error=error,
                verdict_on_error=Verdict.CRASH,
            )
        except ProtocolError:
            return None

    # One record that does not fit spoils all behind it, so the good ones are found by halving.
    good = len(records)
    if partial(good) is None:
        good = bisect.bisect_left(range(1, good + 1), True, key=lambda count: partial(count) is None)
    run = partial(good)
    assert run is not None
    end = End.HUNG if isinstance(error, MachineHung) else End.DIED
    return replace(run, end=end, number=number, name=case.name)


def failed_run(case: Case, number: int, error: VmxlabError) -> Run:
    """The run of a case that did not run, or whose records can't be trusted: SKIP, ERROR or CRASH."""
    if isinstance(error, MachineError) and error.run is not None:
        return error.run
    verdict, end = Verdict.ERROR, None
    if isinstance(error, MissingCapability):
        verdict = Verdict.SKIP
    elif isinstance(error, MachineError):  # it never got as far as the case
        verdict, end = Verdict.CRASH, End.HUNG if isinstance(error, MachineHung) else End.DIED
    return Run(
        case=case,
        number=number,
        name=case.name,
        end=end,
        error=error,
        verdict_on_error=verdict,
        engine=error.engine or "",
        log_path=error.log_path,
    )
