"""What a user writes wrong: a typed error that shows where, before anything runs, and the other cases run."""

import random

import pytest

from vmxlab import Case, IOBitmap
from vmxlab.console.run import Verdict
from vmxlab.errors import (
    CaseError,
    ImageError,
    MissingCapability,
    OutOfRange,
    OverlappingPages,
    ProgramError,
    UnknownField,
)
from vmxlab.image import layout
from vmxlab.sdm.controls import TertiaryControls
from vmxlab.sdm.fields import Field

from .conftest import assert_good, caught, good

NO_PROGRAM = Case(name="no-program", program="mov eax, 1\nmovv ebx, 2\nhlt")
OVERLAPS = Case(name="overlaps", memory={0x2000000: bytes(4096), 0x2000FFF: b"x"})
OVERLAPS_STRUCTURE = Case(
    name="overlaps-structure", io_bitmap=IOBitmap.passthrough_all(), memory={layout.IO_BITMAP_A + 8: b"x"}
)
OVERLAPS_PROGRAM = Case(name="overlaps-program", data={0x8000: b"x"})
OUTSIDE = Case(name="outside", memory={0x1000: b"x"})
NOT_HERE = Case(name="not-here", enable=TertiaryControls.ENABLE_HLAT)
TOO_LONG = Case(name="too-long", memory={0x2000000: random.Random(1).randbytes(600 << 10)})

BAD = [
    pytest.param(NO_PROGRAM, ProgramError, ("line 2", "movv"), id="does-not-assemble"),
    pytest.param(OVERLAPS, OverlappingPages, ("0x2000fff", "0x2000000"), id="overlapping-pages"),
    pytest.param(OVERLAPS_STRUCTURE, OverlappingPages, ("I/O bitmap A",), id="overlaps-a-structure"),
    pytest.param(OVERLAPS_PROGRAM, OverlappingPages, ("the guest program",), id="overlaps-the-program"),
    pytest.param(OUTSIDE, OutOfRange, ("0x1000",), id="outside-of-what-a-case-owns"),
    pytest.param(NOT_HERE, MissingCapability, ("ENABLE_HLAT", "PROCBASED_CTLS"), id="not-here"),
    pytest.param(TOO_LONG, ImageError, ("script",), id="too-long-for-the-monitor"),
]


@pytest.mark.parametrize(("case", "kind", "words"), BAD)
def test_bad_case_is_a_typed_error_that_shows_where_and_the_next_case_runs(lasting_lab, case, kind, words):
    error = caught(lasting_lab, case)
    assert type(error) is kind
    for word in (*words, f"case: {case.name}"):
        assert word in str(error)
    assert_good(lasting_lab.run(good(1)), 1)


@pytest.mark.parametrize(("case", "kind", "words"), BAD)
@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_bad_case_among_others_has_its_own_verdict_and_the_others_run(lasting_lab, way, case, kind, words):
    runs = getattr(lasting_lab, way)([good(0), case, good(2)])
    verdict = Verdict.SKIP if kind is MissingCapability else Verdict.ERROR
    assert [run.verdict for run in runs] == [Verdict.PASS, verdict, Verdict.PASS]
    assert_good(runs[0])
    assert_good(runs[2], 2)
    assert type(runs[1].error) is kind
    assert runs[1].name == case.name
    for word in (*words, f"case: {case.name}"):
        assert word in str(runs[1].error)


@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_list_of_bad_cases_boots_no_image_of_them(lasting_lab, way):
    lasting_lab.session()
    before = len(lasting_lab.machines)
    runs = getattr(lasting_lab, way)([NO_PROGRAM, OVERLAPS])
    assert [type(run.error) for run in runs] == [ProgramError, OverlappingPages]
    assert len(lasting_lab.machines) == before


@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_empty_list_of_cases_is_an_empty_list_of_runs(lasting_lab, way):
    assert getattr(lasting_lab, way)([]) == []


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        pytest.param(
            lambda: Case(fields={"GUEST_RIPP": 0}), UnknownField, ("GUEST_RIPP", "GUEST_RIP"), id="field-name"
        ),
        pytest.param(lambda: Case(fields={0x7FFE: 0}), UnknownField, ("0x7ffe",), id="field-encoding"),
        pytest.param(lambda: Case(watch=["no such"]), UnknownField, ("no such",), id="watched-field"),
        pytest.param(
            lambda: Case(fields={Field.VPID: 0x10000}), OutOfRange, ("VPID", "0x10000", "16"), id="too-wide"
        ),
        pytest.param(lambda: Case(fields={Field.GUEST_RIP: -1}), OutOfRange, ("GUEST_RIP",), id="negative"),
        pytest.param(lambda: Case(registers={"r16": 0}), CaseError, ("r16",), id="register"),
        pytest.param(lambda: Case(eptp=1 << 64), OutOfRange, ("EPTP",), id="eptp"),
        pytest.param(lambda: Case(data={0x20000: b"x"}), OutOfRange, ("0x20000",), id="data"),
        pytest.param(lambda: Case(name="a b"), CaseError, ("'a b'",), id="name"),
    ],
)
def test_what_no_processor_has_is_refused_when_the_case_is_made(make, kind, words):
    with pytest.raises(kind) as info:
        make()
    for word in words:
        assert word in str(info.value)
    assert info.value.message
