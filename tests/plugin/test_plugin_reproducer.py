"""What failed tests leave: a reproducer of each failed case, and what JUnit and GitHub are told of it.

One session in a worker of pytest-xdist has tests that fail in every way; a second one runs what they left.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import PLAIN

TESTS = """
import pytest
from vmxlab import *

WANTED = (ExitReason.HLT,)
SPP = SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT

def test_assertion(vmxlab):
    outcome = vmxlab.run(Case(name="asks", program="mov eax, 1; cpuid; hlt"))
    number = 2
    assert len(outcome.exits) == number and tuple(outcome.reasons) == WANTED, "not what was wanted"

def test_of_an_exit(vmxlab):
    first = vmxlab.run(Case(program="cpuid; hlt")).exits[0]
    assert first.rip == 0x8001

def test_call_in_an_assertion(vmxlab):
    assert [e.reason for e in vmxlab.run(Case()).exits] == []

def test_in_a_loop(vmxlab):
    for leaf in range(5):
        run = vmxlab.run(Case(name=f"leaf-{leaf}", program=f"mov eax, {leaf}; cpuid; hlt"))
        assert run.exits[0].registers["rax"] != 4

def test_about_several(vmxlab):
    runs = vmxlab.run_all([Case(name=f"n{n}", expect=[(ExitReason.HLT, ExitReason.CPUID)[n < 12]])
                           for n in range(14)])
    assert all(run.verdict.name == "PASS" for run in runs)

def test_dies(vmxlab):
    vmxlab.run(Case(name="dies", program="cpuid; hlt", fields={"HOST_CR3": 0x3f00000}))

def test_refused(vmxlab):
    vmxlab.run(Case(name="nonsense", program="foo bar"))

def test_on_a_model_by_need(vmxlab):
    assert vmxlab.run(Case(needs=SPP)).reasons == []

@pytest.fixture
def prepared(vmxlab):
    assert vmxlab.run(Case(name="prepares")).reasons == []

def test_set_up(prepared): pass

@pytest.mark.xfail(strict=True)
def test_expected(vmxlab):
    assert not vmxlab.run(Case()).reasons

@pytest.mark.xfail(strict=True)
def test_not_expected(vmxlab):
    vmxlab.run(Case())

def test_passes(vmxlab):
    vmxlab.run(Case())

@pytest.mark.vmx_also_on("tcg")
def test_skipped(vmxlab):
    vmxlab.run(Case())

def test_without(): assert 1 == 2
"""

MODEL = "corei7_skylake_x"
LEAVE_SOME = {
    "test_assertion": 1,
    "test_of_an_exit": 1,
    "test_call_in_an_assertion": 1,
    "test_in_a_loop": 3,
    "test_about_several": 10,
    "test_dies": 1,
    "test_refused": 1,
    "test_on_a_model_by_need": 1,
    "test_set_up": 1,
    "test_not_expected": 1,
}
FILES = {"README.md", "boot.sh", "case.bochsrc", "case.elf", "case.rom", "reproduce.py", "serial.log"}


@dataclass(frozen=True)
class Session:
    """A session of pytest that has ended."""

    folder: Path
    out: str

    @property
    def junit(self) -> dict[str, ElementTree.Element]:
        cases = ElementTree.parse(self.folder / "junit.xml").getroot().iter("testcase")
        return {case.get("name").partition("[")[0]: case for case in cases}

    def properties(self, test):
        return {p.get("name"): p.get("value") for p in self.junit[test].iter("property")}

    def kept(self, test):
        """The folders of a test, in the order of their cases."""
        (parent,) = (self.folder / "logs" / "failed").glob(f"test_it.py-{test}*")
        return sorted(parent.iterdir(), key=lambda folder: (len(folder.name), folder.name))

    def readme(self, test):
        return (self.kept(test)[-1] / "README.md").read_text()

    def code(self, test):
        """The test that it left, without what stands before it."""
        return (self.kept(test)[-1] / "reproduce.py").read_text().partition("\n\n\n")[2]


def run_pytest(folder, *arguments, **environment):
    command = [sys.executable, "-m", "pytest", *PLAIN, "--vmx-engine", "bochs", "--junitxml", "junit.xml"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return Session(folder, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    pytest.importorskip("xdist")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_it.py").write_text(TESTS)
    github = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(folder.parent)}
    return run_pytest(folder, "-n", "1", "--vmx-log-dir", "logs", **github)


@pytest.fixture(scope="module")
def again(session, tmp_path_factory):
    """A session with the last test that each one left, dropped into a folder."""
    folder = tmp_path_factory.mktemp("again")
    for test in LEAVE_SOME:
        text = (session.kept(test)[-1] / "reproduce.py").read_text()
        (folder / f"{test}.py").write_text(text.replace("test_reproduces", test))
    files = [f"{test}.py" for test in LEAVE_SOME]
    return run_pytest(folder, "--vmx-log-dir", "logs", *files)


def failure_of(session, test):
    (failure,) = [found for kind in ("failure", "error") for found in session.junit[test].iter(kind)]
    return failure.get("message")


# --- which folders -----------------------------------------------------------------------------------------


def test_each_failed_test_leaves_its_failed_cases_and_no_other_test_does(session):
    folders = {path.name.split("-")[1] for path in (session.folder / "logs" / "failed").iterdir()}
    assert folders == set(LEAVE_SOME)
    for test, count in LEAVE_SOME.items():
        assert len(session.kept(test)) == count, test
    assert "INTERNALERROR" not in session.out


def test_report_and_junit_name_the_folder(session):
    for test in LEAVE_SOME:
        for folder in session.kept(test):
            assert f"\n{folder}\n" in session.out
        assert session.properties(test)["vmx_reproducer"] == str(session.kept(test)[0].parent)
    for test in ("test_passes", "test_expected", "test_skipped", "test_without"):
        assert "vmx_reproducer" not in session.properties(test)


def test_cases_that_are_not_kept_are_counted(session):
    assert "\nthe last 3 of 5 cases are kept\n" in session.out
    assert "\nthe first 10 of 12 failed cases are kept\n" in session.out
    assert [(f / "README.md").read_text().split(":")[0] for f in session.kept("test_in_a_loop")] == [
        "# leaf-2",
        "# leaf-3",
        "# leaf-4",
    ]


def test_case_that_can_not_be_leaves_its_text_and_the_error(session):
    (folder,) = session.kept("test_refused")
    assert {path.name for path in folder.iterdir()} == {"README.md", "reproduce.py"}
    readme = session.readme("test_refused")
    assert "no such instruction: `foo bar'" in readme
    assert "no image: the guest program does not assemble" in readme


def test_all_others_leave_everything(session):
    for test in set(LEAVE_SOME) - {"test_refused"}:
        for folder in session.kept(test):
            assert {path.name for path in folder.iterdir()} == FILES


# --- what is in them ---------------------------------------------------------------------------------------


def test_assertion_is_taken_along_with_what_its_names_mean(session):
    assert session.code("test_assertion") == (
        "def test_reproduces(vmxlab):\n"
        "    run = vmxlab.run(Case(program='mov eax, 1; cpuid; hlt', name='asks'))\n"
        "    WANTED = (ExitReason.HLT,)\n"
        "    number = 2\n"
        "    assert len(run.exits) == number and tuple(run.reasons) == WANTED\n"
    )
    assert session.code("test_of_an_exit").endswith("first = run.exits[0]\n    assert first.rip == 32769\n")
    assert "assert [e.reason for e in run.exits] == []" in session.code("test_call_in_an_assertion")
    assert "It asserts what the test that failed did." in session.readme("test_assertion")


def test_where_it_can_not_be_taken_along_the_case_is_asked_and_that_is_said(session):
    assert session.code("test_about_several").endswith("assert run.difference() is None\n")
    assert "It asserts what the case itself expects." in session.readme("test_about_several")
    assert session.code("test_not_expected").endswith("assert not run.check()\n")
    assert "not what the test that failed did" in session.readme("test_not_expected")


@pytest.mark.parametrize("test", [test for test in LEAVE_SOME if test != "test_not_expected"])
def test_what_was_left_fails_in_the_same_way(session, again, test):
    before, after = failure_of(session, test), failure_of(again, test)
    # Numbers of the processes, the message of an assertion and pytest's words for a fixture aside.
    what = re.search(r"(assert [^\n]*|vmxlab\.errors\.\w+: [^\n]*)", before)[1]
    if test == "test_about_several":
        what = "expected CPUID, seen HLT"
    elif test == "test_assertion":
        what = "assert (2 == 2 and "
    assert what in after


def test_what_a_processor_is_right_about_passes_by_the_oracle(again):
    assert list(again.junit["test_not_expected"]) != []
    assert not list(again.junit["test_not_expected"].iter("failure"))


def test_command_lines_are_of_the_model_that_it_ran_on(session):
    (folder,) = session.kept("test_on_a_model_by_need")
    assert "cpu: model=tigerlake," in (folder / "case.bochsrc").read_text()
    readme = session.readme("test_on_a_model_by_need")
    assert "pytest reproduce.py --vmx-engine bochs --vmx-model tigerlake" in readme
    assert "corei7_skylake_x lacks SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT" in readme
    assert f"model={MODEL}," in (session.kept("test_assertion")[0] / "case.bochsrc").read_text()


def test_log_is_the_boot_and_the_case_and_nothing_else(session):
    for test in ("test_assertion", "test_in_a_loop", "test_dies"):
        log = (session.kept(test)[-1] / "serial.log").read_text()
        kinds = re.findall(r"^@(\w+)", log, re.M)
        assert kinds[:3] == ["boot", "caps", "case"]
        assert kinds.count("case") == 1
        assert ("end" in kinds) == (test != "test_dies")


# --- what JUnit and GitHub are told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "cases", "exits"),
    [
        ("test_passes", 1, 1),
        ("test_assertion", 1, 2),
        ("test_in_a_loop", 5, 10),
        ("test_dies", 1, 0),
        ("test_set_up", 1, 1),
        ("test_expected", 1, 1),
        ("test_refused", 0, 0),
    ],
)
def test_junit_says_of_each_test_what_it_ran_on(session, test, cases, exits):
    properties = session.properties(test)
    assert properties["vmx_engine"].startswith("bochs 2.")
    assert properties["vmx_model"] == MODEL
    assert (int(properties["vmx_cases"]), int(properties["vmx_exits"])) == (cases, exits)
    if cases:
        assert Path(properties["vmx_log"]).parent == session.folder / "logs"
        assert Path(properties["vmx_log"]).is_file()


def test_junit_says_of_a_skipped_test_what_it_would_have_run_on(session):
    """The last one of that name is on tcg, which has no VMX."""
    properties = session.properties("test_skipped")
    assert properties.pop("vmx_engine").startswith("tcg ")
    assert properties == {"vmx_model": "max", "vmx_cases": "0", "vmx_exits": "0"}


def test_junit_says_nothing_of_a_test_that_does_without(session):
    assert session.properties("test_without") == {}


def test_failures_are_annotations_at_their_lines(session):
    found = dict(
        re.findall(r"^::error file=suite0/test_it.py,line=\d+,title=(\w+)[^:]*::(.*)$", session.out, re.M)
    )
    assert set(found) == {*LEAVE_SOME, "test_without"}
    number = next(n for n, line in enumerate(TESTS.splitlines(), 1) if "first.rip ==" in line)
    assert f"::error file=suite0/test_it.py,line={number},title=test_of_an_exit[bochs-" in session.out
    for test in set(LEAVE_SOME) - {"test_refused"}:
        assert "%0Aon bochs 2." in found[test], test
    assert "n0: FAIL: exit 0: expected CPUID, seen HLT" in found["test_about_several"]
    assert f"%0Areproducer: {session.kept('test_dies')[0].parent}" in found["test_dies"]
    assert "on bochs" not in found["test_without"]


# --- alone -------------------------------------------------------------------------------------------------

FAILS = "\ndef test_fails(vmxlab):\n    assert vmxlab.run(Case()).reasons == []\n"


def test_what_can_not_be_written_is_said_and_the_failure_stays_one(suite, monkeypatch):
    from vmxlab.reports.reproducer import Reproducer

    def fails(self, folder):
        raise ValueError("no more room")

    monkeypatch.setattr(Reproducer, "write", fails)
    suite.write(FAILS)
    result = suite.run("--vmx-log-dir", "logs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["none could be written: ValueError: no more room", "*1 failed*"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_same_test_in_the_next_session_overwrites_nothing(suite):
    suite.write(FAILS)
    for _ in range(2):
        suite.run("--vmx-log-dir", "logs").assert_outcomes(failed=1)
    assert len(list((suite.path / "logs" / "failed").glob("*/case-0/case.rom"))) == 2


def test_ctrl_c_leaves_none(suite):
    suite.write("\ndef test_it(vmxlab):\n    vmxlab.run(Case())\n    raise KeyboardInterrupt\n")
    assert suite.run("--vmx-log-dir", "logs").ret == 2
    assert not (suite.path / "logs" / "failed").exists()


def test_test_that_asks_for_the_fixture_while_it_runs_leaves_one_too(suite):
    suite.write("""
def test_it(request):
    assert request.getfixturevalue("vmxlab").run(Case()).reasons == []
""")
    result = suite.run("--vmx-log-dir", "logs")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["-* vmxlab case 0 on bochs *", "*logs/failed/test_it.py-test_it/case-0"])


def test_long_names_of_tests_make_short_names_of_folders(suite):
    suite.write(
        "\n@pytest.mark.parametrize('x', ['é/ü ' * 60 + end for end in 'ab'])"
        "\ndef test_it(vmxlab, x):\n    assert vmxlab.run(Case()).reasons == []\n"
    )
    suite.run("--vmx-log-dir", "logs").assert_outcomes(failed=2)
    names = [path.name for path in (suite.path / "logs" / "failed").iterdir()]
    assert len(names) == 2
    assert all(len(name) <= 100 and name.isascii() for name in names)


def test_difference_that_the_oracle_found_is_what_is_kept(suite, monkeypatch):
    """One of five cases differs from what the SDM says, here by a change of what came."""
    suite.write("""
import dataclasses

def test_it(vmxlab):
    runs = vmxlab.run_all([Case(name=f"n{n}") for n in range(5)])
    first = runs[0].exits[0]
    changed = dataclasses.replace(first, rip=first.rip + 1)
    vmxlab._test.runs[0] = dataclasses.replace(runs[0], exits=(changed,))
""")
    suite.run("--vmx-log-dir", "logs", "--vmx-oracle").assert_outcomes(failed=1)
    (folder,) = (suite.path / "logs" / "failed").glob("*/*")
    assert "# n0: PASS on" in (folder / "README.md").read_text()
    assert (folder / "reproduce.py").read_text().endswith("assert not run.check()\n")


def test_another_plugin_for_annotations_has_its_way(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    suite.write("\ndef test_it(): assert 1 == 2\n")
    suite.write("", name="pytest_github_actions_annotate_failures")
    result = suite.run(engine=None)
    result.stdout.fnmatch_lines(["::error file=*"])
    result = suite.run("-p", "pytest_github_actions_annotate_failures", engine=None)
    result.stdout.no_fnmatch_line("::error*")


def test_file_that_can_not_be_collected_is_an_annotation_too(suite, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(suite.path))
    suite.write("\nassert 1 == 2, 'at once: 50%'\n", imports=False)
    result = suite.run(engine=None)
    result.stdout.fnmatch_lines(["::error file=test_it.py,*title=test_it.py (collection)::*at once: 50%25*"])
