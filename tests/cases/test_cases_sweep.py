"""Sweeps as cases say them: the step, the question, and the questions of the command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmxlab import Field, IOBitmap, MsrBitmap, PrimaryControls
from vmxlab.cases.sweep import CHEAPER_EXITS, VMCALL, Instruction, Question, Sweep, Swept, Walk
from vmxlab.cases.sweep_questions import (
    HARMFUL_READS,
    HARMLESS_MSR_WRITES,
    HARMLESS_WRITES,
    io_questions,
    msr_questions,
)
from vmxlab.errors import CaseError, OutOfRange

IN_AL = Question(
    name="q", instruction=Instruction.IN_AL, first=0, count=0x10000, io_bitmap=IOBitmap.passthrough_all()
)


@pytest.mark.parametrize("register", ["rsp", "rip", "edx"])
def test_a_sweep_runs_over_a_general_register_but_rsp(register: str) -> None:
    with pytest.raises(CaseError, match=register):
        Sweep(register=register, first=0, count=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"block": 0},
        {"first": -1},
        {"first": 1 << 64},
        {"stride": -1},
        {"rip": 1 << 64},
        {"offsets": ()},
        {"offsets": (0,) * 17},
        {"fields": (Field.EXIT_QUALIFICATION,) * 9},
    ],
    ids=str,
)
def test_what_the_monitor_could_not_do_is_refused(wrong: dict) -> None:
    with pytest.raises(OutOfRange):
        Sweep(**{"register": "rdx", "first": 0, "count": 1, **wrong})


def test_the_values_of_a_sweep_stand_in_the_order_of_asking() -> None:
    plain = Sweep(register="rdx", first=3, count=3, stride=5)
    assert plain.values() == [3, 8, 13]
    neighbours = replace(plain, first=0, count=2, stride=1, offsets=(-1, 0, 1), mask=0xFFFF)
    assert neighbours.values() == [0xFFFF, 0, 1, 0, 1, 2]
    assert neighbours.exits == 6
    assert replace(plain, stride=0).values() == [3, 3, 3]


def test_a_walk_is_over_bits_of_a_bitmap() -> None:
    low = Question(
        name="q", instruction=Instruction.RDMSR, first=5, count=2, msr_bitmap=MsrBitmap(), walk=True
    )
    assert low.sweep().walk == Walk(Swept.MSR, 5, True)
    high = replace(low, first=0xC000_0005, instruction=Instruction.WRMSR)
    assert high.sweep().walk == Walk(Swept.MSR, 0x6005, True)
    assert replace(IN_AL, walk=False, first=7, count=9, stride=3).sweep().walk == Walk(Swept.IO, 7, False, 3)
    with pytest.raises(OutOfRange):
        Walk(Swept.IO, 1 << 32, True)


def test_a_question_takes_what_makes_exits_cheaper_as_far_as_the_processor_has_it(processors) -> None:
    asked = replace(IN_AL, enable=(PrimaryControls.RDTSC_EXITING,))
    suited = asked.suited_to(processors["skylake"])
    assert suited == replace(asked, enable=(PrimaryControls.RDTSC_EXITING, *CHEAPER_EXITS))
    assert suited.suited_to(processors["skylake"]) == suited
    assert IN_AL.suited_to(processors["lynnfield"]) == IN_AL


@pytest.mark.parametrize("first", [0x1FFF, 0x2000, 0xBFFF_FFFF, 0xC000_1FFF])
def test_a_walk_over_msrs_without_a_bit_is_refused(first: int) -> None:
    with pytest.raises(CaseError, match="bit"):
        Question(
            name="q", instruction=Instruction.RDMSR, first=first, count=2, msr_bitmap=MsrBitmap(), walk=True
        )


def test_a_walk_over_a_bitmap_that_is_not_used_is_refused() -> None:
    with pytest.raises(CaseError, match="does not use"):
        replace(IN_AL, io_bitmap=None, msr_bitmap=MsrBitmap(), walk=True)


def test_values_wider_than_the_operand_are_refused() -> None:
    with pytest.raises(OutOfRange):
        replace(IN_AL, first=1)
    with pytest.raises(OutOfRange):
        replace(IN_AL, count=0)
    with pytest.raises(CaseError, match="upper bits"):
        replace(IN_AL, high=0x8000)


def test_a_part_of_a_question_asks_its_values() -> None:
    question = replace(IN_AL, first=10, count=20, stride=7, walk=True)
    part = question.part(3, 4, block=2)
    assert part.sweep().values() == question.sweep().values()[3:7]
    assert part.sweep().walk == Walk(Swept.IO, 31, True, 7)
    assert part.block == 2
    assert question.part(0, 20).block == question.block


@pytest.mark.parametrize("instruction", Instruction, ids=lambda instruction: instruction.name)
def test_vmcall_stands_behind_the_instruction(instruction: Instruction) -> None:
    program = replace(IN_AL, instruction=instruction, io_bitmap=None).program()
    assert program.startswith(instruction.code + VMCALL)
    if not instruction.is_io:  # what #GP comes to ends with a jump back to the VMCALL
        back = int.from_bytes(program[-1:], "little", signed=True)
        assert program[-2] == 0xEB
        assert len(program) + back == len(instruction.code)


# --- the questions of the command line ----------------------------------------------------------------------


def really_made(question: Question) -> set[int]:
    """The ports or MSRs that some access of a question may reach: those it does not surely intercept."""
    reached = set()
    bitmap = question.io_bitmap if question.instruction.is_io else question.msr_bitmap
    if bitmap is None:
        return reached
    walked = iter(range(question.first, question.first + question.count * question.stride, question.stride))
    values = [value & question.operand_mask for value in question.sweep().values()]
    per_value = len(question.offsets)
    for index, operand in enumerate(values):
        if index % per_value == 0:
            changed = next(walked)
        size = max(1, question.instruction.size)
        for one in range(operand, operand + size):
            if question.instruction.is_io:
                is_set = one > 0xFFFF or bitmap.intercepts(one)
            else:
                is_set = bitmap.intercepts(one, write=question.is_write)
            if question.walk is not None and one == changed:
                is_set = question.walk
            if is_set:
                break
        else:
            reached |= set(range(operand, operand + size))
    return reached


@pytest.mark.parametrize("question", io_questions(1, quick=True), ids=lambda question: question.name)
def test_no_access_that_is_let_through_does_harm_at_a_port(question: Question) -> None:
    reached = really_made(question)
    if question.instruction.is_in:
        assert not any(port in left_out.ports for left_out in HARMFUL_READS for port in reached)
    else:
        assert reached <= set(HARMLESS_WRITES)


@pytest.mark.parametrize("question", msr_questions(1, quick=True), ids=lambda question: question.name)
def test_no_write_that_is_let_through_does_harm_to_an_msr(question: Question) -> None:
    if question.is_write:
        assert really_made(question) <= set(HARMLESS_MSR_WRITES)


def test_all_of_it_is_more_than_half_a_million_exits() -> None:
    questions = [*io_questions(), *msr_questions()]
    assert sum(question.exits for question in questions) >= 500_000
    assert len({question.name for question in questions}) == len(questions)


@pytest.mark.parametrize(
    "instruction",
    [each for each in Instruction if each.is_io],
    ids=lambda instruction: instruction.name,
)
def test_all_ports_are_asked_with_each_instruction(instruction: Instruction) -> None:
    asked = [question for question in io_questions() if question.instruction is instruction]
    whole = [question for question in asked if (question.first, question.count) == (0, 0x10000)]
    assert any(question.io_bitmap == IOBitmap.intercept_all() for question in whole)
    if instruction.is_in:
        let_through = [q for q in whole if q.io_bitmap is not None and not q.io_bitmap.intercepts(0)]
        assert any(question.walk is None for question in let_through)


def test_another_seed_gives_another_bitmap_and_the_same_seed_the_same() -> None:
    def random_bitmaps(seed: int) -> list[bytes]:
        return [q.io_bitmap.to_bytes() for q in io_questions(seed) if "random" in q.name]

    assert random_bitmaps(1) == random_bitmaps(1)
    assert random_bitmaps(1) != random_bitmaps(2)
