"""Snapshots: the VMCS and L2's registers as a value, and what is not the same in two of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vmxlab.cases.case import as_field
from vmxlab.console.records import Record
from vmxlab.errors import CaseError
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS
from vmxlab.structures.vmcs_values import FLAGS, FieldValue, describe_value

RECORD = "snapshot"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every field of a VMCS that the processor has, and L2's general registers, at one moment.

    `snapshot[Field.GUEST_RIP]` is a field, by name or encoding too; `snapshot.registers["rax"]` a register.
    """

    fields: Mapping[Field, int]
    registers: Mapping[str, int]

    def __getitem__(self, field: Field | str | int) -> FieldValue:
        """A field's value. CaseError for one that the processor has not."""
        field = as_field(field)
        if field not in self.fields:
            raise CaseError(f"the processor has no field {field.name}")
        return FieldValue(field, self.fields[field])

    def diff(self, after: Snapshot) -> Changes:
        """What is not the same in a later snapshot."""
        return diff(self, after)

    def __repr__(self) -> str:
        """Where L2 is, and how much there is."""
        rip = self.fields.get(Field.GUEST_RIP, 0)
        return f"<Snapshot of {len(self.fields)} fields, GUEST_RIP {rip:#x}>"


@dataclass(frozen=True, slots=True)
class Change:
    """A field, or a register by its name, and its value in both snapshots; None where one has it not."""

    where: Field | str
    before: int | None
    after: int | None

    @property
    def name(self) -> str:
        """The SDM's name."""
        return self.where.name if isinstance(self.where, Field) else self.where

    def __str__(self) -> str:
        text = f"{self.name} {_number(self.before)} -> {_number(self.after)}"
        words = self._words()
        return f"{text}: {words}" if words else text

    def _words(self) -> str:
        """Bits by name that came and went; else what the new value says."""
        if not isinstance(self.where, Field) or self.after is None:
            return ""
        if self.where not in FLAGS or self.before is None:
            return describe_value(self.where, self.after)
        flags = FLAGS[self.where]
        came, went = flags(self.after & ~self.before), flags(self.before & ~self.after)
        return " ".join(
            f"{sign}{word}"
            for sign, bits in (("+", came), ("-", went))
            for word in (bits.describe().split(" | ") if bits else ())
        )


class Changes(tuple[Change, ...]):
    """Changes in the order of the encodings, registers last; as text a line each."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing has changed"

    __repr__ = __str__

    def of(self, where: Field | str) -> Change | None:
        """The change of a field or register; None where it did not change."""
        return next((change for change in self if change.where == where), None)


def diff(before: Snapshot, after: Snapshot) -> Changes:
    """What is not the same in two snapshots."""
    changes: list[Change] = []
    for field in sorted({*before.fields, *after.fields}):
        pair = before.fields.get(field), after.fields.get(field)
        if pair[0] != pair[1]:
            changes.append(Change(field, *pair))
    for name in GENERAL_REGISTERS:
        pair = before.registers.get(name), after.registers.get(name)
        if pair[0] != pair[1]:
            changes.append(Change(name, *pair))
    return Changes(changes)


class SnapshotReader:
    """Puts snapshots together: the monitor's records say only what differs from the one before."""

    def __init__(self) -> None:
        self._fields: dict[Field, int] = {}
        self._registers: dict[str, int] = {}

    @property
    def knows_all(self) -> bool:
        """Whether there was a whole one, so that differences do."""
        return bool(self._fields)

    def take(self, records: Iterable[Record]) -> Snapshot | None:
        """The snapshot after these records; None where they hold none."""
        records = [record for record in records if record.kind == RECORD]
        if not records:
            return None
        for record in records:
            for key, text in record.values.items():
                if key in GENERAL_REGISTERS:
                    self._registers[key] = int(text, 16)
                else:
                    self._fields[Field(int(key[1:], 16))] = int(text, 16)
        registers = {name: self._registers.get(name, 0) for name in GENERAL_REGISTERS if name != "rsp"}
        return Snapshot(MappingProxyType(dict(self._fields)), MappingProxyType(registers))


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:#x}"
