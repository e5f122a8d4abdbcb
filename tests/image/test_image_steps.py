"""Steps and reactions as the operations of a script."""

from __future__ import annotations

import pytest

from vmxlab import (
    ExitReason,
    Field,
    on,
)
from vmxlab.cases import memory, steps
from vmxlab.cases.steps import (
    STANDARD,
    ApicRead,
    ApicWrite,
    Enter,
    Invept,
    Invvpid,
    Rdmsr,
    ReportMemory,
    SetCr0,
    SetCr4,
    Step,
    Store,
    Vmcall,
    Vmclear,
    Vmptrld,
    Vmptrst,
    Vmread,
    Vmwrite,
    Vmxoff,
    Vmxon,
    WriteVmcs,
    Wrmsr,
)
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.image import layout
from vmxlab.sdm.apic import ApicRegister

HLT = b"\xf4"
L2 = memory.L2_MEMORY


# --- steps and reactions ------------------------------------------------------------------------------------

STEPS = [
    (Vmxon(), "VMXON", {"region": layout.VMXON_REGION}, None),
    (Vmxon(0x123), "VMXON", {"region": 0x123}, None),
    (Vmclear(0), "VMCLEAR", {"region": 0}, None),
    (Vmclear(), "VMCLEAR", {"region": layout.VMCS_REGION}, None),
    (Vmptrld((1 << 64) - 1), "VMPTRLD", {"region": (1 << 64) - 1}, None),
    (Vmptrst(), "VMPTRST", {}, None),
    (Vmxoff(), "VMXOFF", {}, None),
    (Vmcall(), "VMCALL", {}, None),
    (Vmread(Field.GUEST_RIP), "VMREAD", {"field": 0x681E}, None),
    (Vmread(0xFFFF_FFFF), "VMREAD", {"field": 0xFFFF_FFFF}, None),
    (Vmwrite(Field.VPID, 1 << 63), "VMWRITES", {"count": 1}, [(0, 1 << 63)]),
    (Invept(2, 5), "INVEPT", {"type": 2, "low": 5, "high": 0}, None),
    (Invept(), "INVEPT", {"type": 1, "low": layout.EPT_TABLES | 0x1E, "high": 0}, None),
    (Invvpid(1, 2, 3), "INVVPID", {"type": 1, "low": 2, "high": 3}, None),
    (Rdmsr(0x3A), "RDMSR", {"msr": 0x3A}, None),
    (Wrmsr(0x10, 7), "WRMSR", {"msr": 0x10, "value": 7}, None),
    (ApicRead(0x20), "APIC_READ", {"register": 0x20}, None),
    (ApicWrite(0x300, 0xC4500), "APIC_WRITE", {"register": 0x300, "value": 0xC4500}, None),
    (SetCr0(0x33), "CR0", {"value": 0x33}, None),
    (SetCr4(0x2020), "CR4", {"value": 0x2020}, None),
    (Store(layout.FREE_PAGES, b"abc"), "DATA", {"address": layout.FREE_PAGES, "bytes": 3}, b"abc"),
    (ReportMemory(layout.FREE_PAGES, 9), "MEMORY", {"address": layout.FREE_PAGES, "bytes": 9}, None),
    (Enter(resume=True), "ENTER", {"resume": 1, "max_exits": 1000}, None),
]


NEVER_FAIL = (ApicRead, ApicWrite, Store, ReportMemory)


@pytest.mark.parametrize(("step", "name", "operands", "rest"), STEPS, ids=lambda v: str(v)[:30])
def test_a_step_becomes_its_operation(script_of, step, name, operands, rest):
    operation = script_of(steps=[step]).operations[-2]
    assert (operation.name, operation.operands, operation.rest) == (name, operands, rest)
    assert not operation.go_on


@pytest.mark.parametrize("step", [step for step, *_ in STEPS if not isinstance(step, NEVER_FAIL)])
def test_go_on_marks_the_operation(script_of, step):
    changed = type(step)(
        **{name: getattr(step, name) for name in step.__dataclass_fields__} | {"go_on": True}
    )
    assert script_of(steps=[changed]).operations[-2].go_on


def test_every_kind_of_step_is_tried_here():
    kinds = {kind for kind in vars(steps).values() if isinstance(kind, type) and issubclass(kind, Step)}
    assert {type(step) for step, *_ in STEPS} | {WriteVmcs, Step} == kinds
    assert {type(step) for step in STANDARD} == {Vmxon, Vmclear, Vmptrld, WriteVmcs, Enter}


def test_a_case_may_write_its_vmcs_twice(script_of):
    first, second = script_of(steps=[WriteVmcs(), WriteVmcs(go_on=True)]).all("VMWRITES")
    assert first.rest == second.rest
    assert (first.go_on, second.go_on) == (False, True)


def test_what_is_no_step_is_refused(refused):
    class Vmdance(Step):
        pass

    assert "Vmdance" in refused(CaseError, steps=[Vmdance()]).message


def test_a_reaction_becomes_its_actions(script_of):
    reaction = (
        on(ExitReason.IO_INSTRUCTION, qualification=(0xFFFF_0000, 0x60_0000), first=2, times=3)
        .set("rdi", 0x1234)
        .vmwrite(Field.GUEST_CR3, 0x3000)
        .write(layout.FREE_PAGES, b"page")
        .invept()
        .invept(2, 9)
        .apic_write(ApicRegister.EOI, 0)
        .skip()
        .resume()
        .stop()
    )
    operation = script_of(reactions=[reaction]).one("REACTION")
    assert {name: operation[name] for name in ("reason", "first", "times", "mask", "value")} == {
        "reason": 30,
        "first": 2,
        "times": 3,
        "mask": 0xFFFF_0000,
        "value": 0x60_0000,
    }
    assert [(action.name, dict(action.operands), action.rest) for action in operation.rest] == [
        ("SET_REGISTER", {"index": 7, "value": 0x1234}, None),
        ("SET_FIELD", {"field": 0x6802, "value": 0x3000}, None),
        ("SET_MEMORY", {"address": layout.FREE_PAGES, "bytes": 4}, b"page"),
        ("INVEPT", {"type": 1, "eptp": layout.EPT_TABLES | 0x1E}, None),
        ("INVEPT", {"type": 2, "eptp": 9}, None),
        ("APIC_WRITE", {"register": 0xB0, "value": 0}, None),
        ("SKIP", {}, None),
        ("RESUME", {}, None),
        ("STOP", {}, None),
    ]


def test_reactions_keep_their_order(script_of):
    reactions = [on(reason).skip() for reason in (ExitReason.CPUID, ExitReason.HLT, ExitReason.CPUID)]
    assert [op["reason"] for op in script_of(reactions=reactions).all("REACTION")] == [10, 12, 10]


@pytest.mark.parametrize(
    "case", [{"steps": [Invept()]}, {"reactions": [on(ExitReason.CPUID).invept()]}], ids=["step", "reaction"]
)
def test_invept_needs_an_eptp_that_is_there(refused, script_of, case):
    assert script_of(**case)
    error = refused(CaseError, "penryn", **case)
    assert "INVEPT" in error.message and "without EPT" in error.message


def test_a_reaction_has_room_for_64_kib_of_actions(compiled, refused):
    room = 0xFFFF - 13
    assert compiled(reactions=[on(ExitReason.CPUID).write(layout.FREE_PAGES, bytes(room))])
    too_much = on(ExitReason.CPUID).write(layout.FREE_PAGES, bytes(room + 1))
    error = refused(OutOfRange, reactions=[too_much])
    assert error.value == 0x1_0000
