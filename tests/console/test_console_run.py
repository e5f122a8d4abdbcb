"""Runs, rebuilt from records alone: outcomes, exits, ends, verdicts; and what is no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmxlab import Case, End, ExitReason, Field, InstructionError, OutcomeKind, Verdict
from vmxlab.console.rebuild import run_from_records, runs_from_records
from vmxlab.console.records import parse_line, parse_log
from vmxlab.console.run import Exit, Outcome, Run
from vmxlab.errors import MissingCapability, ProtocolError
from vmxlab.sdm.registers import GENERAL_REGISTERS, Vector

LOG = Path(__file__).with_name("bochs.log").read_bytes()


@pytest.fixture
def run_of(record):
    """run_of((kind, values), ..., case=None) -> the run of these records."""

    def make(*records, **about):
        return run_from_records([parse_line(record(k, **v).rstrip()) for k, v in records], **about)

    return make


START = ("case", {"id": 3, "name": "n"})
LAUNCH = {"by": "vmlaunch"}


def end(exits=0, why="stop"):
    return ("end", {"id": 3, "why": why, "exits": exits})


# --- a log --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return runs_from_records(parse_log(LOG)[0])


def test_every_run_of_a_log_is_there_under_its_name(runs):
    assert [(run.number, run.name) for run in runs] == [
        *((0, "ports"), (1, "wrong-revision"), (2, "ept")),
        *((3, "steps"), (4, "bad-guest"), (5, "")),
    ]
    assert [run.end for run in runs] == [End.STOP, End.VMFAIL, End.STOP, End.STOP, End.STOP, End.STOP]


def test_exits_are_what_they_were(runs):
    assert runs[0].reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    first, second = runs[0].exits
    assert (first.qualification.port, first.qualification.is_in) == (0x60, False)
    assert (first.rip, first.instruction_length, first.rflags) == (0x8002, 2, 2)
    assert (second.raw_qualification, second.rip) == (0, 0x8006)


def test_registers_accumulate_by_what_each_exit_says_has_changed(runs):
    first, second = runs[0].exits
    assert list(first.registers) == list(GENERAL_REGISTERS)
    assert {k: v for k, v in first.registers.items() if v} == {"rax": 0x5A, "rsp": 0x7FF0}
    assert {k: v for k, v in second.registers.items() if v} == {"rax": 0x21, "rsp": 0x7FF0}
    assert (first.rflags, second.rflags) == (2, 2)


def test_watched_fields_are_there_by_their_field(runs):
    assert runs[2].exits[0].watched == {Field.GUEST_CR0: 0x8000_0031, Field.GUEST_CS_SELECTOR: 8}
    assert runs[2].exits[0].registers["r15"] == 0x1234
    assert runs[2].exits[0].guest_physical_address == runs[2].exits[0].guest_linear_address == 0x10_0000


def test_outcomes_of_a_list_and_of_their_own_records_stand_in_order(runs):
    assert [(o.operation, o.kind, o.count) for o in runs[0].outcomes] == [
        ("vmxon", OutcomeKind.SUCCEED, None),
        ("vmclear", OutcomeKind.SUCCEED, None),
        ("vmptrld", OutcomeKind.SUCCEED, None),
        ("vmwrite", OutcomeKind.SUCCEED, 0x61),
        ("vmlaunch", OutcomeKind.SUCCEED, None),
    ]
    assert [str(outcome) for outcome in runs[3].outcomes[3:9]] == [
        "VMREAD 0xffff: VMfailValid(12: " + InstructionError(12).description + ")",
        "VMREAD VM_INSTRUCTION_ERROR: VMsucceed",
        "RDMSR: VMsucceed",
        "WRMSR: #GP(0x0)",
        "VMPTRST: VMsucceed",
        "VMWRITE of 95 fields: VMsucceed",
    ]


def test_outcomes_carry_their_details(runs):
    vmread, error, rdmsr, wrmsr, vmptrst = runs[3].outcomes[3:8]
    assert (vmread.kind, vmread.field, vmread.error) == (
        OutcomeKind.FAIL_VALID,
        0xFFFF,
        InstructionError.UNSUPPORTED_COMPONENT,
    )
    assert (error.field, error.value) == (Field.VM_INSTRUCTION_ERROR, 12)
    assert (rdmsr.msr, rdmsr.value) == (0x480, 0xD8_1000_0000_002B)
    assert (wrmsr.kind, wrmsr.vector, wrmsr.error_code) == (OutcomeKind.FAULT, Vector.GP, 0)
    assert vmptrst.value == 0x100_1000
    assert runs[1].outcome("vmptrld") == Outcome("vmptrld", OutcomeKind.FAIL_INVALID)


def test_an_entry_failure_is_an_exit_and_an_entry(runs):
    """SDM Vol. 3C, 27.8: the reason has bit 31 set; L2 did not run."""
    exit_ = runs[4].exits[0]
    assert exit_.entry_failed
    assert (exit_.full_reason, exit_.reason) == (0x8000_0021, ExitReason.ENTRY_FAILURE_GUEST_STATE)
    assert runs[4].entry == Outcome("vmlaunch", OutcomeKind.SUCCEED)
    assert not runs[0].exits[0].entry_failed


def test_reported_memory_is_there_by_its_address(runs):
    assert runs[3].memory == {0x120_8000: bytes([0xF4, 0, 0, 0, 0, 0, 0, 0])}


def test_an_exception_is_decoded(runs):
    interruption = runs[5].exits[0].interruption
    assert (interruption.vector, interruption.valid) == (3, True)
    assert not runs[5].exits[1].interruption.valid


def test_a_run_keeps_its_records(runs):
    for run in runs:
        assert run.records[0].kind == "case"
        assert run.records[-1].kind == "end"
        again = run_from_records(run.records)
        assert (again.outcomes, again.exits, again.memory) == (run.outcomes, run.exits, run.memory)


# --- exits and outcomes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [200, 0xFFFF, 35])
def test_a_reason_without_a_name_survives_as_a_number(run_of, reason):
    run = run_of(START, ("exit", {"n": 0, **LAUNCH, "reason": reason, "qual": 5}), end(1))
    assert run.reasons == [reason]
    assert run.exits[0].raw_qualification == run.exits[0].qualification.raw == 5
    assert f"reason {reason:#x}" in str(run.exits[0])


def test_unknown_numbers_survive_everywhere(run_of):
    run = run_of(
        START,
        ("vmx", {"op": "vmxon", "rc": "valid", "error": 99}),
        ("vmx", {"op": "vmread", "field": 0xFFFE, "rc": "fault", "vector": 77, "code": 1}),
        ("exit", {"n": 0, "reason": 0, "fffff": 9, "f0000": 8, "unheard": 7}),
        end(1),
    )
    assert run.outcomes[0].error == 99
    assert "VMfailValid(99: unknown)" in str(run.outcomes[0])
    assert (run.outcomes[1].field, run.outcomes[1].vector) == (0xFFFE, 77)
    assert run.exits[0].watched == {0xFFFF: 9, Field.VPID: 8}
    assert [type(key) for key in run.exits[0].watched] == [int, Field]


def test_every_key_of_an_exit_has_its_attribute(run_of):
    keys = "reason qual len info gla gpa intr ierr idtv iderr rip rflags rax r15"
    values = {key: number for number, key in enumerate(keys.split(), 1)}
    (exit_,) = run_of(START, ("exit", {"n": 0, **values}), end(1)).exits
    registers = dict.fromkeys(GENERAL_REGISTERS, 0) | {"rax": 13, "r15": 14}
    assert exit_ == Exit(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, registers, {})


def test_fields_that_are_left_out_are_zero_and_registers_as_they_were(run_of):
    run = run_of(
        START,
        ("exit", {"n": 0, "reason": 10, "qual": 1, "rax": 1, "rbx": 2, "rflags": 0x46}),
        ("exit", {"n": 1, "reason": 10, "rax": 0}),
        ("exit", {"n": 2, "reason": 10, "rflags": 2, "rbx": 3}),
        end(3),
    )
    assert [e.raw_qualification for e in run.exits] == [1, 0, 0]
    assert [(e.registers["rax"], e.registers["rbx"], e.rflags) for e in run.exits] == [
        (1, 2, 0x46),
        (0, 2, 0x46),
        (0, 3, 2),
    ]


def test_registers_of_one_run_do_not_go_on_into_the_next(run_of):
    first = run_of(START, ("exit", {"n": 0, "reason": 10, "rax": 1}), end(1))
    second = run_of(START, ("exit", {"n": 0, "reason": 10}), end(1))
    assert (first.exits[0].registers["rax"], second.exits[0].registers["rax"]) == (1, 0)


def test_by_says_that_an_entry_took_place(run_of):
    run = run_of(
        START,
        ("vmx", {"ok": "vmxon"}),
        ("exit", {"n": 0, "by": "vmlaunch", "reason": 12}),
        ("exit", {"n": 1, "by": "vmresume", "reason": 12}),
        end(2),
    )
    assert [o.operation for o in run.outcomes] == ["vmxon", "vmlaunch", "vmresume"]
    assert run.entry == Outcome("vmresume", OutcomeKind.SUCCEED)


def test_a_failed_entry_is_the_entry(run_of):
    run = run_of(START, ("vmx", {"op": "vmlaunch", "rc": "valid", "error": 7}), end(0, "vmfail"))
    assert run.entry.error is InstructionError(7)
    assert not run.entry.ok


def test_without_an_entry_there_is_none_and_a_missing_outcome_names_those_there_are(run_of):
    run = run_of(START, ("vmx", {"ok": "vmxon,vmxoff"}), end(0, "done"))
    assert run.entry is None
    with pytest.raises(KeyError, match=r"vmxon.*vmxoff"):
        run.outcome("vmclear")


def test_a_fault_in_l1_is_reported(run_of):
    run = run_of(START, ("fault", {"vector": 14, "code": 2, "rip": 0x1234, "cr2": 0xDEAD}), end(0, "fault"))
    (fault,) = run.faults
    assert (fault.vector, fault.error_code, fault.rip, fault.cr2) == (Vector.PF, 2, 0x1234, 0xDEAD)
    assert str(fault) == "#PF(0x2) in L1 at 0x1234, CR2 0xdead"


# --- what makes no run --------------------------------------------------------------------------------------

EXITS = [("exit", {"n": n, "reason": 10}) for n in range(3)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([START, EXITS[0], EXITS[2], end(3)], "exit 1 is missing: the next record is of exit 2"),
        ([START, EXITS[1], end(2)], "exit 0 is missing"),
        ([START, EXITS[0], EXITS[0], end(2)], "exit 1 is missing: the next record is of exit 0"),
        ([START, EXITS[0], EXITS[1], end(3)], "the case had 3 exits, records of 2 arrived"),
        ([START, EXITS[0], end(0)], "the case had 0 exits, records of 1 arrived"),
        ([START, end(0, "boredom")], "makes no sense"),
        ([START, ("exit", {"reason": 1}), end(1)], "makes no sense.*'n'"),
        ([START, ("exit", {"n": 0}), end(1)], "makes no sense.*'reason'"),
        ([START, ("exit", {"n": 0, "reason": "often"}), end(1)], "makes no sense"),
        ([START, ("exit", {"n": 0, "reason": 1, "foo": 1}), end(1)], "makes no sense"),
        ([START, ("vmx", {"op": "vmxon"}), end()], "makes no sense.*'rc'"),
        ([START, ("vmx", {"op": "vmxon", "rc": "maybe"}), end()], "makes no sense"),
        ([START, ("vmx", {"rc": "ok"}), end()], "makes no sense.*'op'"),
        ([START, ("vmx", {"ok": "vmwrite:many"}), end()], "makes no sense"),
        ([START, ("memory", {"at": 0, "data": "abc"}), end()], "makes no sense"),
        ([START, ("fault", {"vector": 14}), end()], "makes no sense"),
        ([("case", {"name": "x"}), end()], "makes no sense.*'id'"),
        ([START, ("end", {"why": "stop"})], "makes no sense.*'exits'"),
    ],
)
def test_records_that_contradict_each_other_are_a_protocol_error(run_of, records, message):
    with pytest.raises(ProtocolError, match=message):
        run_of(*records)


def test_records_of_kinds_still_to_come_are_passed_over(run_of):
    run = run_of(START, ("novelty", {"x": 1}), ("take", {}), end())
    assert run.end is End.STOP


# --- verdicts -----------------------------------------------------------------------------------------------


def verdict_of(run_of, *records, expect=None, **about):
    return run_of(START, *records, case=Case(program=b"\xf4", expect=expect), **about)


@pytest.mark.parametrize(
    ("expect", "verdict", "difference"),
    [
        (None, Verdict.PASS, None),
        ([ExitReason.CPUID, ExitReason.CPUID], Verdict.PASS, None),
        ([10, 10], Verdict.PASS, None),
        ([10], Verdict.FAIL, "exit 1: expected no more exits, seen CPUID"),
        ([], Verdict.FAIL, "exit 0: expected no more exits, seen CPUID"),
        ([10, 10, 12], Verdict.FAIL, "exit 2: expected HLT, seen the end (stop)"),
        ([10, 200], Verdict.FAIL, "exit 1: expected 0xc8, seen CPUID"),
    ],
)
def test_the_verdict_is_by_the_exits_that_were_expected(run_of, expect, verdict, difference):
    run = verdict_of(run_of, *EXITS[:2], end(2), expect=expect)
    assert (run.verdict, run.difference()) == (verdict, difference)


@pytest.mark.parametrize(
    ("records", "why", "verdict"),
    [
        ([("vmx", {"op": "vmptrld", "rc": "invalid"})], "vmfail", Verdict.FAIL),
        ([("fault", {"vector": 13, "code": 0, "rip": 0, "cr2": 0})], "fault", Verdict.FAIL),
        ([], "done", Verdict.PASS),
        ([], "limit", Verdict.PASS),
        ([], "script", Verdict.ERROR),
    ],
)
def test_where_nothing_is_expected_the_end_decides(run_of, records, why, verdict):
    run = verdict_of(run_of, *records, end(0, why))
    assert run.verdict is verdict
    assert (run.difference() is not None) == (verdict is Verdict.FAIL)


def test_an_expected_failure_is_no_failure(run_of):
    run = verdict_of(run_of, ("vmx", {"op": "vmptrld", "rc": "invalid"}), end(0, "vmfail"), expect=[])
    assert run.verdict is Verdict.PASS


def test_a_run_without_an_end_is_a_crash_whatever_was_expected(run_of):
    assert verdict_of(run_of, EXITS[0], expect=[10]).verdict is Verdict.CRASH
    assert Run(None, 0, end=End.HUNG).verdict is Verdict.CRASH
    assert Run(None, 0, end=End.DIED).verdict is Verdict.CRASH


@pytest.mark.parametrize("verdict", [Verdict.SKIP, Verdict.ERROR, Verdict.CRASH])
def test_what_stopped_a_run_is_its_verdict(run_of, verdict):
    error = MissingCapability("X", "Y[1]")
    run = verdict_of(run_of, *EXITS[:1], end(1), error=error, verdict_on_error=verdict)
    assert run.verdict is verdict
    assert run.error is error


def test_the_five_verdicts_are_five():
    assert [verdict.value for verdict in Verdict] == ["pass", "fail", "skip", "error", "crash"]


# --- logs that are damaged ----------------------------------------------------------------------------------


def essence(run: Run) -> tuple:
    return run.number, run.name, run.outcomes, run.exits, run.memory, run.end


def test_a_log_cut_at_any_byte_gives_what_is_whole(runs):
    """Records are numbered, so what stands before a cut always makes sense: nothing raises.

    The run that was cut has no end, and so is a CRASH; those before it are what they were.
    """
    for length in range(len(LOG) + 1):
        found = runs_from_records(parse_log(LOG[:length])[0])
        assert len(found) <= len(runs)
        for index, run in enumerate(found):
            whole = runs[index]
            if run.end is not None:
                assert essence(run) == essence(whole)
                continue
            assert index == len(found) - 1
            assert run.verdict is Verdict.CRASH
            assert run.number == whole.number and run.name == whole.name
            assert run.exits == whole.exits[: len(run.exits)]
            assert run.outcomes == whole.outcomes[: len(run.outcomes)]


def test_a_lost_line_costs_one_run_and_never_another(runs):
    """Whichever line it is: a run is as it was, or an ERROR, or lacks what nothing counts."""
    lines = LOG.splitlines(keepends=True)
    for lost, line in enumerate(lines):
        found = runs_from_records(parse_log(b"".join(lines[:lost] + lines[lost + 1 :]))[0])
        same = sum(any(essence(run) == essence(whole) for run in found) for whole in runs)
        assert same >= len(runs) - 1, line
        assert len(found) == len(runs), line
        if line.startswith((b"@exit", b"@case")):
            assert [run.verdict for run in found].count(Verdict.ERROR) == 1, line
        if line.startswith(b"@end"):
            assert [run.end for run in found].count(None) == 1, line


def test_a_run_that_makes_no_sense_is_an_error_with_its_number_and_reason(record, case_text):
    log = (
        case_text(0)
        + case_text(1, (10, 12), name="bad").replace(b"@exit n=0x0", b"@lost n=0x0")
        + case_text(2)
    )
    first, bad, last = runs_from_records(parse_log(log)[0])
    assert (first.verdict, bad.verdict, last.verdict) == (Verdict.PASS, Verdict.ERROR, Verdict.PASS)
    assert (bad.number, bad.name) == (1, "bad")
    assert isinstance(bad.error, ProtocolError)
    assert "exit 0 is missing" in bad.error.message
    assert bad.records


def test_a_run_whose_start_is_lost_is_an_error_and_not_part_of_the_one_before(record, case_text):
    log = case_text(0) + case_text(1).partition(b"\n")[2] + case_text(2)
    first, bad, last = runs_from_records(parse_log(log)[0])
    assert [run.verdict for run in (first, bad, last)] == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]
    assert "the start of this case is missing" in bad.error.message
    assert len(first.exits) == 1


def test_a_fault_at_the_prompt_is_of_no_run(record, case_text):
    fault = record("fault", vector=14, code=0, rip=0, cr2=0)
    found = runs_from_records(parse_log(fault + case_text(0) + fault + case_text(1) + fault)[0])
    assert [(run.number, run.faults) for run in found] == [(0, ()), (1, ())]


def test_a_log_without_cases_has_no_runs(boot_text):
    assert runs_from_records(parse_log(boot_text())[0]) == []
