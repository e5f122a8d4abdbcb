"""The oracle of sweeps: rules for one access, and for whole bitmaps at once (SDM Vol. 3C, 26.1.3)."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace

import pytest

from vmxlab import IOBitmap, MsrBitmap, PrimaryControls
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.sweep import Instruction, Question
from vmxlab.cases.sweep_questions import KINDS
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.oracle.io import io_exits, io_qualification
from vmxlab.oracle.msr import msr_exits
from vmxlab.oracle.sweep import Digest, predict_exits, predict_sweep
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.qualifications import decode_qualification

BITMAPS = int(PrimaryControls.USE_IO_BITMAPS | PrimaryControls.USE_MSR_BITMAPS)
UNCONDITIONAL = int(PrimaryControls.UNCONDITIONAL_IO_EXITING)


def one_port(port: int) -> IOBitmap:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(port, True)
    return bitmap


# --- one access --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "size", "exits"),
    [
        (0x60, 1, True),
        (0x5F, 1, False),
        (0x61, 1, False),
        (0x5F, 2, True),
        (0x5E, 2, False),
        (0x5D, 4, True),
        (0x5C, 4, False),
    ],
)
def test_an_access_exits_if_it_covers_a_port_whose_bit_is_set(port: int, size: int, exits: bool) -> None:
    assert io_exits(BITMAPS, one_port(0x60), port, size) is exits


@pytest.mark.parametrize(
    ("port", "size", "exits"), [(0xFFFF, 1, False), (0xFFFF, 2, True), (0xFFFD, 4, True)]
)
def test_an_access_past_the_last_port_exits_whatever_the_bits(port: int, size: int, exits: bool) -> None:
    assert io_exits(BITMAPS, IOBitmap.passthrough_all(), port, size) is exits


def test_without_bitmaps_the_other_control_decides_and_with_them_it_is_ignored() -> None:
    assert io_exits(UNCONDITIONAL, None, 0x60, 1)
    assert not io_exits(0, None, 0x60, 1)
    assert not io_exits(UNCONDITIONAL | BITMAPS, IOBitmap.passthrough_all(), 0x60, 1)


def test_the_qualification_decodes_to_what_it_was_made_of() -> None:
    raw = io_qualification(0x1234, 2, is_in=True, string=True, rep=True)
    decoded = decode_qualification(ExitReason.IO_INSTRUCTION, raw)
    assert (decoded.port, decoded.size, decoded.is_in) == (0x1234, 2, True)
    assert (decoded.string, decoded.rep, decoded.immediate_operand) == (True, True, False)
    assert io_qualification(0x60, 4, is_in=False, immediate=True) == 0x60_0043


@pytest.mark.parametrize("write", [False, True], ids=["RDMSR", "WRMSR"])
@pytest.mark.parametrize("msr", [0, 0x1FFF, 0xC000_0000, 0xC000_1FFF])
def test_the_bit_of_an_msr_and_of_the_direction_decides(msr: int, write: bool) -> None:
    bitmap = MsrBitmap.passthrough_all()
    (bitmap.set_write_intercept if write else bitmap.set_read_intercept)(msr, True)
    assert msr_exits(BITMAPS, bitmap, msr, write)
    assert not msr_exits(BITMAPS, bitmap, msr, not write)
    assert not msr_exits(BITMAPS, MsrBitmap.passthrough_all(), msr, write)


@pytest.mark.parametrize("msr", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF])
def test_an_msr_outside_both_ranges_exits_whatever_the_bits(msr: int) -> None:
    assert msr_exits(BITMAPS, MsrBitmap.passthrough_all(), msr, False)


def test_without_msr_bitmaps_every_access_exits() -> None:
    assert msr_exits(0, None, 0x10, False)


def test_a_bitmap_that_is_used_has_to_be_given() -> None:
    with pytest.raises(CaseError, match="no I/O bitmap"):
        io_exits(BITMAPS, None, 0x60, 1)
    with pytest.raises(CaseError, match="no MSR bitmap"):
        msr_exits(BITMAPS, None, 0x10, False)


@pytest.mark.parametrize(("port", "size"), [(0x1_0000, 1), (-1, 1), (0x60, 3), (0x60, 8)])
def test_what_no_instruction_accesses_is_refused(port: int, size: int) -> None:
    with pytest.raises(OutOfRange):
        io_exits(UNCONDITIONAL, None, port, size)
    with pytest.raises(OutOfRange):
        io_qualification(port, size, is_in=True)


# --- whole sweeps ------------------------------------------------------------------------------------------


def exits_by_the_rules(question: Question, value: int, walked: int) -> bool:
    """One access of a question by the rules for one, with the bitmap as it is at that moment."""
    operand = value & question.operand_mask
    io_bitmap = question.io_bitmap and question.io_bitmap.copy()
    msr_bitmap = question.msr_bitmap and question.msr_bitmap.copy()
    write = question.instruction is Instruction.WRMSR
    if question.walk is not None:
        if io_bitmap:
            io_bitmap.set_intercept(walked, question.walk)
        elif msr_bitmap and write:
            msr_bitmap.set_write_intercept(walked, question.walk)
        elif msr_bitmap:
            msr_bitmap.set_read_intercept(walked, question.walk)
    if question.instruction.is_io:
        primary = int(PrimaryControls.USE_IO_BITMAPS) if io_bitmap is not None else UNCONDITIONAL
        return io_exits(primary, io_bitmap, operand, question.instruction.size)
    primary = int(PrimaryControls.USE_MSR_BITMAPS) if msr_bitmap is not None else 0
    return msr_exits(primary, msr_bitmap, operand, write)


@pytest.mark.parametrize(
    "question",
    [question for make in KINDS.values() for question in make(3, quick=True)],
    ids=lambda question: question.name,
)
def test_what_is_said_of_a_whole_bitmap_is_what_the_rules_say_of_each_access(question, processors) -> None:
    capabilities = processors["skylake"]
    exits = list(predict_exits(question, capabilities))
    assert len(exits) == question.exits
    chosen = {0, 1, 2, len(exits) - 1, *random.Random(1).sample(range(len(exits)), min(len(exits), 60))}
    chosen &= set(range(len(exits)))
    for index in sorted(chosen):
        exit_ = exits[index]
        walked = question.first + index // len(question.offsets) * question.stride
        expected = walked + question.offsets[index % len(question.offsets)] & question.operand_mask
        assert exit_.value == expected | question.high
        is_hit = exits_by_the_rules(question, exit_.value, walked)
        assert (exit_.full_reason != ExitReason.VMCALL) is is_hit
        length = len(question.instruction.code)
        assert exit_.rip == PROGRAM + (0 if is_hit else length)
        assert exit_.instruction_length == (length if is_hit else 3)
        if is_hit and question.instruction.is_io:
            decoded = decode_qualification(ExitReason.IO_INSTRUCTION, exit_.qualification)
            assert decoded.port == expected
            assert (decoded.size, decoded.is_in) == (question.instruction.size, question.instruction.is_in)
        else:
            assert exit_.qualification == 0


def test_a_digest_is_the_crc_of_the_exits_of_its_block(processors) -> None:
    capabilities = processors["skylake"]
    question = Question(
        name="blocks", instruction=Instruction.IN_AX, first=0x5E, count=5, block=2, io_bitmap=one_port(0x60)
    )
    exits = list(predict_exits(question, capabilities))
    assert [exit_.full_reason for exit_ in exits] == [18, 30, 30, 18, 18]
    packed = [
        struct.pack("<QIQQI", e.value, e.full_reason, e.rip, e.qualification, e.instruction_length)
        for e in exits
    ]
    assert predict_sweep(question, capabilities) == [
        Digest(0, 2, zlib.crc32(b"".join(packed[0:2]))),
        Digest(2, 2, zlib.crc32(b"".join(packed[2:4]))),
        Digest(4, 1, zlib.crc32(packed[4])),
    ]


def test_one_bit_changes_one_digest(processors) -> None:
    capabilities = processors["skylake"]
    question = Question(
        name="x", instruction=Instruction.IN_AL, first=0, count=0x10000, io_bitmap=IOBitmap.passthrough_all()
    )
    changed = replace(question, io_bitmap=one_port(0x7ABC))
    pairs = zip(predict_sweep(question, capabilities), predict_sweep(changed, capabilities), strict=True)
    assert [one.at for one, other in pairs if one != other] == [0x7000]
