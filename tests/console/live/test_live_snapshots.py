"""Snapshots of VMCS and registers, and the difference of two."""

from __future__ import annotations

import pytest

from vmxlab import ExitReason, Field, PrimaryControls, Snapshot, diff
from vmxlab.console.live.snapshot import Change, SnapshotReader
from vmxlab.console.records import Record
from vmxlab.errors import CaseError
from vmxlab.image import script
from vmxlab.image.protocol import Op

RFLAGS = Field.GUEST_RFLAGS


def snapshot(registers=(), **fields) -> Snapshot:
    return Snapshot({Field[name]: value for name, value in fields.items()}, dict(registers))


def test_a_snapshot_has_every_field_that_the_processor_has(vm):
    fields = [field for field in Field if field is not Field.VM_INSTRUCTION_ERROR]  # missing ones set it
    taken = vm.snapshot()
    run = vm.link.send([script.with_u32(Op.VMREAD, field, go_on=True) for field in fields])
    assert {outcome.field for outcome in run.outcomes} == set(fields)
    assert taken.fields == {o.field: o.value for o in run.outcomes if o.ok} | {Field.VM_INSTRUCTION_ERROR: 0}
    assert taken["GUEST_RIP"] == taken[int(Field.GUEST_RIP)] == vm.rip


def test_a_snapshot_is_a_value(vm):
    vm.registers["r9"] = 0x99
    first = vm.snapshot()
    assert vm.snapshot() == first
    assert first.registers["r9"] == 0x99
    vm.enter("mov rax, 5")
    second = vm.snapshot()
    assert first.registers["rax"] == 0
    assert second.registers["rax"] == 5
    assert diff(first, second).of("rax") == Change("rax", 0, 5)
    assert first.diff(second).of(Field.GUEST_RIP) == Change(Field.GUEST_RIP, 0x8000, 0x8007)
    assert diff(second, second) == ()
    with pytest.raises(TypeError):
        second.fields[Field.GUEST_RIP] = 0


def test_changes_are_those_since_the_last_entry(vm):
    assert vm.changes == ()
    vm.vmwrite(RFLAGS, 0x202)
    assert str(vm.changes) == "GUEST_RFLAGS 0x2 -> 0x202: +IF"
    vm.enter("cpuid")
    assert vm.changes.of(RFLAGS) is None, "that was before the entry"
    assert "EXIT_REASON 0x0 -> 0xa: CPUID" in str(vm.changes).splitlines()
    vm.skip()
    assert vm.changes.of(Field.GUEST_RIP) == Change(Field.GUEST_RIP, 0x8000, 0x8002)
    assert vm.resume().reason is ExitReason.HLT
    assert vm.changes.of(Field.EXIT_REASON) == Change(Field.EXIT_REASON, 0xA, 0xC)


@pytest.mark.parametrize(
    ("field", "before", "after", "text"),
    [
        (RFLAGS, 0x2, 0x103, "GUEST_RFLAGS 0x2 -> 0x103: +CF +TF -FIXED1".replace(" -FIXED1", "")),
        (
            Field.PRIMARY_PROCESSOR_BASED_CONTROLS,
            0x80,
            int(PrimaryControls.RDTSC_EXITING),
            "PRIMARY_PROCESSOR_BASED_CONTROLS 0x80 -> 0x1000: +RDTSC_EXITING -HLT_EXITING",
        ),
        (
            Field.GUEST_CS_ACCESS_RIGHTS,
            0xA09B,
            0x1C09B,
            "GUEST_CS_ACCESS_RIGHTS 0xa09b -> 0x1c09b: "
            "unusable, code, readable, accessed, DPL 0, present, D/B, G",
        ),
        (Field.GUEST_RIP, 0, 0x10, "GUEST_RIP 0x0 -> 0x10"),
        ("rax", 1, 2, "rax 0x1 -> 0x2"),
        (Field.GUEST_CR3, None, 2, "GUEST_CR3 - -> 0x2"),
        (Field.GUEST_CR0, 2, None, "GUEST_CR0 0x2 -> -"),
    ],
)
def test_a_change_is_told_in_words(field, before, after, text):
    assert str(Change(field, before, after)) == text


def test_a_difference_is_in_the_order_of_the_encodings():
    before = snapshot({"rbx": 1, "rax": 2}, GUEST_RIP=1, GUEST_CR0=5, GUEST_CR3=7)
    after = snapshot({"rbx": 2, "rax": 3}, GUEST_RIP=2, GUEST_CR0=6, GUEST_CR4=8)
    names = [change.name for change in diff(before, after)]
    assert names == ["GUEST_CR0", "GUEST_CR3", "GUEST_CR4", "GUEST_RIP", "rax", "rbx"]
    assert len(str(diff(before, after)).splitlines()) == 6
    with pytest.raises(CaseError, match="VPID"):
        _ = before[Field.VPID]


def test_records_that_tell_differences_make_whole_snapshots():
    reader = SnapshotReader()
    assert reader.take([Record("vmx", {}, "")]) is None
    assert not reader.knows_all
    reader.take(
        [Record("snapshot", {"f681e": "0x8000", "f6820": "0x2"}, ""), Record("snapshot", {"rax": "0x1"}, "")]
    )
    taken = reader.take([Record("snapshot", {"f681e": "0x8002"}, ""), Record("snapshot", {}, "")])
    assert taken is not None
    assert taken.fields == {Field.GUEST_RIP: 0x8002, Field.GUEST_RFLAGS: 2}
    assert taken.registers["rax"] == 1
    assert reader.knows_all
