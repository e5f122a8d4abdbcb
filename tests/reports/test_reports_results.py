"""The file of a session's results: what is written is read, a case as it was, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmxlab import Case, Ept, ExitReason, Field, IOBitmap, Limits, MsrBitmap, PrimaryControls, Verdict
from vmxlab.console.records import encode_record
from vmxlab.console.run import End
from vmxlab.errors import CoverageError, MissingCapability
from vmxlab.reports.coverage_file import read_coverage
from vmxlab.reports.results.facts import ALL, MAX_EXITS, MAX_RECORDS, NONE
from vmxlab.reports.results.file import is_results_file, read_results
from vmxlab.reports.results.logs import read_log
from vmxlab.reports.results.model import RecordedCase, RecordedTest, TestVerdict
from vmxlab.sdm.controls import ControlSet

from .sessions import ENGINE, EVIL, Session, hlt, io, run_of

LOG = Path(__file__).parents[1] / "console" / "bochs.log"


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path / "results.jsonl")


def read(path):
    tests: list[RecordedTest] = []
    return read_results(path, tests.append), tests


def recorded(session, *runs) -> list[RecordedCase]:
    """Runs as they come out of a file again."""
    session.add("t.py::test", *runs)
    _, (test,) = read(session.close())
    return list(test.cases)


# --- a case ------------------------------------------------------------------------------------------------


def test_run_is_the_same_again(session):
    case = Case(name="asks", program="in al, 0x60; hlt", registers={"rbx": 5})
    run = run_of(case, {**io(0x60, 0x8000), "rbx": 5}, {**hlt(0x8002), "rax": 0xFF}, number=7)
    (found,) = recorded(session, run)
    assert (found.run.number, found.run.name, found.run.engine) == (7, "asks", ENGINE)
    assert (found.run.exits, found.run.outcomes, found.run.end) == (run.exits, run.outcomes, run.end)
    assert found.run.log_path == run.log_path
    assert (found.verdict, found.why) == (Verdict.PASS, "2 exits; stopped at the last exit")
    assert found.log_lines == [record.line for record in run.records]
    assert found.at_entry is not None
    assert {name: value for name, value in found.at_entry.items() if value} == {
        "rbx": 5,
        "rsp": 0x7FF0,
        "rflags": 2,
    }
    assert found.code is not None
    assert (found.code.at(0x8000), found.code.at(0x8002)) == ("in al, 0x60", "hlt")


def test_source_of_a_case_makes_it_again(session):
    case = Case(name="again", program="cpuid; hlt", limits=Limits(exits=3))
    (found,) = recorded(session, run_of(case, hlt(0x8002)))
    names: dict[str, object] = {}
    made = []

    class Fixture:
        def run(self, one):
            made.append(one)
            raise StopIteration

    exec(found.source, names)
    with pytest.raises(StopIteration):
        names["test_case"](Fixture())  # type: ignore[operator]
    assert made == [case]


def test_data_that_l2_was_in_is_code_too(session):
    case = Case(program="jmp DATA", data={0x10000: b"\x0f\xa2\xf4", 0x11000: b"unused"})
    (found,) = recorded(session, run_of(case, {"reason": 10, "len": 2, "rip": 0x10000}, hlt(0x10002)))
    assert found.code is not None
    assert found.code.at(0x10000) == "cpuid"
    assert found.code.at(0x11000) is None


def test_what_differs_from_the_baseline_is_told(session):
    case = Case(enable=PrimaryControls.RDTSC_EXITING, fields={Field.GUEST_CR4: 0x2020}, program="rdtsc")
    found, plain = recorded(session, run_of(case, hlt(0x8000)), run_of(Case(), hlt(0x8000)))
    value, baseline = found.controls[ControlSet.PRIMARY.name]
    assert value ^ baseline == PrimaryControls.RDTSC_EXITING
    assert found.fields == {"GUEST_CR4": "0x2020"}
    assert all(value == baseline for value, baseline in plain.controls.values())


def test_broken_rules_of_a_failed_entry_are_told(session):
    case = Case(fields={Field.GUEST_RFLAGS: 0})
    values = {f"f{field:x}": value for field, value in run_of(case).compiled.fields.items()}  # type: ignore[union-attr]
    dumped = encode_record("vmcs", values)
    run = run_of(case, {"reason": 0x8000_0021, "rip": 0x8000}, extra=[dumped])
    (found,) = recorded(session, run)
    assert [rule.rule for rule in found.broken] == [broken.rule.name for broken in run.broken_rules()]
    (rule,) = found.broken
    assert (rule.section, rule.values["GUEST_RFLAGS"]) == ("27.3.1.4", "0x0")


@pytest.mark.parametrize(
    ("case", "io_bitmap", "msr_bitmap"),
    [
        (Case(), ALL, ALL),
        (Case(disable=PrimaryControls.UNCONDITIONAL_IO_EXITING), NONE, ALL),
        (Case(enable=PrimaryControls.USE_MSR_BITMAPS), ALL, "msr"),
        (Case(io_bitmap=IOBitmap()), "io", ALL),
        (Case(io_bitmap=IOBitmap(), disable=PrimaryControls.USE_IO_BITMAPS), NONE, ALL),
    ],
)
def test_bitmap_is_the_one_that_the_controls_use(session, case, io_bitmap, msr_bitmap):
    (found,) = recorded(session, run_of(case, hlt(0x8000)))
    assert (found.io_bitmap or "").partition("-")[0] == io_bitmap
    assert (found.msr_bitmap or "").partition("-")[0] == msr_bitmap


def test_structure_that_many_cases_have_is_told_once(session):
    bitmap, msrs, ept = IOBitmap(), MsrBitmap(), Ept()
    bitmap.set_intercept_of_range(0x60, 5, True)
    msrs.set_write_intercept(0x174, True)
    ept.map(0, 0x120_0000, length=0x2_0000)
    case = Case(io_bitmap=bitmap, msr_bitmap=msrs, ept=ept)
    session.add("t.py::test_1", run_of(case, hlt(0x8000)), run_of(case, hlt(0x8000)))
    session.add("t.py::test_2", run_of(case, hlt(0x8000)))
    session.add("t.py::test_3", run_of(Case(), hlt(0x8000)))
    _, (first, second, third) = read(session.close())
    (io_digest,) = {found.io_bitmap for found in (*first.cases, *second.cases)}
    (msr_digest,) = {found.msr_bitmap for found in (*first.cases, *second.cases)}
    (ept_digest,) = {found.ept for found in (*first.cases, *second.cases, *third.cases)}
    assert first.new_structures[io_digest] == {"ports": [[0x60, 0x64]]}
    assert first.new_structures[msr_digest] == {"read": [], "write": [[0x174, 0x174]]}
    assert [entry[:2] for entry in first.new_structures[ept_digest]["entries"]] == [
        [4, 0],
        [3, 0],
        [2, 0],
        [1, 0],
    ]
    assert second.new_structures == third.new_structures == {}


def test_of_thousands_of_exits_the_first_are_kept_and_all_are_counted(session):
    exits = [{"reason": 10, "rip": 0x8000}] * (MAX_EXITS + 20) + [io(0x77, 0x8002), hlt(0x8004)]
    (found,) = recorded(session, run_of(Case(), *exits, why="limit"))
    assert len(found.run.exits) == MAX_EXITS
    assert (found.exits, found.left_out) == (MAX_EXITS + 22, 22)
    assert found.reasons == {10: MAX_EXITS + 20, 30: 1, 12: 1}
    assert "IN port 0x77, 1 byte" in found.unkept
    assert (found.run.end, found.verdict) == (End.LIMIT, Verdict.PASS)
    assert found.log_lines[-1].startswith("@end ")


def test_of_thousands_of_other_records_the_first_are_kept(session):
    many = [encode_record("sweep", {"n": 0, "at": at, "exits": 1, "crc": 0}) for at in range(MAX_RECORDS + 9)]
    (found,) = recorded(session, run_of(Case(), hlt(0x8000), extra=many))
    # Besides these there are the case, its VMX instructions and the exit.
    assert (len(found.log_lines), found.left_out) == (MAX_RECORDS + 1, 9 + 3)
    assert found.run.reasons == [ExitReason.HLT]


def test_case_that_died_or_never_ran_is_told(session):
    died = run_of(Case(name="dies"), io(0x60, 0x8000), end=False)
    from vmxlab.console.unfinished import failed_run

    lacking = failed_run(Case(name="lacks"), 3, MissingCapability("PCONFIG", "MSR[1]").locate(engine=ENGINE))
    one, other = recorded(session, died, lacking)
    assert (one.verdict, one.run.end, len(one.run.exits)) == (Verdict.CRASH, None, 1)
    assert (other.verdict, other.run.name, other.exits) == (Verdict.SKIP, "lacks", 0)
    assert other.why == "the processor lacks PCONFIG (MSR[1] is 0)"


# --- the file ----------------------------------------------------------------------------------------------


def test_test_is_as_it_was(session):
    session.add(
        "t.py::test_1",
        verdict=TestVerdict.FAIL,
        why=EVIL,
        seconds=1.5,
        text=EVIL,
        sections=[("Captured stdout call", EVIL)],
    )
    session.add("t.py::test_2", engine=None)
    results, (one, other) = read(session.close(1))
    assert (one.id, one.name, one.platform) == ("t.py::test_1[bochs]", "t.py::test_1", "bochs 2.7")
    assert (one.verdict, one.why, one.seconds, one.text) == (TestVerdict.FAIL, EVIL, 1.5, EVIL)
    assert one.sections == [("Captured stdout call", EVIL)]
    assert (other.id, other.platform, other.verdict) == ("t.py::test_2", "", TestVerdict.PASS)
    assert results.is_whole
    assert results.head["arguments"] == ["-q"]
    assert results.coverage.status == 1
    assert is_results_file(session.path)


def test_it_is_a_coverage_file(session):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)), seen=[12])
    assert [line.reasons for line in read_coverage(session.close()).seen] == [(12,)]


def test_file_of_a_session_that_was_killed_is_read_as_far_as_it_goes(session):
    session.add("t.py::test_1", run_of(Case(), hlt(0x8000)))
    session.add("t.py::test_2", run_of(Case(), hlt(0x8000)))
    text = session.path.read_text()
    for length in (len(text), len(text) - 1, len(text) - 300):
        session.path.write_text(text[:length])
        results, tests = read(session.path)
        assert not results.is_whole
        assert len(tests) == (2 if length == len(text) else 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "good"}, "'good' is not a valid TestVerdict"),
        ({"id": 5}, "'id' is no str"),
        ({"cases": [{}]}, "the test makes no sense: KeyError"),
        ({"cases": 5}, "the test makes no sense"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_line(session, change, words):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)))
    head, line = session.path.read_text().splitlines()
    session.path.write_text(f"{head}\n{json.dumps({**json.loads(line), **change})}\n")
    with pytest.raises(CoverageError) as caught:
        read(session.path)
    assert f"{session.path}, line 2: " in caught.value.message
    assert words in caught.value.message


def test_record_that_was_changed_is_named(session):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)))
    session.path.write_text(session.path.read_text().replace("reason=0xc", "reason=0xd"))
    with pytest.raises(CoverageError, match="is no record"):
        read(session.path)


# --- a bare log --------------------------------------------------------------------------------------------


def test_log_is_a_test_with_all_of_its_cases():
    test = read_log(LOG)
    assert not is_results_file(LOG)
    assert [found.run.name for found in test.cases] == [
        *("ports", "wrong-revision", "ept"),
        *("steps", "bad-guest", ""),
    ]
    assert [len(found.run.exits) for found in test.cases] == [found.exits for found in test.cases]
    assert all(found.code is None and found.log_lines for found in test.cases)
    assert test.verdict is TestVerdict.FAIL  # a case of it asked for a VMfail


def test_log_says_what_it_ran_on_and_what_of_it_is_damaged(tmp_path):
    path = tmp_path / "serial-1.log"
    content = LOG.read_bytes().replace(b"reason=0x1e", b"reason=0x1f", 1)
    path.write_bytes(f"# engine: {ENGINE}; named by --engine\n".encode() + content)
    test = read_log(path)
    assert (test.engine, test.version, test.cases[0].run.engine) == ("bochs", "2.7", ENGINE)
    assert (test.verdict, test.why) == (TestVerdict.ERROR, "damaged lines: 1")
    assert "the checksum does not fit" in test.text


@pytest.mark.parametrize("content", [b"", b"hello\n", b'{"kind": "head"}\n', bytes(range(256))])
def test_what_is_neither_is_named(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert not is_results_file(path)
    with pytest.raises(CoverageError, match="neither a file of results nor a serial log"):
        read_log(path)
