"""A serial log of the monitor: on each VM entry that fails it reads the VMCS and reports it.

    @vmcs f6800=0x80000021 f6802=0x3000 ...*1c2f

The keys of such a record are encodings. The log also holds what is known of the processor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmxlab.console.records import Record, RecordReader
from vmxlab.console.session import capabilities_from_record
from vmxlab.errors import VmxlabError
from vmxlab.reports.vmcs.text import FieldCollector, Oddity, VmcsText
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, basic_reason
from vmxlab.sdm.fields import Field
from vmxlab.structures import Capabilities

FORMAT = "a serial log of the monitor"
LIMITS = "A log holds no memory: what bitmaps, MSR areas and a linked VMCS hold is not known."

_RECORD = re.compile(r"^(?:vmx> )?@(?:boot|caps|case|vmcs|exit|vmx) ", re.MULTILINE)


def is_meant(text: str) -> bool:
    """Whether any record of the monitor stands in it."""
    return _RECORD.search(text) is not None


def read(text: str) -> list[VmcsText]:
    """The VMCS of every VM entry that failed, in order. Damaged lines are oddities of the one they are in."""
    reader, log = RecordReader(), _Log()
    for number, line in enumerate(text.encode("utf-8", errors="replace").split(b"\n"), 1):
        known = len(reader.broken)
        for record in reader.feed(line + b"\n"):
            log.take(number, record)
        for broken in reader.broken[known:]:
            log.oddities.append(Oddity(number, f"{broken.why}, and left out: {broken.text[:60]!r}"))
    log.finish()
    return log.found


@dataclass(slots=True)
class _Log:
    """What was read so far, and the VMCS that is being read."""

    found: list[VmcsText] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    capabilities: Capabilities | None = None
    boot: Mapping[str, str] = field(default_factory=dict)
    case: str = "before the first case"
    failure: str = ""
    fields: FieldCollector | None = None

    def take(self, number: int, record: Record) -> None:
        if record.kind == "vmcs":
            self.fields = self.fields or FieldCollector()
            self._fields(self.fields, number, record)
            return
        self.finish()
        match record.kind:
            case "boot":
                self.boot = record.values
            case "caps":
                self.capabilities = capabilities_from_record(record)
            case "case":
                self.case = f"case {record.number('id', 0)} {record.values.get('name', '')}".strip()
            case "live":
                self.case = f"live command {record.number('id', 0)}"
            case "vmx":
                self.failure = f"{record.values.get('op', '').upper()} failed"
                if "error" in record.values:
                    self.failure += f" with error {record.number('error')}"
            case "exit" if record.number("reason", 0) & ENTRY_FAILURE_BIT:
                reason = basic_reason(record.number("reason"))
                name = getattr(reason, "name", reason)
                self.failure = f"{name}, qualification {record.number('qual', 0)}"

    def _fields(self, collector: FieldCollector, number: int, record: Record) -> None:
        for key, value in record.values.items():
            try:
                collector.take(number, Field.parse(f"0x{key[1:]}"), int(value, 16))
            except (VmxlabError, ValueError):
                collector.odd(number, f"{key}={value} is no VMCS field with a value")

    def finish(self) -> None:
        """The VMCS that was being read is complete."""
        collector, self.fields = self.fields, None
        if collector is None:
            return
        width = self.boot.get("maxphyaddr")
        self.found.append(
            VmcsText(
                title=f"{self.case}: {self.failure}",
                format=FORMAT,
                fields=collector.fields,
                oddities=(*self.oddities, *collector.oddities),
                limits=LIMITS,
                capabilities=self.capabilities,
                physical_address_width=None if width is None else int(width, 16),
            )
        )
        self.oddities.clear()
