"""Sweeps as the monitor gets them."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Field, IOBitmap, MsrBitmap
from vmxlab.cases.steps import STANDARD
from vmxlab.cases.sweep import DEADLY, Instruction, Question, Sweep, Swept, Walk
from vmxlab.errors import CaseError
from vmxlab.image.layout import IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP

HEAD = "<BBBBQQQQQQIIQIIBBBB"


def sweep_operands(compiled, sweep: Sweep, **case) -> tuple[tuple[int, ...], bytes]:
    """The fixed operands of the one sweep in a script, and the bytes behind them."""
    units = compiled(steps=(*STANDARD[:-1], sweep), **case).units
    (unit,) = [unit for unit in units if unit[0] == 54]
    return struct.unpack_from(HEAD, unit), unit[struct.calcsize(HEAD) :]


def test_the_operands_stand_in_the_order_in_which_the_monitor_takes_them(compiled) -> None:
    sweep = Sweep(
        register="r9",
        first=0x11,
        count=0x22,
        stride=0x33,
        mask=0x44,
        rip=0x8002,
        block=0x55,
        offsets=(-1, 5),
        walk=Walk(Swept.MSR, 0x66, True, 0x77),
        fields=(Field.EXIT_QUALIFICATION,),
        exception_fields=(Field.GUEST_RSP, Field.GUEST_CR3),
        report_all=True,
        resume=True,
    )
    fixed, rest = sweep_operands(compiled, sweep, msr_bitmap=MsrBitmap())
    go_on = [not fixed[4 + n // 64] >> n % 64 & 1 for n in range(128)]
    assert {n for n in range(128) if go_on[n]} == {int(reason) for reason in DEADLY}
    assert fixed[:4] == (54, 1, 1, 9)
    assert fixed[6:] == (0x8002, 0x11, 0x33, 0x44, 0x22, 0x55, MSR_BITMAP, 0x66, 0x77, 1, 2, 1, 2)
    fields = (Field.EXIT_QUALIFICATION, Field.GUEST_RSP, Field.GUEST_CR3)
    assert rest == struct.pack("<2Q3I", (1 << 64) - 1, 5, *fields)


def test_both_io_bitmaps_are_one_to_a_walk(compiled) -> None:
    assert IO_BITMAP_B == IO_BITMAP_A + 0x1000
    sweep = Sweep(register="rdx", first=0, count=1, walk=Walk(Swept.IO, 0, False))
    fixed, _ = sweep_operands(compiled, sweep, io_bitmap=IOBitmap.intercept_all())
    assert fixed[12] == IO_BITMAP_A


def test_without_a_walk_there_is_no_bitmap_to_change(compiled) -> None:
    fixed, _ = sweep_operands(compiled, Sweep(register="rdx", first=0, count=1))
    assert fixed[12:16] == (0, 0, 0, 0)


def test_a_case_with_a_sweep_keeps_the_monitors_host_state(compiled) -> None:
    with pytest.raises(CaseError, match="HOST_RSP"):
        sweep_operands(compiled, Sweep(register="rdx", first=0, count=1), fields={Field.HOST_RSP: 0x1234})


def test_a_question_compiles_to_its_bitmaps_and_its_handler(compiled) -> None:
    question = Question(
        name="q", instruction=Instruction.WRMSR, first=0, count=4, msr_bitmap=MsrBitmap.intercept_all()
    )
    case = question.case()
    made = compiled(
        program=case.program, steps=case.steps, fields=case.fields, data=case.data, msr_bitmap=case.msr_bitmap
    )
    assert made.fields[Field.MSR_BITMAP] == MSR_BITMAP
    assert not made.fields[Field.EXCEPTION_BITMAP] >> 13 & 1
    assert made.fields[Field.GUEST_IDTR_LIMIT] == 14 * 16 - 1
