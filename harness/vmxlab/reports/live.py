"""What a live machine shows a person at a prompt: exits, outcomes, snapshots, what changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from vmxlab.reports.runs import describe_exit
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.registers import RFLAGS
from vmxlab.structures.vmcs_values import FieldValue

if TYPE_CHECKING:
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.live.snapshot import Changes, Snapshot
    from vmxlab.console.live.stepping import Stepped
    from vmxlab.console.run import Exit, Outcome
    from vmxlab.sdm.qualifications import Qualification

_LINE = 110
_CHANGE_LINES = 2
_SINCE = "since the entry: "

_AREAS = {
    FieldType.CONTROL: "controls",
    FieldType.EXIT_INFORMATION: "VM-exit information",
    FieldType.GUEST_STATE: "guest state",
    FieldType.HOST_STATE: "host state",
}

# What VM exit writes at each exit tells nothing beside the exit itself.
_TOLD_BY_THE_EXIT = frozenset(
    field for field in Field if field.type is FieldType.EXIT_INFORMATION
) - {Field.VM_INSTRUCTION_ERROR}  # fmt: skip


def exit_text(exit: Exit) -> str:
    """An exit in three lines: what it was, where, and the registers that are not 0."""
    failed = "VM-entry failure, " if exit.entry_failed else ""
    words = describe_exit(exit)
    text = f"exit {exit.number}: {failed}{exit.reason_name}{'' if words == '-' else f', {words}'}"
    where = f"rip={exit.rip:#x}, {exit.instruction_length} bytes"
    flags = f"rflags={exit.rflags:#x} ({RFLAGS(exit.rflags).describe()})"
    return f"{text}\n  {where}; {flags}\n  {_registers(exit)}"


def _registers(exit: Exit) -> str:
    return " ".join(f"{name}={value:#x}" for name, value in exit.registers.items() if value)


def outcome_text(outcome: Outcome) -> str:
    """An outcome, with the value that was read."""
    if outcome.value is None:
        return str(outcome)
    if isinstance(outcome.field, Field):
        return f"{outcome}, {FieldValue(outcome.field, outcome.value)!r}"
    return f"{outcome}, {outcome.value:#x}"


def stepped_text(stepped: Stepped) -> str:
    """Steps, with the registers after the last."""
    return f"{stepped}\n  {_registers(stepped.exit)}"


def qualification_text(qualification: Qualification) -> str:
    """An exit qualification in words, with its bits, and its attributes by name."""
    attributes = {field.name: getattr(qualification, field.name) for field in fields(qualification)}
    words = [f"{name}={_number(value)}" for name, value in attributes.items() if name != "raw"]
    return "\n  ".join(
        [f"{qualification.describe()} ({qualification.raw:#x})", *([" ".join(words)] if words else [])]
    )


def _number(value: object) -> str:
    plain = isinstance(value, int) and not isinstance(value, bool) and not hasattr(value, "name")
    return f"{value:#x}" if plain else str(getattr(value, "name", value))


def snapshot_text(snapshot: Snapshot) -> str:
    """Every field that is not 0, decoded, area by area; and the registers."""
    return "\n".join(_snapshot_lines(snapshot))


def _snapshot_lines(snapshot: Snapshot) -> Iterator[str]:
    width = max((len(field.name) for field in snapshot.fields), default=0)
    for area, title in _AREAS.items():
        present = {f: value for f, value in snapshot.fields.items() if f.type is area}
        shown = {f: value for f, value in sorted(present.items()) if value}
        yield f"{title}: {len(shown)} of {len(present)} fields are not 0"
        for field, value in shown.items():
            yield f"  {field.name.ljust(width)}  {FieldValue(field, value)!r}"
    registers = [f"{name}={value:#x}" for name, value in snapshot.registers.items() if value]
    yield f"registers: {' '.join(registers) or 'all 0'}"


def changes_lines(changes: Changes) -> list[str]:
    """What changed since an entry, in a line or two: not what the exit says itself."""
    lines: list[str] = []
    worth = [str(change) for change in changes if change.where not in _TOLD_BY_THE_EXIT]
    for number, text in enumerate(worth):
        joined = f"{lines[-1]}; {text}" if lines else f"{_SINCE}{text}"
        if lines and len(joined) > _LINE:
            if len(lines) == _CHANGE_LINES:
                lines[-1] += f"; and {len(worth) - number} more: vm.changes"
                break
            joined = f"{' ' * len(_SINCE)}{text}"
            lines.append(joined)
        else:
            lines[-1:] = [joined]
    return lines


def banner(vm: LiveMachine) -> str:
    """What a person reads first: what runs, where the log is, and what to try."""
    return "\n".join(
        [
            f"vmxlab shell: {vm.info.title()}; {vm.info.why}",
            f"log: {vm.log_path}",
            "vm is a live machine, set up and not entered. To try:"
            if vm.has_vmx
            else "vm is a live machine without VMX: memory, MSRs and CPUID. To try:",
            *(f"    {line.ljust(48)} {what}".rstrip() for line, what in _to_try(vm).items()),
            "help(vm) and Tab tell the rest; Ctrl-D leaves.",
        ]
    )


def _to_try(vm: LiveMachine) -> Mapping[str, str]:
    if not vm.has_vmx:
        return {
            "vm.cpuid(1)": "",
            "hex(vm.rdmsr(Msr.IA32_EFER))": "",
            "vm.memory[0x1000000:0x1000010] = bytes(16)": "",
            "vm.memory.read_u32(0x1000000)": "",
            "vm.restart()": "",
        }
    return {
        'vm.enter("mov ebx, 5; in al, 0x60")': "to its end: all ports are let through",
        "vm.io_bitmap.set_intercept(0x60, True)": "now it is not",
        'exit = vm.enter("mov ebx, 5; in al, 0x60"); exit': "exit.qualification.port, exit.registers",
        "vm.vmread(Field.GUEST_RIP), vm.changes": "where L2 is; what the entry changed",
        "vm.skip(); vm.step()": "behind IN; one instruction on",
    }
