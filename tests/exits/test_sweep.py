"""Sweeps on a machine: digests of monitor and oracle agree, and what differs is named, value by value."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, replace

import pytest

from vmxlab import Case, ExitReason, Field, IOBitmap, Limits, MsrBitmap, PinControls
from vmxlab.cases.steps import STANDARD
from vmxlab.cases.sweep import VMCALL, Instruction, Question, Sweep
from vmxlab.cases.sweep_questions import io_questions, msr_questions, safe_io_bitmap, safe_msr_bitmap
from vmxlab.console.rebuild import runs_from_records
from vmxlab.console.records import parse_log
from vmxlab.console.run import End, Verdict
from vmxlab.console.sweep import NAMED, ask, ask_all, digests_of
from vmxlab.oracle.sweep import predict_sweep

QUICK = [*io_questions(7, quick=True), *msr_questions(7, quick=True)]
A_SWEEP = Sweep(register="rdx", first=0, count=10)


def in_al(bitmap: IOBitmap, **more) -> Question:
    about = {"name": "in-al", "first": 0, "count": 0x10000, "block": 4096} | more
    return Question(instruction=Instruction.IN_AL, io_bitmap=bitmap, **about)


def with_bit(bitmap: IOBitmap, port: int, value: bool) -> IOBitmap:
    changed = bitmap.copy()
    changed.set_intercept(port, value)
    return changed


def values(result) -> list[int]:
    return [difference.value for difference in result.differences]


def sweep_case(sweep: Sweep, program: str | bytes = VMCALL, **case) -> Case:
    return Case(program=program, steps=(*STANDARD[:-1], sweep), **case)


# --- all as predicted --------------------------------------------------------------------------------------


def test_some_thirty_thousand_exits_of_ports_and_msrs_are_as_predicted(vmxlab) -> None:
    results = list(ask_all(vmxlab.lab, QUICK))
    wrong = [
        (r.question.name, str(r.failure or r.error or r.differences))
        for r in results
        if r.verdict is not Verdict.PASS
    ]
    assert wrong == []
    assert sum(result.exits for result in results) == sum(question.exits for question in QUICK) > 20_000


def test_the_machine_is_asked_with_what_makes_exits_cheaper(vmxlab, monkeypatch) -> None:
    cases, run = [], vmxlab.lab.run
    monkeypatch.setattr(vmxlab.lab, "run", lambda case: cases.append(case) or run(case))
    question = in_al(safe_io_bitmap(), first=0x4000, count=16)
    assert ask(vmxlab.lab, question).verdict is Verdict.PASS
    assert cases == [question.suited_to(vmxlab.capabilities).case()]


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    "question",
    [
        in_al(safe_io_bitmap(random.Random(1).randbytes(8192)), first=0x340, count=400, stride=5, block=64),
        in_al(safe_io_bitmap(), first=0xFF80, count=0x80, walk=True, offsets=(-1, 0, 1), name="one-set"),
        Question(
            name="rdmsr",
            instruction=Instruction.RDMSR,
            first=0xC000_0000,
            count=0x140,
            msr_bitmap=safe_msr_bitmap(random.Random(1).randbytes(4096)),
        ),
    ],
    ids=lambda question: question.name,
)
def test_monitor_and_oracle_agree_block_by_block(vmxlab, question: Question) -> None:
    """As it stands, and with what makes its exits cheaper."""
    for asked in (question, question.suited_to(vmxlab.capabilities)):
        run = vmxlab.run(asked.case())
        assert run.end is End.DONE
        assert digests_of(run) == predict_sweep(asked, vmxlab.capabilities)
    assert run.exits == ()


# --- what differs is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "port", "bit"),
    [
        (IOBitmap.intercept_all(), 0x1234, False),
        (safe_io_bitmap(), 0x7FFF, True),
        (safe_io_bitmap(random.Random(3).randbytes(8192)), 0x8000, None),
    ],
    ids=["a set bit cleared", "a clear bit set", "a random bitmap's bit turned"],
)
def test_one_bit_broken_behind_the_oracles_back_is_found_and_no_other(vmxlab, start, port, bit) -> None:
    bit = not start.intercepts(port) if bit is None else bit
    assert start.intercepts(port) is not bit
    predicted = in_al(start, first=port - 2048, count=4096, block=1024)
    result = ask(vmxlab.lab, replace(predicted, io_bitmap=with_bit(start, port, bit)), predicted=predicted)
    assert result.verdict is Verdict.FAIL
    assert values(result) == [port]
    assert result.exits == 4096
    (difference,) = result.differences
    seen, missed = ("IO_INSTRUCTION", "VMCALL") if bit else ("VMCALL", "IO_INSTRUCTION")
    assert str(difference).startswith(f"IN AL, DX, port {port:#x}: predicted {missed}, ")
    assert f"; seen exit {difference.seen.number}: {seen}, " in str(difference)


def test_a_bit_differs_for_each_wide_access_that_covers_its_port(vmxlab) -> None:
    start = safe_io_bitmap()
    predicted = replace(in_al(start, first=0x4000, count=256), instruction=Instruction.IN_EAX)
    result = ask(vmxlab.lab, replace(predicted, io_bitmap=with_bit(start, 0x4080, True)), predicted=predicted)
    assert values(result) == [0x407D, 0x407E, 0x407F, 0x4080]


@pytest.mark.parametrize("write", [False, True], ids=["RDMSR", "WRMSR"])
@pytest.mark.parametrize("msr", [0x174, 0xC000_0102])
def test_one_broken_bit_of_an_msr_bitmap_is_found(vmxlab, msr: int, write: bool) -> None:
    bitmap = MsrBitmap.intercept_all()
    predicted = Question(
        name="msrs",
        instruction=Instruction.WRMSR if write else Instruction.RDMSR,
        first=msr & ~0xFFF,
        count=1024,
        msr_bitmap=bitmap,
    )
    broken = bitmap.copy()
    (broken.set_write_intercept if write else broken.set_read_intercept)(msr, False)
    result = ask(vmxlab.lab, replace(predicted, msr_bitmap=broken), predicted=predicted)
    assert values(result) == [msr]


def test_in_a_walk_the_changed_bit_is_named_too(vmxlab) -> None:
    start = safe_io_bitmap()
    predicted = in_al(start, first=0x4000, count=128, walk=True, offsets=(-1, 0, 1))
    result = ask(vmxlab.lab, replace(predicted, io_bitmap=with_bit(start, 0x4040, True)), predicted=predicted)
    # Asked as a neighbour from below and from above; while its own bit is set it exits anyhow.
    assert [(d.value, d.walked) for d in result.differences] == [(0x4040, 0x403F), (0x4040, 0x4041)]
    assert "(while the bit of port 0x403f was changed)" in str(result.differences[0])


def test_where_everything_differs_not_every_value_is_named(vmxlab) -> None:
    predicted = in_al(IOBitmap.intercept_all(), first=0x4000, count=2048, block=256)
    result = ask(vmxlab.lab, replace(predicted, io_bitmap=safe_io_bitmap()), predicted=predicted)
    assert result.verdict is Verdict.FAIL
    assert values(result) == list(range(0x4000, 0x4000 + NAMED))
    assert [digest.at for digest in result.more] == list(range(256, 2048, 256))


@dataclass(frozen=True, slots=True, kw_only=True)
class StopsAtIo(Question):
    """Every I/O exit ends the sweep, as if it were a deadly one."""

    def sweep(self) -> Sweep:
        return replace(Question.sweep(self), stop=frozenset({ExitReason.IO_INSTRUCTION}))


def test_an_exit_that_ends_the_sweep_is_named_and_the_values_behind_it_are_asked(vmxlab) -> None:
    predicted = StopsAtIo(
        name="stops",
        instruction=Instruction.IN_AL,
        first=0x4000,
        count=256,
        block=64,
        io_bitmap=safe_io_bitmap(),
    )
    bitmap = with_bit(with_bit(safe_io_bitmap(), 0x4011, True), 0x40FF, True)
    result = ask(vmxlab.lab, replace(predicted, io_bitmap=bitmap), predicted=predicted)
    assert values(result) == [0x4011, 0x40FF]
    assert result.exits == 254


# --- the monitor's part ------------------------------------------------------------------------------------


def test_registers_and_rip_are_put_back_for_each_value(vmxlab) -> None:
    """L2 adds RBX to RAX and moves RIP on: each exit shows what the first one does."""
    sweep = replace(A_SWEEP, report_all=True, first=5, stride=3)
    program = "add rax, rbx; inc rcx; vmcall"
    run = vmxlab.run(sweep_case(sweep, program, registers={"rax": 1, "rbx": 2, "rsi": 9}))
    assert run.end is End.DONE
    assert [e.registers["rdx"] for e in run.exits] == list(range(5, 35, 3))
    assert {(e.reason, e.registers["rax"], e.registers["rcx"], e.registers["rsi"]) for e in run.exits} == {
        (ExitReason.VMCALL, 3, 1, 9)
    }
    assert len({e.rip for e in run.exits}) == 1


def test_the_digest_of_exceptions_holds_what_is_defined_for_them(vmxlab) -> None:
    """UD2 for each value: interruption information and error code are folded, the length is not."""
    run = vmxlab.run(sweep_case(replace(A_SWEEP, count=2), "ud2"))
    packed = b"".join(struct.pack("<QIQQII", n, 0, 0x8000, 0, 0x8000_0306, 0) for n in range(2))
    assert [digest.crc for digest in digests_of(run)] == [zlib.crc32(packed)]


@pytest.mark.vmx_needs(PinControls.ACTIVATE_PREEMPTION_TIMER)
def test_a_value_at_which_l2_hangs_ends_the_sweep_with_a_full_record(vmxlab) -> None:
    sweep = replace(A_SWEEP, count=10, block=3)
    program = "1: cmp edx, 7; je 1b; vmcall"
    run = vmxlab.run(sweep_case(sweep, program, limits=Limits(l2_tsc=200_000)))
    assert run.end is End.STOP
    assert [(digest.at, digest.exits) for digest in digests_of(run)] == [(0, 3), (3, 3), (6, 1)]
    (hung,) = run.exits
    assert hung.reason is ExitReason.PREEMPTION_TIMER
    assert hung.registers["rdx"] == 7


def test_a_failed_entry_ends_the_sweep_with_its_outcome(vmxlab) -> None:
    run = vmxlab.run(sweep_case(A_SWEEP, fields={Field.CR3_TARGET_COUNT: 0x1FF}))
    assert run.end is End.VMFAIL
    assert run.outcome("vmlaunch").error == 7
    late = vmxlab.run(sweep_case(A_SWEEP, fields={Field.GUEST_RFLAGS: 0}))
    assert late.end is End.STOP
    assert late.exits[0].entry_failed
    assert late.reasons == [ExitReason.ENTRY_FAILURE_GUEST_STATE]


def test_several_sweeps_of_a_case_resume_one_vmcs(vmxlab) -> None:
    steps = (*STANDARD[:-1], A_SWEEP, replace(A_SWEEP, count=3, resume=True, rip=0x8001))
    run = vmxlab.run(Case(program=b"\x90" + VMCALL, steps=steps))
    assert run.end is End.DONE
    assert [(r.number("n"), r.number("exits")) for r in run.records if r.kind == "sweep"] == [(0, 10), (1, 3)]


def test_a_case_after_a_sweep_has_its_own_host_state_restored(vmxlab) -> None:
    """The monitor leaves its own state alone during a sweep only."""
    vmxlab.run(sweep_case(A_SWEEP))
    run = vmxlab.run(Case(fields={Field.HOST_GDTR_BASE: 0, Field.HOST_IDTR_BASE: 0}))
    assert run.reasons == [ExitReason.HLT]


# --- around it ---------------------------------------------------------------------------------------------


def test_a_log_with_sweeps_is_read_again_as_the_runs_that_made_it(vmxlab) -> None:
    question = in_al(safe_io_bitmap(), first=0x4000, count=64, block=16)
    run = vmxlab.run(question.case())
    records, broken = parse_log(run.log_path.read_bytes())
    again = next(each for each in runs_from_records(records) if each.records == run.records)
    assert broken == []
    assert digests_of(again) == digests_of(run)
    assert again.end is End.DONE
