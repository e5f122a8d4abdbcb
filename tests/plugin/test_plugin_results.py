"""pytest --vmx-results: each test of a suite with its verdict and its cases, alone and with workers."""

import re

import pytest

from vmxlab.reports.coverage_file import read_coverage
from vmxlab.reports.results.file import read_results
from vmxlab.reports.results.model import TestVerdict

SUITE = """
import os
@pytest.mark.parametrize("leaf", [0, 1])
def test_passes(vmxlab, leaf):
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    program = "in al, 0x60; cpuid; hlt"
    vmxlab.run(Case(name="asks", io_bitmap=bitmap, program=program, registers={"rbx": leaf}))
def test_fails(vmxlab):
    print("it said this")
    vmxlab.run_all([Case(name="one"), Case(name="two", program="cpuid; hlt")])
    assert False, "because"
def test_dies(vmxlab):
    vmxlab.run(Case(name="dies", program="cpuid; jmp .", disable=PinControls.ACTIVATE_PREEMPTION_TIMER,
                    limits=Limits(seconds=1)))
def test_wrong_case(vmxlab):
    vmxlab.run(Case(program="no such thing"))
@pytest.fixture
def broken(vmxlab): raise RuntimeError("a fixture")
def test_setup(broken): pass
@pytest.fixture
def torn(vmxlab):
    yield
    raise RuntimeError("a teardown")
def test_teardown(torn): pass
def test_lacks(vmxlab):
    vmxlab.run(Case(needs=SecondaryControls.ENABLE_PCONFIG))
@pytest.mark.vmx_known_difference("ept-exit-rf-clear")
def test_known(vmxlab):
    vmxlab.run(Case())
    assert False
@pytest.mark.xfail(reason="some day")
def test_expected(vmxlab): assert False
def test_without_an_engine(): pass
def test_without_an_engine_fails(): raise KeyError("host")
"""

WITH_WORKERS = """
def test_kills_its_worker(vmxlab):
    import os
    os._exit(9)
"""


def results_of(suite):
    tests = {}
    results = read_results(suite.path / "out.jsonl", lambda test: tests.setdefault(test.name, test))
    return results, {name.removeprefix("test_it.py::test_"): test for name, test in tests.items()}


ARGUMENTS = ["--vmx-results", "out.jsonl", "--vmx-model", "corei7_skylake_x", "--vmx-log-dir", "logs"]


def test_each_test_has_its_verdict_and_its_cases(suite):
    suite.write(SUITE)
    suite.run(*ARGUMENTS).assert_outcomes(passed=4, failed=4, skipped=1, xfailed=2, errors=2)
    results, tests = results_of(suite)
    check(suite, results, tests)


@pytest.mark.slow
def test_it_is_the_same_with_workers_though_one_dies_and_a_file_can_not_be_collected(suite):
    suite.write(SUITE + WITH_WORKERS)
    suite.write("import no_such_module", "test_other", imports=False)
    result = suite.run_workers(*ARGUMENTS, "--continue-on-collection-errors")
    result.assert_outcomes(passed=4, failed=5, skipped=1, xfailed=2, errors=3)
    results, tests = results_of(suite)
    other, died = tests.pop("test_other.py"), tests.pop("kills_its_worker")
    assert (other.verdict, other.why) == (TestVerdict.ERROR, "it can't be collected")
    assert "no_such_module" in other.text
    assert (died.verdict, died.engine) == (TestVerdict.ERROR, "bochs")
    assert "crashed" in died.text
    check(suite, results, tests)


def check(suite, results, tests):
    """What the file has of SUITE."""
    assert {name: test.verdict for name, test in tests.items()} == {
        "passes[0]": TestVerdict.PASS,
        "passes[1]": TestVerdict.PASS,
        "fails": TestVerdict.FAIL,
        "dies": TestVerdict.CRASH,
        "wrong_case": TestVerdict.ERROR,
        "setup": TestVerdict.ERROR,
        "teardown": TestVerdict.ERROR,
        "lacks": TestVerdict.SKIP,
        "known": TestVerdict.KNOWN,
        "expected": TestVerdict.XFAIL,
        "without_an_engine": TestVerdict.PASS,
        "without_an_engine_fails": TestVerdict.FAIL,
    }
    assert tests["known"].why == "ept-exit-rf-clear"
    assert tests["expected"].why == "some day"
    assert tests["lacks"].why.startswith(
        "the processor lacks ENABLE_PCONFIG (IA32_VMX_PROCBASED_CTLS2[59] is 0)"
    )
    assert tests["dies"].why.startswith("nothing more came before the deadline")
    assert (tests["fails"].why, tests["setup"].why) == ("because", "a fixture")
    assert 'assert False, "because"' in tests["fails"].text
    assert ("Captured stdout call", "it said this\n") in tests["fails"].sections
    ((_, reproducer),) = (section for section in tests["fails"].sections if "reproducer" in section[0])
    assert "/logs/failed/" in reproducer
    assert tests["passes[0]"].text == "" and "KeyError" in tests["without_an_engine_fails"].text
    assert re.fullmatch(r"test_it\.py::test_fails\[bochs-[\w.]+-corei7_skylake_x\]", tests["fails"].id)
    assert (tests["fails"].engine, tests["without_an_engine"].engine) == ("bochs", "")
    shown = {name: [case.run.name for case in test.cases] for name, test in tests.items() if test.cases}
    case_name = shown.pop("known")
    assert len(case_name) == 1
    assert shown == {"passes[0]": ["asks"], "passes[1]": ["asks"], "fails": ["one", "two"], "dies": ["dies"]}
    (asked,) = tests["passes[1]"].cases
    assert [exit_.reason_name for exit_ in asked.run.exits] == ["IO_INSTRUCTION", "CPUID", "HLT"]
    assert asked.at_entry["rbx"] == 1
    assert asked.run.log_path.is_file()
    structures = {digest for test in tests.values() for digest in test.new_structures}
    assert {case.io_bitmap for test in tests.values() for case in test.cases} <= structures | {"all"}
    assert results.is_whole
    assert results.coverage.status == 1
    assert " ".join(ARGUMENTS) in " ".join(results.head["arguments"])
    assert {line.test for line in read_coverage(suite.path / "out.jsonl").seen} == {
        f"test_it.py::test_{name}" for name in ("passes[0]", "passes[1]", "teardown")
    }


def test_session_that_is_interrupted_has_what_ran(suite):
    suite.write("""
def test_runs(vmxlab): vmxlab.run(Case())
def test_stops(vmxlab):
    vmxlab.run(Case())
    raise KeyboardInterrupt
def test_later(vmxlab): pass
""")
    suite.run(*ARGUMENTS)
    results, tests = results_of(suite)
    assert {name: test.verdict for name, test in tests.items()} == {
        "runs": TestVerdict.PASS,
        "stops": TestVerdict.ERROR,
    }
    assert tests["stops"].why == "the session ended in the middle of it"
    assert (results.is_whole, results.coverage.status) == (True, 2)


def test_file_that_can_not_be_written_is_a_usage_error(suite):
    suite.write("def test_it(vmxlab): pass")
    result = suite.run("--vmx-results", "no/such/folder/file")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = "\n".join(result.outlines + result.errlines)
    assert re.search(r"results file \S+no/such/folder/file can't be written: No such file", text)
    assert "Traceback" not in text
