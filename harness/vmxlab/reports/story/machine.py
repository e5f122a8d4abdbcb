"""What a log tells of the machine itself: its monitor, its processor, and L1's faults outside of cases."""

from __future__ import annotations

from vmxlab.console.records import Record
from vmxlab.image.protocol import PROTOCOL_VERSION
from vmxlab.reports.story import explain
from vmxlab.reports.story.passage import Kind, Passage
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.registers import Vector
from vmxlab.structures import Capabilities


def told_boot(line: int, record: Record) -> Passage:
    """The @boot record. Raises KeyError or ValueError for one that makes no sense, as all of these do."""
    protocol = record.number("protocol")
    notes = []
    if protocol != PROTOCOL_VERSION:
        notes.append(
            f"it speaks protocol {protocol}; this is read as protocol {PROTOCOL_VERSION}, as far as it goes"
        )
    words = [f"build {record.number('build', 0):#010x}, protocol {protocol}"]
    if "loader" in record.values:
        words.append(f"started as {record.values['loader']}")
    processor = f"{record.values.get('cpu', 'a processor')}, signature {record.number('signature', 0):#x}"
    if "maxphyaddr" in record.values:
        processor += f", {record.number('maxphyaddr')}-bit physical addresses"
    vmx = "VMX" if record.number("vmx", 0) else "no VMX (CPUID.1:ECX.VMX[5] is 0)"
    text = f"{', '.join(words)}; {processor}, {vmx}"
    return Passage(line, Kind.BOOT, "monitor", text, notes=tuple(notes), data={"boot": dict(record.values)})


def told_capabilities(line: int, record: Record, capabilities: Capabilities) -> Passage:
    """The @caps record: what tells processors apart, the secondary controls that may be 1."""
    secondary = capabilities.control(ControlSet.SECONDARY)
    names = [str(flag.name) for flag in ControlSet.SECONDARY.flags if secondary.allowed1 & flag]
    text = f"VMCS revision {capabilities.basic.revision_id:#x}; secondary controls: "
    text += ", ".join(names) if names else "none"
    data = {"capabilities": dict(record.values)}
    return Passage(line, Kind.CAPABILITIES, "VMX", text, data=data)


def told_panic(line: int, record: Record) -> Passage:
    """The @panic record."""
    return Passage(line, Kind.DEATH, "panic", _fault(record))


def told_fault(line: int, record: Record) -> Passage:
    """A @fault record outside of any case."""
    text = f"{_fault(record)}, outside of any case"
    return Passage(line, Kind.FAULT, "fault", text, notes=(explain.FAULT,))


def _fault(record: Record) -> str:
    vector = record.number("vector")
    name = Vector(vector).name if vector in Vector.__members__.values() else f"{vector}"
    at, cr2 = record.number("rip"), record.number("cr2")
    return f"#{name}({record.number('code'):#x}) in L1 at {at:#x}, CR2 {cr2:#x}"


def count_of(number: int, what: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
