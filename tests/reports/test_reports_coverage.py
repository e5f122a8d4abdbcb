"""The coverage table: what a cell says, and what counts as a defect."""

from __future__ import annotations

import pytest

from vmxlab import ExitReason
from vmxlab.engines.unreachable import UNREACHABLE, Unreachable
from vmxlab.errors import CoverageError
from vmxlab.reports.coverage import Coverage, Status
from vmxlab.reports.coverage_file import (
    CoverageFile,
    Differs,
    Lacking,
    Platform,
    Processor,
    Seen,
)
from vmxlab.sdm.exit_requirements import EXIT_REQUIREMENTS

BOCHS = Platform("bochs", "2.7")
KVM = Platform("kvm", "linux-6.1")
R = ExitReason


def seen(test, *reasons, on=BOCHS, failed=(), models=("some_model",)):
    return Seen(test, on, models, tuple(map(int, reasons)), tuple(map(int, failed)))


def coverage(tmp_path, *lines):
    file = CoverageFile(tmp_path / "file")
    for line in lines:
        where = {Seen: file.seen, Lacking: file.lacking, Differs: file.differs, Processor: file.processors}
        where[type(line)].append(line)
    return Coverage([file])


def cell(found, reason, platform=BOCHS):
    return found.cells[reason][platform]


# --- seen --------------------------------------------------------------------------------------------------


def test_every_basic_exit_reason_of_the_appendix_has_a_row(tmp_path):
    table = coverage(tmp_path, seen("t.py::test", R.HLT)).table()
    assert [row[0] for row in table.rows] == [int(reason) for reason in R]


def test_a_cell_names_the_test_and_counts_the_others_without_their_parameters(tmp_path):
    found = coverage(
        tmp_path,
        seen("tests/exits/test_a.py::test_first[0x60]", R.CPUID),
        seen("tests/exits/test_a.py::test_first[0x61]", R.CPUID),
        seen("tests/exits/test_b.py::test_second", R.HLT, R.CPUID),
        seen("tests/exits/test_c.py::test_third", R.HLT),
    )
    assert str(cell(found, R.CPUID)) == "test_a.py::test_first (+1)"
    assert cell(found, R.CPUID).what == "tests/exits/test_a.py::test_first"
    assert str(cell(found, R.HLT)) == "test_c.py::test_third (+1)"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (seen("t.py::test_about_rdtsc", R.HLT, R.RDTSC), seen("t.py::test", R.RDTSC)),
        (seen("t.py::z_first", R.RDTSC, R.HLT, R.CPUID), seen("t.py::a_later", R.HLT, R.RDTSC)),
        (seen("t.py::z_fewer", R.RDTSC, R.HLT), seen("t.py::a_more", R.RDTSC, R.HLT, R.CPUID)),
        (seen("t.py::a", R.RDTSC), seen("t.py::b", R.RDTSC)),
    ],
    ids=["by its name", "by place", "by number of reasons", "by the alphabet"],
)
def test_the_test_that_is_most_about_a_reason_is_named_whatever_the_order(tmp_path, better, worse, order):
    found = coverage(tmp_path, *[better, worse][::order])
    assert cell(found, R.RDTSC).what == better.test


def test_a_failed_entry_is_no_exit_and_an_exit_is_no_failed_entry(tmp_path):
    found = coverage(
        tmp_path,
        seen("t.py::entry", failed=[R.ENTRY_FAILURE_GUEST_STATE, R.HLT]),
        seen("t.py::exit", R.ENTRY_FAILURE_MSR_LOADING, R.CPUID),
    )
    statuses = {reason: cell(found, reason).status for reason in R}
    assert [reason for reason, status in statuses.items() if status is Status.SEEN] == [
        R.CPUID,
        R.ENTRY_FAILURE_GUEST_STATE,
    ]


def test_engines_in_two_versions_are_two_columns(tmp_path):
    newer = Platform("bochs", "3.0")
    found = coverage(tmp_path, seen("t.py::a", R.HLT), seen("t.py::a", R.CPUID, on=newer))
    assert found.platforms == [BOCHS, newer]
    assert cell(found, R.CPUID).status is Status.NOT_SEEN
    assert cell(found, R.CPUID, newer).status is Status.SEEN


# --- not seen, and why -------------------------------------------------------------------------------------


def test_where_all_tests_that_show_a_reason_elsewhere_were_skipped_the_processor_lacks_it(tmp_path):
    lines = [
        seen("t.py::a", R.EXTERNAL_INTERRUPT, on=KVM),
        seen("t.py::b", R.EXTERNAL_INTERRUPT, on=KVM),
        Lacking("t.py::a", BOCHS, "A", "MSR_A[1]"),
    ]
    assert cell(coverage(tmp_path, *lines), R.EXTERNAL_INTERRUPT).status is Status.NOT_SEEN
    found = coverage(tmp_path, *lines, Lacking("t.py::b", BOCHS, "B", "MSR_B[2]"))
    assert str(cell(found, R.EXTERNAL_INTERRUPT)) == "processor lacks it (MSR_A[1], MSR_B[2])"


def test_where_the_test_that_shows_it_elsewhere_differs_as_known_that_is_the_reason(tmp_path):
    lines = [seen("t.py::a", R.TRIPLE_FAULT, on=KVM), Differs("t.py::a", BOCHS, "some-key")]
    found = coverage(tmp_path, *lines)
    assert str(cell(found, R.TRIPLE_FAULT)) == "known difference (some-key)"
    assert found.count(BOCHS) == 0
    found = coverage(tmp_path, *lines, seen("t.py::b", R.TRIPLE_FAULT, on=KVM))
    assert cell(found, R.TRIPLE_FAULT).status is Status.NOT_SEEN


def test_where_no_model_has_the_control_that_a_reason_takes_the_processor_lacks_it(tmp_path, processors):
    """Lynnfield has EPT and no VMCS shadowing; Penryn lacks EPT; the bit named is the default model's."""
    here = [
        seen("t.py::a", R.HLT),
        Processor(BOCHS, "b", True, processors["lynnfield"]),
        Processor(BOCHS, "a", False, processors["penryn"]),
    ]
    found = coverage(tmp_path, *here)
    assert str(cell(found, R.VMFUNC)) == "processor lacks it (IA32_VMX_PROCBASED_CTLS2[45])"
    assert cell(found, R.EPT_VIOLATION).status is Status.NOT_SEEN
    found = coverage(tmp_path, *here, Processor(BOCHS, "c", False, processors["skylake"]))
    assert cell(found, R.VMFUNC).status is Status.NOT_SEEN, "a model has it, and no test asked for it"


def test_reasons_that_no_engine_can_produce_say_why(tmp_path):
    found = coverage(tmp_path, seen("t.py::a", R.HLT), seen("t.py::a", R.HLT, on=KVM))
    for reason in UNREACHABLE:
        assert str(cell(found, reason)).startswith("not reachable: ")
        assert "SDM Vol. 3" in str(cell(found, reason))


def test_unreachable_may_be_said_of_one_engine(tmp_path, monkeypatch):
    table = {R.SIPI: Unreachable("for a reason", "Vol. 3C, 99", frozenset({"kvm"}))}
    monkeypatch.setattr("vmxlab.reports.coverage.UNREACHABLE", table)
    found = coverage(tmp_path, seen("t.py::a", R.HLT), seen("t.py::a", R.HLT, on=KVM))
    assert cell(found, R.SIPI, KVM).status is Status.UNREACHABLE
    assert cell(found, R.SIPI, BOCHS).status is Status.NOT_SEEN


# --- defects -----------------------------------------------------------------------------------------------


def test_a_reason_that_nothing_explains_is_a_defect(tmp_path):
    found = coverage(tmp_path, seen("t.py::a", *(r for r in R if r not in UNREACHABLE and r != R.INVD)))
    (defect,) = [line for line in found.defects() if "INVD" in line]
    assert defect.startswith("bochs 2.7: not seen, and nothing says why: ")
    assert "HLT" not in defect


def test_a_reason_that_is_seen_must_not_be_called_unreachable(tmp_path):
    everything = [r for r in R if "ENTRY_FAILURE" not in r.name]
    failures = [r for r in R if "ENTRY_FAILURE" in r.name]
    found = coverage(tmp_path, seen("t.py::a", *everything, failed=failures))
    (defect,) = found.defects()
    assert defect == f"bochs 2.7: seen, but called not reachable: {', '.join(r.name for r in UNREACHABLE)}"


@pytest.mark.parametrize(
    ("minimum", "problem"),
    [
        ({"bochs": 2}, None),
        ({"bochs": 3}, "bochs 2.7: 2 reasons seen, at least 3 were wanted"),
        ({"kvm": 1}, "kvm: no test of it stands in the files, at least 1 were wanted"),
    ],
)
def test_fewer_than_the_minimum_is_a_defect(tmp_path, minimum, problem):
    found = coverage(tmp_path, seen("t.py::a", R.HLT, R.CPUID))
    assert found.defects(minimum)[1:] == ([problem] if problem else [])
    assert found.counts() == [f"bochs 2.7: 2 of {len(R)} reasons seen"]


def test_files_without_any_test_are_an_error(tmp_path):
    with pytest.raises(CoverageError, match="nothing to show"):
        coverage(tmp_path)


def test_a_session_that_failed_is_told(tmp_path):
    file = CoverageFile(tmp_path / "file", status=1, seen=[seen("t.py::a", R.HLT)])
    (remark,) = Coverage([file]).remarks()
    assert "status 1" in remark


def test_the_models_that_were_used_are_told_the_default_one_first(tmp_path, processors):
    found = coverage(
        tmp_path,
        seen("t.py::a", R.HLT, models=("zulu",)),
        seen("t.py::b", R.HLT, models=("alpha", "zulu")),
        Processor(BOCHS, "zulu", True, processors["skylake"]),
        Processor(BOCHS, "mike", False, processors["skylake"]),
    )
    assert found.models(BOCHS) == ["zulu", "alpha"]


# --- the tables behind it ----------------------------------------------------------------------------------


def test_no_reason_is_both_unreachable_and_a_matter_of_a_control():
    assert not set(UNREACHABLE) & set(EXIT_REQUIREMENTS)
