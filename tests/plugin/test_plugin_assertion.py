"""Which assertions are taken along out of a test, and as what."""

import pytest

from vmxlab import Case, Run
from vmxlab.console.run import Exit
from vmxlab.pytest_plugin.assertion import failed_assertion

FIRST, SECOND = (Run(Case(), n, exits=(Exit(0, 12), Exit(1, 10))) for n in range(2))
RUNS = [FIRST, SECOND]


def taken(test):
    """What is taken of a test that fails: the run's number, the statement, the names in it."""
    with pytest.raises(AssertionError) as caught:
        test()
    found = failed_assertion(caught, RUNS)
    if found is None:
        return None
    run, asserted = found
    return run.number, asserted.statement, {**asserted.names, **asserted.expressions}


def about_one():
    mine, limit = SECOND, 3
    assert len(mine.exits) == limit, f"no {limit}"


def about_its_parts():
    exits = FIRST.exits
    last = exits[-1]
    assert last.number == len(exits)


def in_a_comprehension():
    run = FIRST
    assert [exit_.number for exit_ in run.exits] == []


def about_two():
    one, two = RUNS
    assert one.exits != two.exits


def about_parts_of_two():
    one, two = FIRST.exits[0], SECOND
    assert one.number == two.number


def with_another_of_the_name():
    run, mine = 5, FIRST
    assert len(mine.exits) == run


def about_none():
    number = 1
    assert number == 2


def by_a_helper():
    pytest.fail("as it is")


def of_several_lines():
    run = FIRST
    # fmt: off
    assert (
        run.number
        == 7
    )
    # fmt: on


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (about_one, (1, "assert len(run.exits) == limit", {"limit": 3})),
        (
            about_its_parts,
            (0, "assert last.number == len(exits)", {"exits": "run.exits", "last": "run.exits[1]"}),
        ),
        (in_a_comprehension, (0, "assert [exit_.number for exit_ in run.exits] == []", {})),
        (of_several_lines, (0, "assert run.number == 7", {})),
        (about_two, None),
        (about_parts_of_two, None),
        (with_another_of_the_name, None),
        (about_none, None),
    ],
)
def test_assertion_about_one_run_is_taken_along(test, expected):
    assert taken(test) == expected


def test_failure_without_an_assertion_is_left_where_it_is():
    with pytest.raises(pytest.fail.Exception) as caught:
        by_a_helper()
    assert failed_assertion(caught, RUNS) is None
