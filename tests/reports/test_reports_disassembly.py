"""The instruction at RIP, from what a case put into L2's memory."""

from __future__ import annotations

import pytest

from vmxlab.cases.case import Case
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.program import Mode
from vmxlab.reports.disassembly import Code
from vmxlab.sdm.fields import Field


@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [
        (Mode.LONG, "e4 60", "in al, 0x60"),
        (Mode.LONG, "66 ef", "out dx, ax"),
        (Mode.LONG, "0f 01 c1", "vmcall"),
        (Mode.LONG, "48 89 04 25 00 00 10 00", "mov [0x100000], rax"),
        (Mode.LONG, "48 8b 05 05 00 00 00", "mov rax, [rip+5]"),
        (Mode.LONG, "eb fe", "jmp 0x8000"),
        (Mode.PROTECTED, "8b 03", "mov eax, [ebx]"),
        (Mode.REAL, "8b 00", "mov ax, [bx+si]"),
    ],
)
def test_the_mode_of_the_case_decides_what_bytes_mean(mode: Mode, code: str, text: str) -> None:
    assert Code.of(Case(mode=mode), bytes.fromhex(code)).at(PROGRAM) == text


def test_any_offset_of_the_program_can_be_shown() -> None:
    code = Code.of(Case(), bytes.fromhex("e460 f4"))
    assert [code.at(PROGRAM), code.at(PROGRAM + 2)] == ["in al, 0x60", "hlt"]


@pytest.mark.parametrize("rip", [0, PROGRAM - 1, PROGRAM + 3, 1 << 63])
def test_where_the_case_put_nothing_nothing_is_shown(rip: int) -> None:
    assert Code.of(Case(), bytes.fromhex("e460f4")).at(rip) is None


def test_code_in_the_data_of_a_case_is_found() -> None:
    assert Code.of(Case(data={0x10000: b"\x0f\xa2"}), b"\xf4").at(0x10000) == "cpuid"


def test_bytes_that_are_no_instruction_are_marked() -> None:
    assert Code.of(Case(), b"\x06").at(PROGRAM) == "(bad) 0x06"
    assert Code.of(Case(), b"\x0f").at(PROGRAM) == "(bad) 0x0f"


def test_in_real_mode_the_base_of_cs_is_added() -> None:
    case = Case(mode=Mode.REAL, fields={Field.GUEST_CS_BASE: 0x4000})
    assert Code.of(case, b"\xf4").at(PROGRAM - 0x4000) == "hlt"


def test_in_64_bit_mode_the_base_of_cs_counts_for_nothing() -> None:
    case = Case(fields={Field.GUEST_CS_BASE: 0x4000})
    assert Code.of(case, b"\xf4").at(PROGRAM) == "hlt"
