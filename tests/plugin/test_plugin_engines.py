"""The engines that the options name, those that can't run, and what each lacks."""

import pytest

from vmxlab.engines.base import Availability
from vmxlab.engines.differences import KnownDifference
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.tcg import TcgEngine

from .conftest import BOCHS_ID

needs_tcg = pytest.mark.skipif(not TcgEngine().availability().ok, reason="no QEMU here")


def assert_usage_error(result, *words):
    """Status 4, one message with these words, and no traceback."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = "\n".join(result.outlines + result.errlines)
    assert said.count("ERROR: ") == 1
    for word in words:
        assert word in said
    for bad in ("Traceback", "INTERNALERROR", "vmxlab/pytest_plugin/"):
        assert bad not in said


@needs_tcg
def test_engine_without_vmx_skips_and_says_which_bit(suite):
    suite.write("""
def test_run(vmxlab): vmxlab.run(Case())
def test_run_image(vmxlab): vmxlab.run_image([Case()])
def test_capabilities(vmxlab): vmxlab.capabilities
def test_require(vmxlab): vmxlab.require(PinControls.NMI_EXITING)
@pytest.mark.vmx_needs(PinControls.NMI_EXITING)
def test_marker(vmxlab): raise AssertionError
def test_run_all(vmxlab):
    run, = vmxlab.run_all([Case()])
    assert run.verdict.name == "SKIP"
    assert "CPUID.1:ECX.VMX[5]" in str(run.error)
""")
    result = suite.run("-rs", engine="tcg")
    result.assert_outcomes(skipped=5, passed=1)
    result.stdout.re_match_lines([r"SKIPPED .*the processor lacks VMX \(CPUID\.1:ECX\.VMX\[5\] is 0\)"])


def test_engine_that_does_not_exist_is_a_usage_error(suite):
    suite.write("def test_it(vmxlab): pass")
    names = "auto, auto-kvm, kvm, bochs, kvm-in-bochs, tcg"
    assert_usage_error(suite.run(engine="nonsense"), "'nonsense'", names)
    assert_usage_error(suite.run(engine="bochs,nonsense"), "'nonsense'")
    assert suite.log_folders() == []


def test_kvm_on_a_host_without_nested_vmx_is_a_usage_error_with_the_reason(suite):
    state = KvmEngine().availability()
    if state.ok:
        pytest.skip("nested VMX is here")
    suite.write("def test_it(vmxlab): pass")
    assert_usage_error(suite.run(engine="kvm"), "engine kvm: ", state.problem, state.advice)


def test_no_engine_at_all_is_an_error_that_says_what_each_lacks(suite, monkeypatch):
    for engine in ("kvm.KvmEngine", "bochs.BochsEngine"):
        monkeypatch.setattr(
            f"vmxlab.engines.{engine}.availability",
            lambda self: Availability(False, problem=f"no {self.name} today", advice=f"get {self.name}"),
        )
    suite.write("def test_it(vmxlab): pass")
    suite.write("def test_it(): pass", name="test_other")
    result = suite.run("--continue-on-collection-errors", engine=None)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*no kvm today*no bochs today*", "*what to do: for bochs: get bochs*"])
    result.stdout.no_fnmatch_line("*vmxlab/pytest_plugin/*")


@needs_tcg
def test_several_engines_run_each_test_each(suite):
    suite.write("def test_it(vmxlab): assert vmxlab.run(Case()).reasons == [ExitReason.HLT]")
    result = suite.run("-v", "--vmx-log-dir", "logs", engine="bochs,tcg")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.re_match_lines(
        [rf".*::test_it{BOCHS_ID} PASSED.*", r".*::test_it\[tcg-[\w.]+-max\] SKIPPED.*"]
    )
    result.stdout.re_match_lines([r"vmxlab: bochs .* ran 1 cases with 1 exits in 1 tests"])
    assert len(list((suite.path / "logs").glob("serial-*.log"))) == 2


def test_engine_that_is_named_twice_runs_once(suite):
    suite.write("def test_it(vmxlab): assert vmxlab.run(Case()).reasons == [ExitReason.HLT]")
    suite.run(engine="bochs, bochs,").assert_outcomes(passed=1)


# --- markers -----------------------------------------------------------------------------------------------


def test_missing_feature_skips_with_its_bit(suite):
    """Penryn has no EPT."""
    suite.write("""
@pytest.mark.vmx_needs(PinControls.NMI_EXITING, SecondaryControls.ENABLE_EPT)
def test_marker(vmxlab): raise AssertionError
def test_case(vmxlab): vmxlab.run(Case(needs=SecondaryControls.ENABLE_EPT))
def test_require(vmxlab): vmxlab.require(SecondaryControls.ENABLE_EPT)
@pytest.mark.vmx_needs(PinControls.NMI_EXITING)
def test_there(vmxlab): vmxlab.run(Case())
""")
    result = suite.run("-rs", "--strict-markers", "--vmx-model", "core2_penryn_t9600")
    result.assert_outcomes(skipped=3, passed=1)
    skips = [line for line in result.outlines if line.startswith("SKIPPED")]
    assert skips
    for line in skips:
        assert "the processor lacks ENABLE_EPT (IA32_VMX_PROCBASED_CTLS2[33] is 0)" in line


ALSO_ON_TCG = """
@pytest.mark.vmx_also_on("tcg")
def test_it(vmxlab): assert vmxlab.engine in {"bochs", "tcg"}
def test_other(vmxlab): assert vmxlab.engine in {"bochs", "tcg"}
"""


def test_marker_runs_a_test_on_one_more_engine(suite):
    suite.write(ALSO_ON_TCG)
    result = suite.run("-v", "--strict-markers", engine="bochs")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines_random(
        ["*::test_it[[]bochs-*", "*::test_it[[]tcg-*-max[]]*", "*::test_other[[]bochs-*"]
    )


def test_marker_adds_no_engine_that_the_session_has(suite):
    suite.write(ALSO_ON_TCG)
    suite.run("--strict-markers", engine="bochs,tcg").assert_outcomes(passed=4)


def test_marker_with_an_engine_that_can_not_run_is_a_skip_with_the_reason(suite, monkeypatch):
    monkeypatch.setattr(
        KvmEngine, "availability", lambda self: Availability(False, problem="not on this host")
    )
    suite.write("""
@pytest.mark.vmx_also_on("kvm")
def test_it(vmxlab): assert vmxlab.engine == "bochs"
""")
    result = suite.run("-rs", "--strict-markers", engine="bochs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*engine kvm: not on this host*"])


@pytest.fixture
def differences(monkeypatch):
    """Known differences by name."""

    def known(engine, versions):
        return KnownDifference({engine: versions}, "Vol. 3C, 99.9", "it does this", "it does that")

    made = {
        "here": known("bochs", r"\d"),
        "other-version": known("bochs", r"0\.1\b"),
        "other-engine": known("tcg", r".*"),
    }
    monkeypatch.setattr("vmxlab.engines.differences.KNOWN_DIFFERENCES", made)


@pytest.mark.usefixtures("differences")
def test_known_difference_is_an_expected_failure_with_the_section(suite):
    suite.write("""
@pytest.mark.vmx_known_difference("here")
def test_it(vmxlab): assert vmxlab.run(Case()).reasons == []
""")
    result = suite.run("-rx", "--strict-markers")
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL *known difference: *it does that; SDM Vol. 3C, 99.9: it does this*"])


@pytest.mark.usefixtures("differences")
def test_known_difference_that_is_gone_fails(suite):
    suite.write("""
@pytest.mark.vmx_known_difference("here")
def test_it(vmxlab): assert vmxlab.run(Case()).reasons == [ExitReason.HLT]
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*known difference*"])


@pytest.mark.usefixtures("differences")
@pytest.mark.parametrize("key", ["other-version", "other-engine"])
def test_known_difference_of_another_engine_or_version_expects_nothing(suite, key):
    suite.write(f"""
@pytest.mark.vmx_known_difference("{key}")
def test_fails(vmxlab): assert vmxlab.run(Case()).reasons == []
@pytest.mark.vmx_known_difference("{key}")
def test_passes(vmxlab): assert vmxlab.run(Case()).reasons == [ExitReason.HLT]
""")
    suite.run().assert_outcomes(failed=1, passed=1)


@pytest.mark.usefixtures("differences")
@pytest.mark.parametrize(("arguments", "words"), [('"no-such"', "'no-such'"), ("", "without a key")])
def test_unknown_difference_is_a_usage_error(suite, arguments, words):
    suite.write(f"""
@pytest.mark.vmx_known_difference({arguments})
def test_it(vmxlab): pass
""")
    assert_usage_error(suite.run(), "::test_it", f"there is no known difference {words}")


def test_options_and_markers_are_described(suite):
    options = "\n".join(suite.run("--help", engine=None).outlines)
    for option in ("--vmx-engine", "--vmx-model", "--vmx-log-dir", "--vmx-keep"):
        assert option in options
    markers = "\n".join(suite.run("--markers", engine=None).outlines)
    assert "vmx_needs(" in markers
    assert "vmx_known_difference(" in markers
