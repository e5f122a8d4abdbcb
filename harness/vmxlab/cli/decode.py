"""`vmxlab decode`: a serial log as a readable story."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Status, json_option
from vmxlab.cli.output import Output, ends_quietly, write_json
from vmxlab.reports.log_file import read_log

if TYPE_CHECKING:
    from vmxlab.reports.story import Passage, Storyteller


@click.command()
@click.argument("log", type=click.Path(path_type=Path, allow_dash=True))
@json_option
def decode(log: Path, as_json: bool) -> int:
    """Tell what stands in LOG, a serial log of the monitor, whole or cut off.

    The capabilities; each case; each exit with its reason, its qualification, the L2 instruction at RIP and
    what was changed; the broken rules of VM entries that failed; where the machine died, and what that
    usually means.

    LOG "-" is standard input; what comes there is told as it comes: tail -f log | vmxlab decode -

    Exit status: 0 the log is whole and nothing died in it, 2 usage, 3 it can't be read, or lines of it are
    damaged, or the monitor refused what it was given; 4 the machine died, or the log ends early.
    """
    from vmxlab.reports.story import Storyteller

    teller = Storyteller(with_data=as_json)
    with ends_quietly() as ending:
        if as_json:
            passages = [passage.to_json() for passage in _passages(teller, log)]
            write_json({"log": str(log), "story": passages, "status": int(_status(teller))})
        else:
            output = Output()
            for passage in _passages(teller, log):
                output.passage(passage)
    return _status(teller) if ending.status is None else ending.status


def _passages(teller: Storyteller, log: Path) -> Iterator[Passage]:
    for piece in read_log(log):
        yield from teller.feed(piece)
    yield from teller.close()


def _status(teller: Storyteller) -> Status:
    from vmxlab.console.run import Verdict
    from vmxlab.reports.story import State

    if teller.state is State.NO_LOG:
        return Status.ERROR
    if teller.deaths or teller.state is not State.WHOLE:
        return Status.CRASH
    if teller.damaged or teller.refused or Verdict.ERROR in teller.verdicts:
        return Status.ERROR
    return Status.PASS
