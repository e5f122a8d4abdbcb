"""What a failed test shows, and which logs stay."""

import re
import xml.etree.ElementTree as ElementTree

FAILS = """
def test_fails(vmxlab):
    run = vmxlab.run(Case(name="asks", program="mov eax, 1; cpuid; mov eax, 2; in al, 0x60; hlt"))
    assert run.reasons == []
"""
PASSES = """
def test_passes(vmxlab):
    assert vmxlab.run(Case(name="fine")).reasons == [ExitReason.HLT]
"""


def sections(result):
    """The sections that the plugin made of a test's cases: title -> lines."""
    found, title = {}, None
    for line in result.outlines:
        header = re.fullmatch(r"-+ (vmxlab.*?) -+", line)
        if header:
            title = header[1] if header[1] != "vmxlab: reproducer" else None
            if title is not None:
                found[title] = []
        elif re.fullmatch(r"[=_-]{3,}.*|vmxlab: .*", line):
            title = None
        elif title is not None:
            found[title].append(line)
    return found


def test_failed_test_shows_its_exits_decoded_and_its_records_and_the_log(suite):
    suite.write(FAILS)
    result = suite.run("--vmx-log-dir", "logs")
    result.assert_outcomes(failed=1)
    ((title, lines),) = sections(result).items()
    assert re.fullmatch(r"vmxlab case \d+ \(asks\) on bochs [\w.]+ \(corei7_skylake_x\)", title)
    text = "\n".join(lines)
    assert "VMLAUNCH: VMsucceed" in text
    assert "exit 0: CPUID, RIP 0x8005" in text
    assert "exit 1: IO_INSTRUCTION, IN port 0x60, 1 byte, RIP 0x800c" in text
    assert "end: stop; verdict pass" in text
    log = (suite.path / "logs" / "serial-1.log").read_text()
    shown = [line for line in lines if line.startswith("@")]
    assert len(shown) == 6
    assert all(line in log for line in shown)
    assert f"log: {suite.path / 'logs' / 'serial-1.log'}" in text


def test_passed_test_shows_nothing_and_what_it_ran_is_not_in_the_next_ones_report(suite):
    suite.write(PASSES + FAILS)
    result = suite.run("-rA")
    result.assert_outcomes(passed=1, failed=1)
    assert [title.split(" on ")[0].split("(")[1] for title in sections(result)] == ["asks)"]


def test_crash_shows_what_arrived_before_it(suite):
    suite.write("""
def test_dies(vmxlab):
    vmxlab.run(Case(name="dies", program="cpuid; jmp .", disable=PinControls.ACTIVATE_PREEMPTION_TIMER,
                    limits=Limits(seconds=1)))
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    ((_, lines),) = sections(result).items()
    text = "\n".join(lines)
    assert "exit 0: CPUID" in text
    assert "end: hung; verdict crash" in text
    assert "nothing more came before the deadline" in text
    assert "last record: @exit n=0x0 " in text


def test_cases_of_a_fixture_that_fails_are_shown(suite):
    suite.write("""
@pytest.fixture
def ready(vmxlab):
    assert vmxlab.run(Case(name="prepares")).reasons == []

def test_it(ready): pass
""")
    result = suite.run()
    result.assert_outcomes(errors=1)
    assert ["(prepares)" in title for title in sections(result)] == [True]


def test_of_many_cases_those_that_did_not_pass_are_shown(suite):
    suite.write("""
def test_it(vmxlab):
    expect = {3: ExitReason.CPUID, 5: ExitReason.CPUID}
    runs = vmxlab.run_all(
        [Case(name=f"case-{n}", expect=[expect.get(n, ExitReason.HLT)]) for n in range(30)]
    )
    assert all(run.verdict.name == "PASS" for run in runs)
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    titles = list(sections(result))
    assert len(titles) == 11
    numbers = [int(number) for title in titles for number in re.findall(r"\(case-(\d+)\)", title)]
    assert numbers == [3, 5, *range(22, 30)]
    result.stdout.fnmatch_lines(["20 more cases of this test in *serial-1.log"])


def test_two_exits_are_compared_field_by_field(suite):
    suite.write("""
def test_it(vmxlab):
    run = vmxlab.run(Case(program="mov eax, 1; cpuid; mov eax, 2; in al, 0x60; hlt", watch=[Field.GUEST_CR3]))
    first, second = run.exits[:2]
    assert first == second
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *two exits differ",
            "E *number: 0x0 != 0x1",
            "E *full_reason: 0xa != 0x1e",
            "E *raw_qualification: 0x0 != 0x600048",
            "E *rip: 0x8005 != 0x800c",
            "E *registers[[]rax[]]: 0x1 != 0x2",
        ]
    )
    for same in ("rflags", "rbx", "watched", "instruction_length"):
        result.stdout.no_fnmatch_line(f"E *{same}*!=*")


def test_exit_and_something_else_are_compared_as_usual(suite):
    suite.write("""
def test_it(vmxlab):
    assert vmxlab.run(Case()).exits[0] == 5
""")
    result = suite.run()
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*two exits differ*")


def test_junit_report_says_what_ran_where(suite):
    suite.write(PASSES + FAILS + "\ndef test_without(): pass\n")
    suite.run("--junitxml", "junit.xml", "--vmx-log-dir", "logs").assert_outcomes(passed=2, failed=1)
    cases = ElementTree.parse(suite.path / "junit.xml").getroot().iter("testcase")
    properties = {
        case.get("name").partition("[")[0]: {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in cases
    }
    log = str(suite.path / "logs" / "serial-1.log")
    for name, exits in (("test_passes", "1"), ("test_fails", "3")):
        assert properties[name].pop("vmx_engine").startswith("bochs 2.")
        assert ("vmx_reproducer" in properties[name]) == (name == "test_fails")
        properties[name].pop("vmx_reproducer", None)
        assert properties[name] == {
            "vmx_model": "corei7_skylake_x",
            "vmx_cases": "1",
            "vmx_exits": exits,
            "vmx_log": log,
        }
    assert properties["test_without"] == {}


# --- logs --------------------------------------------------------------------------------------------------


def test_logs_go_when_all_passes(suite):
    suite.write(PASSES)
    result = suite.run()
    result.assert_outcomes(passed=1)
    result.stdout.re_match_lines([r"vmxlab: bochs .* ran 1 cases with 1 exits in 1 tests"])
    result.stdout.no_fnmatch_line("vmxlab: logs are in*")
    assert list(suite.temporary.iterdir()) == []


def assert_logs_are_kept_and_named(suite, result):
    (folder,) = suite.log_folders()
    assert (folder / "serial-1.log").stat().st_size > 0
    assert (folder / "bochs-1.log").stat().st_size > 0
    result.stdout.fnmatch_lines([f"vmxlab: logs are in {folder}"])


def test_logs_stay_and_are_named_when_a_test_fails(suite):
    suite.write(PASSES + FAILS)
    result = suite.run()
    result.assert_outcomes(passed=1, failed=1)
    assert_logs_are_kept_and_named(suite, result)


def test_logs_stay_on_request(suite):
    suite.write(PASSES)
    result = suite.run("--vmx-keep")
    result.assert_outcomes(passed=1)
    assert_logs_are_kept_and_named(suite, result)


def test_logs_stay_after_ctrl_c(suite):
    suite.write(PASSES + "\ndef test_interrupted(vmxlab):\n    raise KeyboardInterrupt\n")
    result = suite.run()
    assert result.ret == 2
    assert_logs_are_kept_and_named(suite, result)


def test_logs_stay_when_no_machine_boots(suite):
    """A Pentium has no 64-bit mode: the monitor dies on its way there."""
    suite.write(PASSES)
    result = suite.run("--vmx-model", "pentium")
    result.assert_outcomes(failed=1)
    assert_logs_are_kept_and_named(suite, result)
    result.stdout.fnmatch_lines(["*vmxlab.errors.MachineDied: *triple fault*"])


def test_logs_go_where_they_are_sent_and_stay_there(suite):
    suite.write(PASSES)
    result = suite.run("--vmx-log-dir", "here/logs")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"vmxlab: logs are in {suite.path / 'here' / 'logs'}"])
    assert (suite.path / "here" / "logs" / "serial-1.log").exists()
    assert suite.log_folders() == []


def test_logs_stay_together_though_a_test_goes_to_another_directory(suite):
    suite.write("""
from vmxlab import errors
def test_goes(vmxlab, tmp_path, monkeypatch):
    vmxlab.run(Case())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.MachineError):
        vmxlab.run(Case(fields={Field.HOST_CR3: 0x3f00000}))
    vmxlab.run(Case())
    assert list(tmp_path.iterdir()) == []
""")
    suite.run("--vmx-log-dir", "logs").assert_outcomes(passed=1)
    assert len(list((suite.path / "logs").glob("serial-*.log"))) == 2


def test_folder_for_logs_that_can_not_be_made_fails_each_test_with_a_log_error(suite):
    (suite.path / "file").write_text("")
    suite.write(PASSES + FAILS)
    result = suite.run("--vmx-log-dir", "file")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["E *LogError: the serial log *file*can't be created*"])


def test_failed_assertion_about_a_failed_vm_entry_names_the_broken_rules(suite):
    suite.write("""
def test_entry(vmxlab):
    run = vmxlab.run(Case(fields={"GUEST_RFLAGS": 0, "GUEST_TR_ACCESS_RIGHTS": 0x89}))
    assert run.reasons == [ExitReason.HLT]
""")
    result = suite.run()
    result.stdout.fnmatch_lines(
        [
            "E *the VM entry failed:",
            "E *broken rule guest-tr-type (27.3.1.2): *GUEST_TR_ACCESS_RIGHTS = 0x89*",
            "E *broken rule guest-rflags-reserved (27.3.1.4): *GUEST_RFLAGS = 0x0*",
        ]
    )
