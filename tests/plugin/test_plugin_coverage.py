"""pytest --vmx-coverage, and the processor model by need, as a user's suite meets them."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from vmxlab.reports.coverage_file import read_coverage

NEEDS = """
SPP = SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT

def test_case(vmxlab):
    assert vmxlab.model == "corei7_skylake_x"
    run = vmxlab.run(Case(needs=SPP))
    assert run.engine.endswith("(tigerlake)")
    assert vmxlab.model == "tigerlake"
    assert not vmxlab.capabilities.supports(SPP)

@pytest.mark.vmx_needs(SPP, EptVpidCap.page_1g)
def test_marker(vmxlab):
    assert vmxlab.model == "tigerlake"
    assert vmxlab.capabilities.supports(SPP)
    runs = [vmxlab.run(Case()), *vmxlab.run_all([Case()]), *vmxlab.run_image([Case()])]
    assert all(run.engine.endswith("(tigerlake)") for run in runs)

def test_the_next_test_is_back_on_the_default_model(vmxlab):
    assert vmxlab.run(Case()).engine.endswith("(corei7_skylake_x)")

def test_require(vmxlab):
    vmxlab.require_ept("page_1g")
    assert vmxlab.model == "corei7_skylake_x"
    vmxlab.require(SPP)
    assert vmxlab.run(Case(program="cpuid; hlt")).engine.endswith("(tigerlake)")
    assert vmxlab.physical_address_width == 40

def test_nowhere(vmxlab):
    vmxlab.run(Case(needs=SecondaryControls.ENABLE_PCONFIG))
"""


def test_tests_run_on_a_model_that_has_what_they_need(suite):
    suite.write(NEEDS)
    result = suite.run("-rs", "--strict-markers", "--vmx-log-dir", "logs")
    result.assert_outcomes(passed=4, skipped=1)
    result.stdout.re_match_lines(
        [
            r"SKIPPED .*the processor lacks ENABLE_PCONFIG \(IA32_VMX_PROCBASED_CTLS2\[59\] is 0\): "
            r"neither corei7_skylake_x nor another model of bochs has what is needed"
        ]
    )
    result.stdout.re_match_lines_random(
        [
            r"vmxlab: bochs \S+ \(corei7_skylake_x\) ran 1 cases with 1 exits in 1 tests",
            r"vmxlab: bochs \S+ \(tigerlake\) ran 5 cases with 6 exits in 3 tests",
        ]
    )


def test_the_model_that_was_used_is_reported(suite):
    suite.write("""
def test_it(vmxlab):
    vmxlab.run(Case())
    vmxlab.run(Case(needs=SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT))
""")
    result = suite.run("-rA", "--junitxml", "junit.xml")
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines(
        [
            r"-+ vmxlab: processor model by need -+",
            r"case 1 ran on bochs \S+ \(tigerlake\): corei7_skylake_x lacks "
            r"SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT \(IA32_VMX_PROCBASED_CTLS2\[55\] is 0\)",
        ]
    )
    root = ElementTree.parse(suite.path / "junit.xml").getroot()
    found = {p.get("name"): p.get("value") for p in root.iter("property")}
    assert found["vmx_model"] == "corei7_skylake_x,tigerlake"


def test_a_named_model_is_never_left(suite):
    suite.write("""
def test_it(vmxlab):
    vmxlab.run(Case(needs=SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT))
""")
    result = suite.run("-rs", "--vmx-model", "corei7_skylake_x")
    result.assert_outcomes(skipped=1)
    result.stdout.re_match_lines([r"SKIPPED .*IA32_VMX_PROCBASED_CTLS2\[55\] is 0\)$"])


def test_what_no_processor_can_be_asked_for_is_an_error_of_the_test(suite):
    suite.write("""
@pytest.mark.vmx_needs("EPT")
def test_it(vmxlab): pass
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *CaseError: needs: 'EPT' is no control*"])


# --- coverage ----------------------------------------------------------------------------------------------

COVERED = """
@pytest.mark.parametrize("leaf", [0, 1])
def test_cpuid(vmxlab, leaf):
    vmxlab.run_all([Case(program="cpuid; cpuid; hlt"), Case(program="rdmsr; hlt")])
def test_failed_entry(vmxlab):
    vmxlab.run(Case(fields={Field.GUEST_RFLAGS: 0}))
def test_lacking(vmxlab):
    vmxlab.run(Case(needs=SecondaryControls.ENABLE_PCONFIG))
@pytest.mark.vmx_needs(SecondaryControls.ENABLE_PCONFIG)
def test_lacking_by_marker(vmxlab): pass
@pytest.mark.skip
def test_skipped_by_a_marker(vmxlab): pass
@pytest.mark.vmx_known_difference("ept-exit-rf-clear")
def test_differs(vmxlab):
    vmxlab.run(Case(program="invd"))
    assert False
def test_fails(vmxlab):
    vmxlab.run(Case(program="wbinvd"))
    assert False
@pytest.mark.xfail
def test_fails_as_expected_for_no_known_difference(vmxlab):
    assert False
def test_skipped_for_another_reason(vmxlab): pytest.skip("today")
def test_without_a_machine(): pass
"""


@pytest.mark.parametrize(
    "workers",
    [pytest.param(False, id="alone"), pytest.param(True, id="two workers", marks=pytest.mark.slow)],
)
def test_coverage_file_tells_what_each_test_saw_lacked_or_differs_in(suite, workers):
    suite.write(COVERED)
    run = suite.run_workers if workers else suite.run
    # Each worker would boot all models, to find one with what there is nowhere.
    model = ["--vmx-model", "corei7_skylake_x"] if workers else []
    run("--vmx-coverage", "out.jsonl", *model).assert_outcomes(passed=4, failed=1, skipped=4, xfailed=2)
    file = read_coverage(suite.path / "out.jsonl")
    assert file.status == 1
    seen = sorted((line.test, line.models, line.reasons, line.entry_failures) for line in file.seen)
    model = ("corei7_skylake_x",)
    assert seen == [
        ("test_it.py::test_cpuid[0]", model, (10, 12, 31), ()),
        ("test_it.py::test_cpuid[1]", model, (10, 12, 31), ()),
        ("test_it.py::test_failed_entry", model, (), (33,)),
    ]
    bit = "IA32_VMX_PROCBASED_CTLS2[59]"
    lacking = sorted((line.test, line.feature, line.bit) for line in file.lacking)
    assert lacking == [
        ("test_it.py::test_lacking", "ENABLE_PCONFIG", bit),
        ("test_it.py::test_lacking_by_marker", "ENABLE_PCONFIG", bit),
    ]
    assert [(line.test, line.key) for line in file.differs] == [
        ("test_it.py::test_differs", "ept-exit-rf-clear")
    ]
    assert {line.platform.engine for line in (*file.seen, *file.lacking, *file.processors)} == {"bochs"}
    defaults = [line.model for line in file.processors if line.is_default]
    assert defaults == ["corei7_skylake_x"]
    assert ("tigerlake" in {line.model for line in file.processors}) is not workers


def test_coverage_file_that_can_not_be_written_is_a_usage_error(suite):
    suite.write("def test_it(vmxlab): pass")
    result = suite.run("--vmx-coverage", "no/such/folder/file")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = "\n".join(result.outlines + result.errlines)
    assert re.search(r"coverage file \S+no/such/folder/file can't be written: No such file", text)
    assert "Traceback" not in text


def test_coverage_lies_where_the_session_began(suite):
    suite.write("""
def test_goes(vmxlab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vmxlab.run(Case())
""")
    suite.run("--vmx-coverage", "out.jsonl", "--vmx-model", "corei7_skylake_x").assert_outcomes(passed=1)
    file = read_coverage(suite.path / "out.jsonl")
    assert [line.reasons for line in file.seen] == [(12,)]
    assert [line.model for line in file.processors] == ["corei7_skylake_x"]


def test_session_without_a_test_for_it_leaves_a_file_that_can_be_read(suite):
    suite.write("def test_it(): pass")
    suite.run("--vmx-coverage", "out.jsonl").assert_outcomes(passed=1)
    assert read_coverage(suite.path / "out.jsonl").seen == []
