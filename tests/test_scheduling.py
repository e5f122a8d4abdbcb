"""The suite's own rules: what runs on kvm-in-bochs, and in which worker."""

import pytest

from .scheduling import CORE_PARAMETERS, ON_THE_CARRIER, beyond_the_core, place_of, unit_of


def on(engine, parameter, test="tests/exits/test_a.py::test_it"):
    return f"{test}[{engine}-1.0-model-{parameter}]"


def test_all_tests_on_kvm_in_bochs_are_one_unit_and_the_others_of_a_file_another():
    other = "tests/exits/test_b.py::test_it"
    assert {unit_of(on("kvm-in-bochs", n, test)) for n in range(3) for test in (other, "a::b")} == {
        ON_THE_CARRIER
    }
    assert {unit_of(on("bochs", 1)), unit_of("tests/exits/test_a.py::test_2")} == {"tests/exits/test_a.py"}
    assert unit_of("tests/engines/test_x.py::test_of[kvm-in-bochs]") == "tests/engines/test_x.py"


def test_what_takes_long_is_begun_first():
    units = ["tests/sdm/test_s.py", "tests/faults/test_f.py", "tests/exits/test_a.py", ON_THE_CARRIER]
    assert sorted(units, key=place_of) == [
        ON_THE_CARRIER,
        "tests/faults/test_f.py",
        "tests/exits/test_a.py",
        "tests/sdm/test_s.py",
    ]


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (24, [0, 11, 23])])
def test_a_test_runs_with_a_few_of_its_parameters_from_first_to_last(count, kept):
    assert CORE_PARAMETERS == 3
    ids = [on("kvm-in-bochs", n) for n in range(count)]
    assert set(ids) - beyond_the_core(ids) == {ids[n] for n in kept}


def test_nothing_else_is_left_out():
    one, two = "tests/exits/test_a.py::test_it", "tests/exits/test_a.py::test_other"
    ids = [on("kvm-in-bochs", n, test) for n in range(3) for test in (one, two)]
    ids += [on("bochs", n) for n in range(30)] + [f"tests/test_c.py::test[{n}]" for n in range(30)]
    assert beyond_the_core(ids) == set()
