"""L2's code as a log has it: how it decodes, where it lies, and what of it is said."""

from __future__ import annotations

import pytest

from vmxlab import Case, Field, Mode
from vmxlab.cases.memory import PROGRAM, machine_address
from vmxlab.image import script
from vmxlab.image.code import RECORD_BYTES, LoadedCode
from vmxlab.image.compiler import compile_case

HLT = b"\xf4"


@pytest.fixture
def target(target_for):
    return target_for("skylake")


def records(case: Case, target) -> list[dict]:
    return list(compile_case(case, target).code.records(7))


@pytest.mark.parametrize(
    ("mode", "name", "bits"),
    [(Mode.LONG, "long", 64), (Mode.PROTECTED, "protected", 32), (Mode.REAL, "real", 16)],
)
def test_mode_is_that_of_the_code_segment(target, mode, name, bits):
    case = Case(program=HLT, mode=mode)
    assert records(case, target) == [{"id": 7, "mode": name, "at": 0x8000, "data": "f4"}]
    assert compile_case(case, target).code.mode.bits == bits


def test_code_segment_of_the_case_counts_and_not_its_mode(target):
    """A 64-bit guest with CS.L = 0 and CS.D = 1 is in compatibility mode (SDM Vol. 3A, 3.4.5)."""
    fields = {Field.GUEST_CS_ACCESS_RIGHTS: 0xC09B, Field.GUEST_CS_BASE: 0x1000}
    (record,) = records(Case(program=HLT, fields=fields), target)
    assert record == {"id": 7, "mode": "protected", "base": 0x1000, "at": 0x8000, "data": "f4"}


def test_base_of_cs_counts_for_nothing_in_64_bit_mode(target):
    (record,) = records(Case(program=HLT, fields={Field.GUEST_CS_BASE: 0x1000}), target)
    assert "base" not in record


def test_data_is_said_too_without_the_zeros_behind_it(target):
    case = Case(program=HLT, data={0x11000: bytes(4096), 0x10000: b"\xcc\x00\x90" + bytes(9)})
    assert [(r["at"], r["data"]) for r in records(case, target)] == [(0x8000, "f4"), (0x10000, "cc0090")]


def test_long_code_goes_on_in_another_record():
    code = LoadedCode.of(bytes(range(1, 256)) * 40, {}, {})
    found = list(code.records(0))
    assert [record["at"] for record in found] == [0x8000 + RECORD_BYTES * n for n in range(len(found))]
    assert bytes.fromhex("".join(record["data"] for record in found)) == code.chunks[0][1]


def test_only_an_image_for_booting_by_hand_has_the_monitor_say_it(target):
    case = Case(program=HLT)
    silent, said = (compile_case(case, target, report_code=how).units for how in (False, True))
    operation = script.code(64, 0, PROGRAM, machine_address(PROGRAM), 1)
    assert [unit for unit in said if unit not in silent] == [operation]
