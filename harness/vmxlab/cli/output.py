"""Where a command writes: to a terminal with rich, to anything else as plain text."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from vmxlab.cli.common import Status
from vmxlab.reports.tables import Table

if TYPE_CHECKING:
    from rich.console import Console

    from vmxlab.reports.story import Passage


@dataclass(slots=True)
class Ending:
    """How a command was ended before its work was done; None where it was not."""

    status: Status | None = None


@contextlib.contextmanager
def ends_quietly() -> Iterator[Ending]:
    """For a command that people watch: Ctrl-C, or a reader that has seen enough, ends it without a word."""
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt:
        ending.status = Status.INTERRUPTED
    except BrokenPipeError:
        ending.status = Status.CLOSED_PIPE
        # Python flushes standard output when it ends, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Output:
    """Standard output, for people."""

    def __init__(self) -> None:
        self._console: Console | None = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)

    def line(self, text: str = "", style: str = "") -> None:
        """A line of text; a terminal breaks it where it has to."""
        self.words((text, style))

    def words(self, *parts: tuple[str, str]) -> None:
        """One line of several parts, each with its style."""
        if self._console is None:
            click.echo("".join(text for text, _ in parts).rstrip())
            return
        from rich.text import Text

        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def passage(self, passage: Passage) -> None:
        """A passage of a log's story; a terminal folds its lines."""
        from vmxlab.reports.story.layout import lay_out

        for words in lay_out(passage, self._console.width if self._console else None):
            self.words(*words)

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Labels with their texts, aligned; a terminal breaks a long text under itself."""
        pairs = list(pairs)
        width = max(len(label) for label, _ in pairs)
        if self._console is None:
            for label, text in pairs:
                click.echo(f"{label.ljust(width)}  {text}".rstrip())
            return
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in pairs:
            grid.add_row(Text(label), Text(text))
        self._console.print(grid)

    def table(self, table: Table) -> None:
        """A table with its title, and an empty line after it."""
        if self._console is None:
            for line in table.plain():
                click.echo(line)
        else:
            if table.title:
                self.line(table.title, "bold")
            self._console.print(table.rich())
        click.echo()


def write_json(value: object) -> None:
    """A value as JSON on standard output, and nothing else."""
    click.echo(json.dumps(value, indent=2))


def say(text: str) -> None:
    """A remark on standard error, which no pipe takes for a result."""
    click.echo(f"vmxlab: {text}", err=True)
