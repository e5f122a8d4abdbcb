"""What is said of a run: each exit decoded, what failed, the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmxlab.cases.case import Case
from vmxlab.console.run import End, Exit, Fault, Outcome, OutcomeKind, Run, Verdict
from vmxlab.errors import MachineDied, MissingCapability, ProgramError
from vmxlab.reports.disassembly import Code
from vmxlab.reports.runs import describe_exit, exit_table, remarks, run_json, summary, title, verdict_text
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector

ZEROS = {**dict.fromkeys(GENERAL_REGISTERS, 0), "rsp": 0x7FF0}


def exit_of(reason: int, number: int = 0, registers: dict[str, int] | None = None, **fields: Any) -> Exit:
    fields = {"rip": 0x8000, "rflags": 2, **fields}
    return Exit(number=number, full_reason=reason, registers={**ZEROS, **(registers or {})}, **fields)


def run_of(*exits: Exit, case: Case | None = None, end: End | None = End.STOP, **fields: Any) -> Run:
    return Run(case=case or Case(name="a-case"), number=0, name="a-case", exits=exits, end=end, **fields)


@pytest.mark.parametrize(
    ("exit", "text"),
    [
        (exit_of(ExitReason.HLT), "-"),
        (exit_of(ExitReason.IO_INSTRUCTION, raw_qualification=0x60_0048), "IN port 0x60, 1 byte"),
        (exit_of(ExitReason.RDMSR, registers={"rcx": 0xC000_0080}), "read of IA32_EFER (0xc0000080)"),
        (exit_of(ExitReason.RDMSR, registers={"rcx": 0x4000}), "read of MSR 0x4000"),
        (
            exit_of(ExitReason.WRMSR, registers={"rcx": 0x10, "rax": 5, "rdx": 1}),
            "write of 0x100000005 to IA32_TSC (0x10)",
        ),
        (exit_of(ExitReason.CPUID, registers={"rax": 0x8000_0001}), "leaf 0x80000001, subleaf 0x0"),
        (
            exit_of(
                ExitReason.EPT_VIOLATION,
                raw_qualification=0x182,
                guest_physical_address=0x100000,
                guest_linear_address=0x101000,
            ),
            "write, EPT allows ---; GPA 0x100000; linear 0x101000",
        ),
        (
            exit_of(ExitReason.EPT_MISCONFIGURATION, guest_physical_address=0x100000),
            "GPA 0x100000",
        ),
        (
            exit_of(
                ExitReason.EXCEPTION_OR_NMI,
                raw_interruption_information=0x8000_0B0D,
                interruption_error_code=0x18,
            ),
            "#GP (13), hardware exception, error code 0x18",
        ),
        (
            exit_of(ExitReason.RDRAND, raw_instruction_information=0x1018),
            "to rbx, 64 bits",
        ),
        (exit_of(ExitReason.WBINVD, raw_qualification=1), "WBNOINVD"),
        (exit_of(200, raw_qualification=0x1234), "0x1234"),
    ],
    ids=lambda value: value.reason_name if isinstance(value, Exit) else "",
)
def test_an_exit_in_words(exit: Exit, text: str) -> None:
    assert describe_exit(exit) == text


def test_the_event_that_was_being_delivered_is_told() -> None:
    exit = exit_of(ExitReason.EPT_VIOLATION, raw_qualification=1, raw_idt_vectoring_information=0x8000_030E)
    assert describe_exit(exit).endswith("while delivering #PF (14), hardware exception")


def test_the_table_shows_the_registers_that_changed_since_the_exit_before() -> None:
    first = exit_of(ExitReason.CPUID, registers={"rbx": 7})
    second = exit_of(ExitReason.HLT, 1, registers={"rbx": 7, "rax": 1}, rflags=0x46)
    rows = exit_table(run_of(first, second, case=Case(registers={"rbx": 7}))).json_rows()
    assert [row["changed"] for row in rows] == [[], ["rax=0x1", "rflags=0x46"]]


def test_what_l2_starts_with_is_no_change() -> None:
    case = Case(fields={Field.GUEST_RSP: 0x9000, Field.GUEST_RFLAGS: 0x202})
    exit = exit_of(ExitReason.HLT, registers={"rsp": 0x9000}, rflags=0x202)
    assert exit_table(run_of(exit, case=case)).json_rows()[0]["changed"] == []


def test_watched_fields_stand_with_the_registers() -> None:
    exit = exit_of(ExitReason.HLT, watched={Field.GUEST_CR0: 0x80000031, 0x7777: 1})
    assert exit_table(run_of(exit)).json_rows()[0]["changed"] == ["GUEST_CR0=0x80000031", "field 0x7777=0x1"]


def test_the_instruction_at_rip_is_shown_where_its_bytes_are_known() -> None:
    code = Code.of(Case(), bytes.fromhex("0fa2 f4"))
    run = run_of(
        exit_of(ExitReason.CPUID), exit_of(ExitReason.HLT, 1, rip=0x8002), exit_of(ExitReason.HLT, 2, rip=0)
    )
    assert [row["instruction"] for row in exit_table(run, code).json_rows()] == ["cpuid", "hlt", None]
    assert exit_table(run).json_rows()[0]["instruction"] is None


def test_a_failed_entry_executed_no_instruction() -> None:
    exit = exit_of(ExitReason.ENTRY_FAILURE_GUEST_STATE | ENTRY_FAILURE_BIT)
    row = exit_table(run_of(exit), Code.of(Case(), b"\xf4")).json_rows()[0]
    assert row["reason"] == "ENTRY_FAILURE_GUEST_STATE"
    assert row["instruction"] is None


def test_a_reason_without_a_name_is_shown_as_its_number() -> None:
    assert exit_table(run_of(exit_of(200))).json_rows()[0]["reason"] == "reason 0xc8"


def test_only_instructions_that_failed_or_read_something_are_remarked_on() -> None:
    outcomes = (
        Outcome("vmxon", OutcomeKind.SUCCEED),
        Outcome("vmread", OutcomeKind.SUCCEED, field=Field.GUEST_RIP, value=0x8000),
        Outcome("vmptrld", OutcomeKind.FAIL_INVALID),
        Outcome("rdmsr", OutcomeKind.FAULT, vector=Vector.GP, error_code=0, msr=0x4000),
        Outcome("vmlaunch", OutcomeKind.FAIL_VALID, error=InstructionError(7)),
    )
    assert remarks(run_of(outcomes=outcomes)) == [
        "VMREAD GUEST_RIP: VMsucceed, 0x8000",
        "VMPTRLD: VMfailInvalid",
        "RDMSR of MSR 0x4000: #GP(0x0)",
        f"VMLAUNCH: VMfailValid(7: {InstructionError(7).description})",
    ]


def test_faults_in_l1_and_reported_memory_are_remarked_on() -> None:
    run = run_of(faults=(Fault(Vector.PF, 2, 0x100000, 0x1234),), memory={0x1000: bytes(range(20))})
    fault, memory = remarks(run)
    assert fault == "#PF(0x2) in L1 at 0x100000, CR2 0x1234"
    assert memory == "memory at 0x1000: 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ... (20 bytes)"


@pytest.mark.parametrize(
    ("run", "verdict", "text"),
    [
        (run_of(exit_of(ExitReason.HLT)), Verdict.PASS, "1 exit; stopped at the last exit"),
        (
            run_of(exit_of(ExitReason.HLT), case=Case(expect=[ExitReason.HLT])),
            Verdict.PASS,
            "1 exit, as expected; stopped at the last exit",
        ),
        (
            run_of(exit_of(ExitReason.CPUID), exit_of(ExitReason.HLT, 1), case=Case(expect=[ExitReason.HLT])),
            Verdict.FAIL,
            "exit 0: expected HLT, seen CPUID (2 exits; stopped at the last exit)",
        ),
        (
            run_of(
                error=MissingCapability("VMX", "CPUID.1:ECX.VMX[5]"), verdict_on_error=Verdict.SKIP, end=None
            ),
            Verdict.SKIP,
            "the processor lacks VMX (CPUID.1:ECX.VMX[5] is 0)",
        ),
        (
            run_of(error=ProgramError("no", listing="line 1"), verdict_on_error=Verdict.ERROR, end=None),
            Verdict.ERROR,
            "no\nline 1",
        ),
        (
            run_of(error=MachineDied("gone").locate(case="x"), verdict_on_error=Verdict.CRASH, end=End.DIED),
            Verdict.CRASH,
            "gone\n  case: x",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Verdict) else "",
)
def test_the_verdict_with_its_reason(run: Run, verdict: Verdict, text: str) -> None:
    assert run.verdict is verdict
    assert verdict_text(run) == text


def test_a_case_without_a_name_goes_by_its_number() -> None:
    assert title(Run(case=Case(), number=3)) == "case 3"
    assert title(Run(case=None, number=3, name="x")) == "x"
    assert title(Run(case=Case(name="y"), number=3)) == "y"


def test_a_run_as_json_holds_all_of_every_exit() -> None:
    run = run_of(
        exit_of(ExitReason.IO_INSTRUCTION, raw_qualification=0x60_0048, instruction_length=2),
        exit_of(ExitReason.CONTROL_REGISTER_ACCESS, 1, raw_qualification=0x0),
        outcomes=(Outcome("vmlaunch", OutcomeKind.FAIL_VALID, error=InstructionError(7)),),
        memory={0x1000: b"\x01\xff"},
        log_path=Path("logs/serial.log"),
    )
    shown = json.loads(json.dumps(run_json(run, Code.of(Case(), bytes.fromhex("e460")))))
    first, second = shown["exits"]
    assert first["qualification"] == {
        "type": "IoQualification",
        "raw": "0x600048",
        "size": "0x1",
        "direction_in": True,
        "string": False,
        "rep": False,
        "immediate_operand": True,
        "port": "0x60",
    }
    assert first["instruction"] == "in al, 0x60"
    assert first["details"]["instruction_length"] == 2
    assert first["details"]["registers"]["rsp"] == "0x7ff0"
    assert second["qualification"]["access_type"] == "MOV_TO_CR"
    assert shown["outcomes"][0] == {
        "operation": "vmlaunch",
        "outcome": "valid",
        "error": 7,
        "vector": None,
        "error_code": None,
        "field": None,
        "msr": None,
        "value": None,
        "count": None,
    }
    assert (shown["verdict"], shown["end"], shown["memory"]) == ("PASS", "stop", {"0x1000": "01ff"})
    assert shown["log"] == "logs/serial.log"


def test_the_summary_counts_each_verdict_apart() -> None:
    skipped = run_of(error=MissingCapability("VMX", "x"), verdict_on_error=Verdict.SKIP)
    assert summary([run_of(exit_of(12)), run_of(exit_of(12)), skipped]) == "2 passed, 1 skipped"
    assert summary([]) == "no cases"
