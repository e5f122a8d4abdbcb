"""The fixture `vmxlab`: one machine, every case in a test, and a crash that is one test's own."""

import re
from xml.etree import ElementTree

import pytest

from .conftest import BOCHS_ID, README


def test_examples_of_the_readme_pass_and_their_ids_say_where_they_ran(suite):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    examples = [block for block in blocks if "def test_" in block]
    suite.write("\n".join(examples), name="test_readme", imports=False)
    result = suite.run("-v")
    result.assert_outcomes(passed=3)
    result.stdout.re_match_lines([rf"test_readme\.py::test_\w+{BOCHS_ID} PASSED.*"])


def test_model_stands_in_the_id_and_is_the_one_that_runs(suite):
    suite.write("""
def test_it(vmxlab):
    run = vmxlab.run(Case())
    assert "core2_penryn_t9600" in run.engine
    assert not vmxlab.capabilities.supports(SecondaryControls.ENABLE_EPT)
""")
    result = suite.run("-v", "--vmx-model", "core2_penryn_t9600")
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines([r".*::test_it\[bochs-[\w.]+-core2_penryn_t9600\] PASSED.*"])


def test_one_machine_serves_all_tests(suite):
    suite.write("""
@pytest.mark.parametrize("number", range(3))
def test_it(vmxlab, number):
    run = vmxlab.run(Case(program=f"mov eax, {number}; hlt"))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == number
""")
    suite.run("--vmx-log-dir", "logs").assert_outcomes(passed=3)
    (log,) = (suite.path / "logs").glob("serial-*.log")
    assert log.read_text().count("@end ") == 3


CRASHES = """
KILLS = Case(name="kills", fields={Field.HOST_CR3: 0x3f00000})

def test_before(vmxlab):
    assert vmxlab.run(Case()).reasons == [ExitReason.HLT]

def test_crashes(vmxlab):
    vmxlab.run(KILLS)

def test_after(vmxlab):
    assert vmxlab.run(Case()).reasons == [ExitReason.HLT]

def test_crash_among_others(vmxlab):
    for runs in (vmxlab.run_all([Case(), KILLS, Case()]), vmxlab.run_image([Case(), KILLS, Case()])):
        assert [run.verdict.name for run in runs] == ["PASS", "CRASH", "PASS"]

def test_last(vmxlab):
    assert vmxlab.run(Case()).reasons == [ExitReason.HLT]
"""


def test_crashed_machine_fails_its_own_test_only(suite):
    suite.write(CRASHES)
    result = suite.run()
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.re_match_lines([r"_+ test_crashes\[.*", r"E  .*MachineDied: .*"])


def test_order_of_the_tests_does_not_matter(suite):
    suite.write(CRASHES)
    suite.write("def pytest_collection_modifyitems(items): items.reverse()", name="conftest")
    result = suite.run("-v")
    result.assert_outcomes(passed=4, failed=1)
    first = next(line for line in result.outlines if "::test_" in line)
    assert "::test_last[" in first


def test_suite_that_does_not_use_the_fixture_starts_no_machine_and_makes_no_logs(suite, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("a machine was started")

    monkeypatch.setattr("vmxlab.engines.bochs.BochsEngine.open", refuse)
    suite.write("def test_it(): assert Case().program")
    for arguments in ((), ("--vmx-keep",), ("--vmx-log-dir", "logs")):
        result = suite.run(*arguments, engine=None)
        result.assert_outcomes(passed=1)
        result.stdout.no_re_match_line(r"vmxlab: (logs are in|\S+ \S+ \(\S+\) ran ).*")
    assert list(suite.temporary.iterdir()) == []
    assert not (suite.path / "logs").exists()


def test_lab_behind_the_fixture_knows_why_its_engine_was_chosen(suite):
    suite.write("def test_it(vmxlab): assert vmxlab.lab.info.why == 'named by --vmx-engine'")
    suite.run().assert_outcomes(passed=1)
    suite.write("def test_it(vmxlab): assert vmxlab.lab.info.why.startswith('auto: ')")
    result = suite.run(engine=None)
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines([r"vmxlab: \w+ [\w.]+ \(\w+\); auto: .*"])


# --- two workers -------------------------------------------------------------------------------------------

IN_WORKERS = """
@pytest.mark.parametrize("number", range(8))
def test_it(vmxlab, number):
    runs = vmxlab.run_all([Case(name=f"case-{number}", program="cpuid; hlt")] * 2)
    assert all(run.reasons == [ExitReason.CPUID, ExitReason.HLT] for run in runs)
    assert number != 2

@pytest.mark.vmx_known_difference("no-such")
def test_differs(vmxlab): pass
"""


@pytest.mark.slow
def test_workers_of_xdist_have_a_machine_each_and_one_report(suite):
    """The summary counts all; a failure shows its records; what a marker gets wrong is an error."""
    suite.write(IN_WORKERS)
    result = suite.run_workers("--junitxml", "junit.xml")
    result.assert_outcomes(passed=7, failed=1, errors=1)
    result.stdout.re_match_lines(
        [r"vmxlab: bochs \S+ \(corei7_skylake_x\) ran 16 cases with 32 exits in 8 tests"]
    )
    (folder,) = suite.log_folders()
    result.stdout.re_match_lines(
        [r"-+ vmxlab case \d+ \(case-2\) on bochs .*", rf"log: {folder}/serial-\d+\.log"]
    )
    result.stdout.fnmatch_lines([f"vmxlab: logs are in {folder}"])
    result.stdout.fnmatch_lines(["*there is no known difference 'no-such'*"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    text = "".join(log.read_text() for log in folder.glob("serial-*.log"))
    assert sorted(re.findall(r"name=case-(\d)", text)) == sorted("01234567" * 2)
    junit = (suite.path / "junit.xml").read_text()
    assert junit.count('name="vmx_engine" value="bochs ') == 9


LIVE = """
kept = []

def test_plain_call(vmxlab):
    vm = vmxlab.live()
    kept.append(vm)
    vm.io_bitmap.set_intercept(0x60, True)
    assert vm.enter("in al, 0x60").reason is ExitReason.IO_INSTRUCTION
    assert vmxlab.run(Case(program="in al, 0x60; hlt")).reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]

def test_context(vmxlab):
    with pytest.raises(Exception, match="closed"):
        kept[0].resume()
    with vmxlab.live(Case(registers={"rbx": 5})) as vm:
        assert vm.enter("hlt").registers["rbx"] == 5
        kept.append(vm)

def test_failing(vmxlab):
    vm = vmxlab.live()
    assert vm.enter("cpuid").reason is ExitReason.HLT

def test_lacking(vmxlab):
    vmxlab.live(Case(enable=SecondaryControls.ENABLE_PCONFIG))

def test_dying(vmxlab):
    vm = vmxlab.live()
    vm.vmwrite(Field.HOST_CR3, 0x3f00000)
    vm.enter("hlt")

def test_after(vmxlab):
    assert vmxlab.live().enter("hlt").reason is ExitReason.HLT
"""


def exits_in_junit(path):
    """The exits of each test that had some and ended."""
    tests = ElementTree.parse(path).iter("testcase")
    names = {"test_plain_call", "test_context", "test_failing"}
    return {
        test.get("name").partition("[")[0]: int(prop.get("value"))
        for test in tests
        for prop in test.iter("property")
        if prop.get("name") == "vmx_exits" and test.get("name").partition("[")[0] in names
    }


def test_a_live_machine_is_the_test_s_own_and_shares_the_machine(suite):
    suite.write(LIVE)
    result = suite.run("--vmx-log-dir", "logs", "--junit-xml", "junit.xml")
    result.assert_outcomes(passed=3, failed=2, skipped=1)
    # Two exits of a case, and one of each VM entry of a live machine.
    assert exits_in_junit(suite.path / "junit.xml") == {
        "test_plain_call": 3,
        "test_context": 1,
        "test_failing": 1,
    }
    result.stdout.re_match_lines([r"vmxlab: bochs .* ran 1 cases with 6 exits in \d tests"])
    logs = list((suite.path / "logs").glob("serial-*.log"))
    # One that died, one after it, and those of the models that were asked for PCONFIG.
    assert sum("@live " in log.read_text() for log in logs) == 2
    result.stdout.re_match_lines(
        [
            r".*vmxlab: the last \d+ commands of a live machine on bochs .*",
            r"exit 0: CPUID, RIP 0x8000",
            r"log: .*serial-1\.log",
        ]
    )
    result.stdout.re_match_lines([r".*MachineDied: the machine ended .*triple fault.*"])
