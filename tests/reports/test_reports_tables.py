"""A table for a person at a terminal, for a file, and for a program."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from vmxlab.reports.tables import Column, Table

COLUMNS = (
    Column("port", "port"),
    Column("exits", "exits", right=True),
    Column("changed", "changed", joiner=" ", fold=True),
    Column("raw", None),
)
TABLE = Table(COLUMNS, [("0x60", 2, ["rax=0x1", "rdx=0x2"], "0x600048"), ("0xcf8", 10, [], "0x0")])


def on_terminal(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_plain_text_is_aligned_and_has_no_trailing_blanks() -> None:
    assert TABLE.plain() == [
        "port   exits  changed",
        "-----  -----  ---------------",
        "0x60       2  rax=0x1 rdx=0x2",
        "0xcf8     10  -",
    ]


def test_a_title_stands_above_in_as_many_lines_as_it_has() -> None:
    assert Table(COLUMNS[:1], [("0x60",)], "one\ntwo").plain()[:3] == ["one", "two", "port"]


def test_a_program_gets_every_column_with_its_value_as_it_is() -> None:
    rows = TABLE.json_rows()
    assert rows[0] == {"port": "0x60", "exits": 2, "changed": ["rax=0x1", "rdx=0x2"], "raw": "0x600048"}
    assert json.loads(json.dumps(rows)) == rows


def test_a_table_without_rows_still_has_its_head() -> None:
    assert Table(COLUMNS, []).plain() == ["port  exits  changed", "----  -----  -------"]
    assert Table(COLUMNS, []).json_rows() == []


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row of 1 values in a table of 4"):
        Table(COLUMNS, [("0x60",)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (17, "17"),
        ([], "-"),
        (["a", "b"], "a, b"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
    ],
)
def test_what_a_person_reads_in_a_cell(value: object, text: str) -> None:
    assert Table((Column("x", "x"),), [(value,)]).plain()[-1] == text  # type: ignore[list-item]


def test_a_terminal_shows_the_same_cells() -> None:
    lines = on_terminal(TABLE, 80)
    assert [line.split() for line in (lines[0], *lines[2:])] == [
        ["port", "exits", "changed"],
        ["0x60", "2", "rax=0x1", "rdx=0x2"],
        ["0xcf8", "10", "-"],
    ]


def test_square_brackets_are_no_markup() -> None:
    table = Table((Column("i", "instruction"),), [("mov [rax], rbx",)])
    assert "mov [rax], rbx" in "\n".join(on_terminal(table, 80))


def test_a_narrow_terminal_folds_only_what_may_be_folded_and_loses_nothing() -> None:
    lines = on_terminal(TABLE, 24)
    assert max(map(len, lines)) <= 24
    assert any("0x60" in line and "rax=0x1" in line and "rdx" not in line for line in lines)
    assert any("rdx=0x2" in line for line in lines)
