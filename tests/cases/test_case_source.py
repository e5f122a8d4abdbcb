"""A case as Python text: running the text makes an equal case."""

from __future__ import annotations

import random

import pytest

from vmxlab import (
    Case,
    ControlSet,
    Ept,
    EPTPointer,
    ExitReason,
    Field,
    IOBitmap,
    Limits,
    Mode,
    MsrBitmap,
    PrimaryControls,
    SecondaryControls,
    VmxRegion,
    guest_ept,
    on,
)
from vmxlab.cases import steps
from vmxlab.cases.source import Asserted, case_source
from vmxlab.structures import MsrArea, VirtualApicPage


class Recorder:
    """Stands for the fixture: keeps the case."""

    def run(self, case: Case) -> Recorder:
        self.case = case
        return self

    def check(self) -> tuple[()]:
        return ()


def rebuilt(case: Case) -> Case:
    text = case_source(case)
    namespace: dict[str, object] = {}
    exec(compile(text, "<case>", "exec"), namespace)
    recorder = Recorder()
    namespace["test_case"](recorder)  # type: ignore[operator]
    return recorder.case


def io_ranges() -> IOBitmap:
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept_of_range(0x60, 5, True)
    return bitmap


def random_bitmap() -> IOBitmap:
    return IOBitmap.from_bytes(random.Random(1).randbytes(8192))


def msr_ranges() -> MsrBitmap:
    bitmap = MsrBitmap.passthrough_all()
    bitmap.set_read_intercept(0xC000_0080, True)
    bitmap.set_write_intercept_of_range(0x10, 3, True)
    return bitmap


def changed_ept() -> Ept:
    ept = guest_ept()
    ept.unmap(0x3000, 0x1000)
    ept.map(0x20_0000, 0x140_0000, 1 << 21, write=False)
    ept.set_table_entry(0, 2, 0x1)
    return ept


CASES = {
    "empty": Case(),
    "program": Case(program="in al, 0x60; hlt", name="in"),
    "code": Case(program=b"\x0f\xa2\xf4", mode=Mode.REAL),
    "registers": Case(registers={"rax": 5, "r15": 1 << 63}, data={0x10000: b"abc"}),
    "fields": Case(fields={Field.GUEST_RIP: 0x8001, "TSC_OFFSET": 1 << 40}, watch=[Field.GUEST_CR0]),
    "controls": Case(
        enable=[PrimaryControls.RDTSC_EXITING, SecondaryControls.ENABLE_VPID],
        raw_controls={ControlSet.PIN: 0x16},
    ),
    "io-ranges": Case(io_bitmap=io_ranges()),
    "io-all": Case(io_bitmap=IOBitmap.intercept_all()),
    "io-random": Case(io_bitmap=random_bitmap()),
    "msr": Case(msr_bitmap=msr_ranges()),
    "ept": Case(ept=changed_ept(), eptp=EPTPointer(address=0x101_0000, accessed_dirty=True)),
    "ept-of-its-own": Case(ept=Ept()),
    "reactions": Case(
        reactions=[
            on(ExitReason.CPUID, first=1, times=2).set("rax", 0x16).skip(),
            on(ExitReason.IO_INSTRUCTION, qualification=(0xFFFF_0000, 0x60_0000)).stop(),
            on(200).vmwrite(Field.GUEST_RIP, 3).write(0x150_0000, b"\1\2").invept().resume(),
        ]
    ),
    "steps": Case(steps=[steps.Vmxon(), steps.Vmread(Field.GUEST_RIP, go_on=True), steps.Vmxon(region=3)]),
    "regions": Case(vmxon_region=VmxRegion(revision_id=3), shadow_vmcs=True, vmread_bitmap=bytes(4096)),
    "areas": Case(entry_msr_load=MsrArea([(0x10, 5), (0x174, 1 << 40)]), virtual_apic_page=VirtualApicPage()),
    "limits": Case(limits=Limits(exits=3, seconds=1.5), expect=[ExitReason.HLT]),
}

VALUES = [
    (1, 2),
    (3,),
    (),
    [True, None, "a, )", b"\0" * 100],
    {ExitReason.HLT: (0x20, [1])},
    {3, 1, 2},
    frozenset({"b", "a"}),
    set(),
    range(2, 9, 3),
    PrimaryControls.HLT_EXITING | PrimaryControls.RDTSC_EXITING,
    -5,
    IOBitmap,
    random.Random,
    case_source,
]
"""What the names in an assertion may stand for."""


class Own:
    """A class of a test's own."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_text_of_a_case_makes_an_equal_one(case):
    assert rebuilt(case) == case


def test_text_says_only_what_differs_from_the_baseline():
    assert case_source(Case(program="cpuid; hlt"), name="test_cpuid") == (
        "from vmxlab import Case\n"
        "\n"
        "\n"
        "def test_cpuid(vmxlab):\n"
        "    run = vmxlab.run(Case(program='cpuid; hlt'))\n"
        "    assert not run.check()\n"
    )


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_names_of_an_assertion_stand_for_equal_values_of_the_same_type(value):
    name = value.__name__ if hasattr(value, "__name__") else "value"
    text = case_source(Case(), asserted=Asserted(f"return {name}", {name: value}))
    namespace: dict[str, object] = {}
    exec(compile(text, "<case>", "exec"), namespace)
    found = namespace["test_case"](Recorder())  # type: ignore[operator]
    assert type(found) is type(value)
    assert found == value


@pytest.mark.parametrize(
    "value", [Own, Own(), object(), [Own()], 1.5, lambda: 0, random], ids=lambda value: type(value).__name__
)
def test_name_that_means_nothing_elsewhere_is_refused(value):
    with pytest.raises(TypeError):
        case_source(Case(), asserted=Asserted("assert mine", {"mine": value}))


def test_parts_of_the_run_are_bound_after_it():
    text = case_source(Case(), asserted=Asserted("assert first.rip", expressions={"first": "run.exits[0]"}))
    assert text.endswith("    run = vmxlab.run(Case())\n    first = run.exits[0]\n    assert first.rip\n")
