"""`vmxlab run`: cases in, tables and an exit status out."""

from __future__ import annotations

from pathlib import Path

import pytest

CASES = """\
from vmxlab import Case, ExitReason, SecondaryControls
from vmxlab import Limits

good = Case(program="hlt", expect=[ExitReason.HLT])
wrong = Case(program="cpuid; hlt", expect=[ExitReason.HLT])
lacking = Case(needs=SecondaryControls.ENABLE_PCONFIG)
nonsense = Case(program="hlt; foo bar")
ports = [Case(program=f"in al, {port}; hlt", name=f"port-{port:#x}") for port in (1, 2)]
invalid = Case(eptp=0x1234)
endless = Case(program="1: jmp 1b", limits=Limits(l2_tsc=1 << 31, seconds=0.5))
"""


@pytest.fixture
def cases(folder: Path) -> Path:
    path = Path("cases.py")
    path.write_text(CASES)
    return path


def test_without_a_word_the_first_case_runs(vmxlab_cli) -> None:
    result = vmxlab_cli("run", "--engine", "bochs")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("engine  bochs ")
    assert lines[1] == "why     named by --engine"
    assert lines[2].startswith("image   monitor build 0x")
    table = [line.split(maxsplit=2) for line in lines if line[:1].isdigit()]
    assert [row[:2] for row in table] == [
        ["0", "IO_INSTRUCTION"],
        ["1", "IO_INSTRUCTION"],
        ["2", "RDMSR"],
        ["3", "EPT_VIOLATION"],
        ["4", "HLT"],
    ]
    for row, words in enumerate(
        (
            ("IN port 0x60, 1 byte", "0x8000", "in al, 0x60"),
            ("OUT port 0xb000, 2 bytes", "out dx, ax", "rdx=0xb000"),
            ("read of IA32_EFER (0xc0000080)", "rdmsr", "rcx=0xc0000080"),
            ("write, EPT allows ---", "GPA 0x100000", "mov [0x100000], rax", "rax=0x500"),
            ("hlt", "rbx=0x500"),
        )
    ):
        for word in words:
            assert word in table[row][2]
    assert "PASS  first-case: 5 exits, as expected; stopped at the last exit" in lines
    assert Path(lines[-1].removeprefix("log  ")).is_file()


def test_the_first_case_out_of_an_image_does_the_same(vmxlab_cli) -> None:
    live = vmxlab_cli("run", "--engine", "bochs", "--json").json
    image = vmxlab_cli("run", "--engine", "bochs", "--json", "--image").json
    assert live["runs"][0]["verdict"] == image["runs"][0]["verdict"] == "PASS"
    assert [exit["reason"] for exit in live["runs"][0]["exits"]] == [
        exit["reason"] for exit in image["runs"][0]["exits"]
    ]


def test_json_is_all_that_is_printed(vmxlab_cli) -> None:
    shown = vmxlab_cli("run", "--engine", "bochs", "--json").json
    assert shown["engine"].startswith("bochs ")
    assert shown["summary"] == "1 passed"
    assert shown["broken_lines"] == []
    (run,) = shown["runs"]
    assert run["exits"][0]["qualification"]["port"] == "0x60"
    assert run["exits"][4]["details"]["registers"]["rbx"] == "0x500"


def test_without_vmx_the_case_is_skipped_with_the_bit(vmxlab_cli) -> None:
    result = vmxlab_cli("run", "--engine", "tcg")
    assert result.status == 0
    assert "SKIP  first-case: the processor lacks VMX (CPUID.1:ECX.VMX[5] is 0)" in result.out


def test_a_processor_without_ept_skips_the_first_case_with_the_bit(vmxlab_cli) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", "--model", "core2_penryn_t9600")
    assert result.status == 0
    assert (
        "SKIP  first-case: the processor lacks ENABLE_EPT (IA32_VMX_PROCBASED_CTLS2[33] is 0)" in result.out
    )


@pytest.mark.parametrize(
    ("names", "status", "summary"),
    [
        (["good", "lacking"], 0, "1 passed, 1 skipped"),
        (["good", "wrong"], 1, "1 passed, 1 failed"),
        (["wrong", "nonsense", "good"], 3, "1 passed, 1 failed, 1 had an error"),
        (["nonsense", "endless", "good"], 4, "1 passed, 1 had an error, 1 crashed"),
    ],
)
def test_the_worst_verdict_is_the_exit_status_and_the_other_cases_run(
    vmxlab_cli, cases: Path, names: list[str], status: int, summary: str
) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", *(f"{cases}::{name}" for name in names))
    assert result.status == status
    assert summary in result.out.splitlines()


def test_a_crash_is_told_with_the_last_record_and_the_log(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", f"{cases}::endless", "--log-dir", "here")
    assert result.status == 4
    (crash,) = [line for line in result.out.splitlines() if line.startswith("CRASH")]
    assert crash.startswith("CRASH  endless: ")
    assert "last record: @" in result.out
    assert "log: here/serial-" in result.out


def test_the_assemblers_message_points_at_the_statement(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", f"{cases}::nonsense")
    assert result.status == 3
    assert "ERROR  nonsense: the guest program does not assemble" in result.out
    assert "line 1: hlt; foo bar\n               ^~~~~~~ no such instruction" in result.out
    assert "Traceback" not in result.out + result.err


def test_a_vmx_instruction_that_failed_is_shown_with_its_error(vmxlab_cli, cases: Path) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", f"{cases}::invalid")
    assert "  VMLAUNCH: VMfailValid(7: VM entry with invalid control fields)" in result.out.splitlines()


def test_a_program_with_ports_and_msrs_to_intercept(vmxlab_cli) -> None:
    program = "in al, 0x60; in al, 0x61; in al, 0x62; mov ecx, 0x1b; rdmsr; mov ecx, 0x174; rdmsr; hlt"
    ports = ("--intercept-port", "0x60", "--intercept-port", "98")
    result = vmxlab_cli(
        "run", "--engine", "bochs", "--json", "--program", program, *ports, "--intercept-msr", "0x1b"
    )
    exits = result.json["runs"][0]["exits"]
    assert [exit["description"] for exit in exits] == [
        "IN port 0x60, 1 byte",
        "IN port 0x62, 1 byte",
        "read of IA32_APIC_BASE (0x1b)",
        "-",
    ]


def test_a_program_alone_has_every_port_and_msr_exit(vmxlab_cli) -> None:
    result = vmxlab_cli(
        "run", "--engine", "bochs", "--json", "--program", "in al, 0x61; mov ecx, 0x174; rdmsr; hlt"
    )
    assert [exit["reason"] for exit in result.json["runs"][0]["exits"]] == ["IO_INSTRUCTION", "RDMSR", "HLT"]


@pytest.mark.parametrize(
    ("mode", "program", "instruction"),
    [
        ("long", "mov rax, [rip+5]; cpuid; hlt", "cpuid"),
        ("protected", "push eax; inc eax; cpuid; hlt", "cpuid"),
        ("real", "mov ax, [bx+si]; cpuid; hlt", "cpuid"),
    ],
)
def test_a_program_runs_in_the_mode_it_is_for(vmxlab_cli, mode: str, program: str, instruction: str) -> None:
    result = vmxlab_cli("run", "--engine", "bochs", "--json", "--mode", mode, "--program", program)
    assert [exit["instruction"] for exit in result.json["runs"][0]["exits"]] == [instruction, "hlt"]


def test_a_name_picks_a_list_one_of_it_or_a_case_by_its_own_name(vmxlab_cli, cases: Path) -> None:
    def names(name: str) -> list[str]:
        result = vmxlab_cli("run", "--engine", "bochs", "--json", f"{cases}::{name}")
        return [run["name"] for run in result.json["runs"]]

    assert names("ports") == ["port-0x1", "port-0x2"]
    assert names("ports[1]") == ["port-0x2"]
    assert names("port-0x1") == ["port-0x1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--engine", "nonsense"],
            "'nonsense' is not one of 'auto', 'auto-kvm', 'kvm', 'bochs', 'kvm-in-bochs', 'tcg'",
        ),
        (["none.py"], "there is no file 'none.py'"),
        (["."], "'.' is a folder"),
        (
            ["cases.py::nobody"],
            "has no case 'nobody'; it has good, wrong, lacking, nonsense, ports[0] (port-0x1)",
        ),
        (["--program", "hlt", "cases.py"], "either --program or files, not both"),
        (["--mode", "real"], "are for --program"),
        (["cases.py", "--intercept-port", "1"], "are for --program"),
        (
            ["--program", "hlt", "--intercept-port", "0x10000"],
            "0x10000 is out of range: an I/O port is 0 to 0xffff",
        ),
        (["--program", "hlt", "--intercept-port", "-1"], "-1 is out of range: an I/O port is 0 to 0xffff"),
        (["--program", "hlt", "--intercept-port", "sixty"], "'sixty' is no number; write 96 or 0x60"),
        (["--program", "hlt", "--intercept-msr", "0x4000"], "0xc0001fff; any other MSR always exits"),
        (["--program", "hlt", "--mode", "virtual"], "'virtual' is not one of 'long', 'protected', 'real'"),
        (["--log-dir", "cases.py"], "is a file"),
    ],
)
def test_wrong_usage_is_said_before_anything_boots(
    vmxlab_cli, cases: Path, arguments: list[str], message: str
) -> None:
    result = vmxlab_cli("run", *arguments)
    assert result.status == 2
    assert message in result.err
    assert result.out == ""
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "bochs", "--model", "nonsense"], "has no processor model 'nonsense'"),
        (["--engine", "bochs", "--log-dir", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_what_can_not_be_done_is_an_error_with_advice(vmxlab_cli, arguments: list[str], message: str) -> None:
    result = vmxlab_cli("run", *arguments)
    assert result.status == 3
    assert result.err.startswith("vmxlab: error: ")
    assert message in result.err
    assert "what to do: " in result.err
    assert result.out == ""


def test_logs_that_can_have_no_folder_are_an_error(vmxlab_cli) -> None:
    Path("logs").write_text("not a folder")
    result = vmxlab_cli("run", "--engine", "bochs")
    assert result.status == 3
    assert "there can be no logs in" in result.err
    assert "--log-dir" in result.err


def test_every_call_gets_a_log_folder_of_its_own(vmxlab_cli) -> None:
    for number in (1, 2):
        vmxlab_cli("run", "--engine", "tcg")
        assert len(list(Path(f"logs/run-{number}").glob("serial-*.log"))) == 1


def test_a_broken_line_in_the_log_is_counted_and_shown(folder: Path) -> None:
    from vmxlab.cli.run import _broken_lines
    from vmxlab.console.run import Run

    log = Path("serial.log")
    log.write_bytes(b"# remark\n@end id=0x0 why=stop exits=0x1*0000\nvmx> @do")
    run = Run(case=None, number=0, log_path=log)
    (line,) = _broken_lines([run, run])
    assert line.startswith("serial.log, line 2: the checksum does not fit")


# --- reproducers -------------------------------------------------------------------------------------------

FAILING = """\
from vmxlab import Case, ExitReason
cases = [Case(expect=[ExitReason.HLT if n == 3 else ExitReason.CPUID]) for n in range(14)]
crash = Case(program="cpuid; hlt", fields={"HOST_CR3": 0x3f00000})
refused = Case(program="foo bar")
"""


def test_failed_cases_leave_reproducers_beside_the_logs(vmxlab_cli, folder: Path) -> None:
    (folder / "failing.py").write_text(FAILING)
    result = vmxlab_cli("run", "failing.py", "--engine", "bochs", "--log-dir", "logs")
    assert result.status == 4
    assert "reproducer of cases[0]  logs/failed/case-0\n" in result.out
    assert "5 more failed cases have none: the first 10 are kept\n" in result.out
    kept = {path.name for path in Path("logs/failed").iterdir()}
    assert kept == {f"case-{n}" for n in range(11) if n != 3}
    chosen = ("failing.py::cases[3]", "failing.py::crash", "failing.py::refused")
    result = vmxlab_cli("run", *chosen, "--engine", "bochs", "--log-dir", "more", "--json")
    assert result.json["reproducers"] == {"1": "more/failed/case-1", "2": "more/failed/case-2"}
    assert Path("more/failed/case-1/case.rom").exists()
    assert "foo bar" in Path("more/failed/case-2/reproduce.py").read_text()


def test_reproducer_that_can_not_be_written_is_said_and_changes_nothing(vmxlab_cli, folder: Path) -> None:
    (folder / "failing.py").write_text(FAILING)
    Path("logs").mkdir()
    Path("logs/failed").write_text("")
    result = vmxlab_cli("run", "failing.py::cases[0]", "--engine", "bochs", "--log-dir", "logs")
    assert result.status == 1
    assert "no reproducer: the log logs/failed/case-0 can't be written" in result.out
