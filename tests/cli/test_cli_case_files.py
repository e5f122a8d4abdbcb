"""Cases out of Python files."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from vmxlab.cli.case_files import load_cases
from vmxlab.errors import CaseError, OutOfRange


@pytest.fixture(autouse=True)
def _in(folder: Path) -> None:
    pass


def written(text: str, name: str = "cases.py") -> str:
    Path(name).write_text(text)
    return name


def test_all_cases_come_in_their_order_each_with_a_name() -> None:
    file = written(
        "from vmxlab import Case\n"
        "b = Case()\n"
        "a = (Case(), Case(name='own'))\n"
        "_private = Case()\n"
        "other = [1, 2]\n"
        "alias = b\n"
    )
    assert [case.name for case in load_cases(file)] == ["b", "a[0]", "own"]


def test_a_name_too_long_for_a_record_is_left_out() -> None:
    assert [case.name for case in load_cases(written(f"from vmxlab import Case\n{'x' * 65} = Case()\n"))] == [
        ""
    ]


def test_what_stands_beside_the_file_can_be_imported() -> None:
    Path("sub").mkdir()
    written("PROGRAM = 'cpuid; hlt'\n", "sub/shared_programs_of_this_test.py")
    file = written(
        "from vmxlab import Case\n"
        "from shared_programs_of_this_test import PROGRAM\n"
        "a = Case(program=PROGRAM)\n",
        "sub/cases.py",
    )
    assert load_cases(file)[0].program == "cpuid; hlt"


def test_a_file_needs_no_suffix_and_may_define_dataclasses() -> None:
    file = written(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from vmxlab import Case\n"
        "@dataclass\n"
        "class Parameters:\n"
        "    port: int = 1\n"
        "a = Case(program=f'in al, {Parameters().port}; hlt')\n",
        "cases",
    )
    assert load_cases(file)[0].program == "in al, 1; hlt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", "cases.py, line 1: '(' was never closed\n    x = (\n        ^"),
        ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero\n  cases.py, line 2: y = x / 0"),
        (
            "def f():\n    raise KeyError('k')\nf()\n",
            "KeyError: 'k'\n  cases.py, line 2: raise KeyError('k')",
        ),
        ("import nonsense_module\n", "ModuleNotFoundError"),
        ("import sys; sys.exit(7)\n", "SystemExit: 7"),
        ("def test_it(vmxlab): pass\n", "has no cases"),
        ("", "has no cases"),
        ("from vmxlab import Case\na = [Case(), 'b']\n", "a[1] is no Case but str: 'b'"),
    ],
)
def test_a_file_that_gives_no_cases_says_why_and_where(text: str, message: str) -> None:
    with pytest.raises(CaseError) as caught:
        load_cases(written(text))
    assert message in str(caught.value)


def test_a_value_out_of_range_is_told_with_the_line_of_the_file() -> None:
    file = written("from vmxlab import IOBitmap\nIOBitmap.passthrough_all().set_intercept(0x10000, True)\n")
    with pytest.raises(OutOfRange, match="0x10000") as caught:
        load_cases(file)
    assert "cases.py, line 2: IOBitmap" in str(caught.value)


@pytest.mark.parametrize("argument", ["none.py", "none.py::x", ".", "cases.py::x"])
def test_a_file_or_name_that_is_not_there_is_wrong_usage(argument: str) -> None:
    written("from vmxlab import Case\na = Case()\n")
    with pytest.raises(click.UsageError):
        load_cases(argument)
