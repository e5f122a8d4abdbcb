"""One table for three readers: a person at a terminal (rich), a file or a pipe (aligned text), a program.

table = Table((Column("port", "port"), Column("exits", "exits", right=True)), [("0x60", 2), ("0x61", 0)])
table.plain()      # ["port  exits", "----  -----", "0x60      2", "0x61      0"]
table.json_rows()  # [{"port": "0x60", "exits": 2}, ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

Value = str | int | bool | None | Sequence[object] | Mapping[str, object]
"""What may stand in a cell: anything that JSON knows."""

_GAP = "  "
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    `key`: its name for a program. `title`: what stands above it; None is for programs only. `right`: aligned
    to the right. `fold`: may be broken into lines where a terminal is narrow. `joiner`: what stands between
    the items of a list. `style` is rich's, for the whole column; `styles` for single texts in it.
    """

    key: str
    title: str | None
    right: bool = False
    fold: bool = False
    joiner: str = ", "
    style: str = ""
    styles: Mapping[str, str] = field(default_factory=dict)

    def text(self, value: Value) -> str:
        """A value as a person reads it."""
        if value is None or value == "":
            return _NOTHING
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str | int):
            return str(value)
        return self.joiner.join(str(item) for item in value) or _NOTHING


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows; a row has one value a column. `title` stands above it, in one line or more."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    title: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError for a row of another length than the columns'."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {len(row)} values in a table of {len(self.columns)} columns: {row}"
                )

    def json_rows(self) -> list[dict[str, Value]]:
        """A dictionary a row, with every column, those without a title too."""
        keys = [column.key for column in self.columns]
        return [dict(zip(keys, row, strict=True)) for row in self.rows]

    def plain(self) -> list[str]:
        """Aligned text, a line a row, as wide as it needs to be."""
        columns = self._titled()
        lines = [[title for _, _, title in columns], *self._texts()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
        lines.insert(1, ["-" * width for width in widths])
        aligned = [
            _GAP.join(
                text.rjust(width) if column.right else text.ljust(width)
                for text, width, (_, column, _) in zip(line, widths, columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        return [*self.title.splitlines(), *aligned]

    def markdown(self) -> list[str]:
        """The table in Markdown, a line a row, without its title."""
        columns = self._titled()
        lines = [
            [text.replace("|", "\\|") for text in line]
            for line in ([title for _, _, title in columns], *self._texts())
        ]
        lines.insert(1, ["---:" if column.right else "---" for _, column, _ in columns])
        return [f"| {' | '.join(line)} |" for line in lines]

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        columns = self._titled()
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for _, column, title in columns:
            table.add_column(
                title,
                justify="right" if column.right else "left",
                no_wrap=not column.fold,
                overflow="fold",
                style=column.style,
            )
        for line in self._texts():
            cells = zip(line, columns, strict=True)
            table.add_row(*(Text(text, column.styles.get(text, "")) for text, (_, column, _) in cells))
        return table

    def _titled(self) -> list[tuple[int, Column, str]]:
        """The columns that people see: place in the row, column, title."""
        return [(place, c, c.title) for place, c in enumerate(self.columns) if c.title is not None]

    def _texts(self) -> Iterator[list[str]]:
        columns = self._titled()
        for row in self.rows:
            yield [column.text(row[place]) for place, column, _ in columns]
