"""What a case did, for people and for programs: its exits as a table, and what is to be said besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum

from vmxlab.cases.case import Case
from vmxlab.cases.memory import STACK_TOP
from vmxlab.console.run import End, Exit, Outcome, Run, Verdict
from vmxlab.errors import MissingCapability
from vmxlab.reports.disassembly import Code
from vmxlab.reports.tables import Column, Table, Value
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_information import InstructionInformation
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.qualifications import EptViolationQualification
from vmxlab.sdm.registers import GENERAL_REGISTERS

VERDICT_STYLES: Mapping[Verdict, str] = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.SKIP: "bold yellow",
    Verdict.ERROR: "bold magenta",
    Verdict.CRASH: "bold red",
}

_MEMORY_SHOWN_BYTES = 16

END_WORDS: Mapping[End, str] = {
    End.STOP: "stopped at the last exit",
    End.DONE: "all steps were taken",
    End.LIMIT: "Limits.exits was reached",
    End.VMFAIL: "a VMX instruction failed",
    End.FAULT: "a fault in L1",
    End.SCRIPT: "the monitor could not read the case",
    End.DIED: "the machine died",
    End.HUNG: "nothing more came before the deadline",
}

_COLUMNS = (
    Column("number", "#", right=True),
    Column("reason", "exit", style="bold"),
    Column("description", "qualification", fold=True),
    Column("rip", "RIP", style="cyan"),
    Column("instruction", "instruction", fold=True),
    Column("changed", "changed", joiner=" ", fold=True, style="dim"),
    Column("qualification", None),
    Column("details", None),
)


# --- one exit ----------------------------------------------------------------------------------------------


def describe_exit(exit: Exit) -> str:
    """What an exit tells beyond its reason, in words: the event, the qualification, addresses, operands.

    Where the SDM defines no qualification, what it says of the registers stands in its place: the MSR of
    RDMSR and WRMSR, the leaf of CPUID.
    """
    return "; ".join(_descriptions(exit)) or "-"


def _descriptions(exit: Exit) -> Iterator[str]:
    if exit.interruption.valid:
        code = f" {exit.interruption_error_code:#x}" if exit.interruption.error_code_valid else ""
        yield f"{exit.interruption.describe()}{code}"
    qualification = exit.qualification.describe()
    if qualification not in ("-", exit.reason_name):
        yield qualification
    yield from _addresses(exit)
    yield from _operands(exit)
    information = exit.instruction_information
    # A format of its own, and a field that isn't undefined as it is for IN and OUT.
    if type(information) is not InstructionInformation and exit.raw_instruction_information:
        yield information.describe()
    if exit.idt_vectoring.valid:
        yield f"while delivering {exit.idt_vectoring.describe()}"


def _addresses(exit: Exit) -> Iterator[str]:
    if exit.reason in (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION):
        yield f"GPA {exit.guest_physical_address:#x}"
        qualification = exit.qualification
        if isinstance(qualification, EptViolationQualification) and qualification.guest_linear_valid:
            yield f"linear {exit.guest_linear_address:#x}"


def _operands(exit: Exit) -> Iterator[str]:
    rax, rcx, rdx = (exit.registers.get(name, 0) & 0xFFFF_FFFF for name in ("rax", "rcx", "rdx"))
    match exit.reason:
        case ExitReason.RDMSR:
            yield f"read of {msr_name(rcx)}"
        case ExitReason.WRMSR:
            yield f"write of {rdx << 32 | rax:#x} to {msr_name(rcx)}"
        case ExitReason.CPUID:
            yield f"leaf {rax:#x}, subleaf {rcx:#x}"


def reason_name(number: int) -> str:
    """A basic exit reason by name: "IO_INSTRUCTION", or "reason 0xc8"."""
    return Exit(number=0, full_reason=number).reason_name


def msr_name(number: int) -> str:
    """An MSR by name and number: "IA32_EFER (0xc0000080)", or the number alone."""
    try:
        return f"{Msr(number).name} ({number:#x})"
    except ValueError:
        return f"MSR {number:#x}"


def exit_json(exit: Exit) -> dict[str, Value]:
    """Every field of an exit. What the processor gave is hex text: few JSON readers have 64-bit integers."""
    return {
        "full_reason": f"{exit.full_reason:#x}",
        "entry_failed": exit.entry_failed,
        "qualification": f"{exit.raw_qualification:#x}",
        "instruction_length": exit.instruction_length,
        "instruction_information": f"{exit.raw_instruction_information:#x}",
        "guest_linear_address": f"{exit.guest_linear_address:#x}",
        "guest_physical_address": f"{exit.guest_physical_address:#x}",
        "interruption_information": f"{exit.raw_interruption_information:#x}",
        "interruption_error_code": f"{exit.interruption_error_code:#x}",
        "idt_vectoring_information": f"{exit.raw_idt_vectoring_information:#x}",
        "idt_vectoring_error_code": f"{exit.idt_vectoring_error_code:#x}",
        "rflags": f"{exit.rflags:#x}",
        "registers": {name: f"{value:#x}" for name, value in exit.registers.items()},
        "watched": {field_name(field): f"{value:#x}" for field, value in exit.watched.items()},
    }


def qualification_json(exit: Exit) -> dict[str, Value]:
    """The decoded qualification by the SDM's names."""
    decoded: dict[str, Value] = {"type": type(exit.qualification).__name__}
    for field in fields(exit.qualification):  # not asdict(): it copies, and there may be 100,000 exits
        value = getattr(exit.qualification, field.name)
        if isinstance(value, Enum):
            decoded[field.name] = value.name
        else:
            decoded[field.name] = value if isinstance(value, bool) else f"{value:#x}"
    return decoded


# --- all exits ---------------------------------------------------------------------------------------------


def exit_table(run: Run, code: Code | None = None, at_entry: Mapping[str, int] | None = None) -> Table:
    """The exits of a run, a row each. `code` shows the instructions; without it they are left out.

    `at_entry`: L2's registers and RFLAGS before the first exit, where the run's case is not there to tell.
    """
    before: Mapping[str, int] = state_at_entry(run.case) if at_entry is None else at_entry
    rows = []
    for exit in run.exits:
        rows.append(exit_row(exit, before, code))
        before = state_at_exit(exit)
    return Table(_COLUMNS, rows)


def exit_row(exit: Exit, before: Mapping[str, int], code: Code | None) -> tuple[Value, ...]:
    """An exit's row; `before`: the registers as they were at the exit before."""
    return (
        exit.number,
        exit.reason_name,
        describe_exit(exit),
        f"{exit.rip:#x}",
        # After a failed entry L2 executed nothing (SDM Vol. 3C, 27.8).
        None if code is None or exit.entry_failed else code.at(exit.rip),
        changes(before, state_at_exit(exit), exit),
        qualification_json(exit),
        exit_json(exit),
    )


def exit_as_json(exit: Exit, before: Mapping[str, int], code: Code | None) -> dict[str, Value]:
    """One exit as the rows of `exit_table` are as JSON."""
    return dict(zip((column.key for column in _COLUMNS), exit_row(exit, before, code), strict=True))


def state_at_entry(case: Case | None) -> dict[str, int]:
    """L2's registers when it is entered first, as far as the case says; of a log, the baseline's."""
    state = {**dict.fromkeys(GENERAL_REGISTERS, 0), "rsp": STACK_TOP, "rflags": 2}
    if case is not None:
        for name, field in (("rsp", Field.GUEST_RSP), ("rflags", Field.GUEST_RFLAGS)):
            state[name] = case.fields.get(field, state[name])
        state |= case.registers
    return state


def state_at_exit(exit: Exit) -> dict[str, int]:
    """L2's registers as an exit found them."""
    return {**exit.registers, "rflags": exit.rflags}


def changes(before: Mapping[str, int], now: Mapping[str, int], exit: Exit) -> list[str]:
    """Registers that changed since the exit before, and the fields that the case watches."""
    registers = [f"{name}={value:#x}" for name, value in now.items() if before.get(name) != value]
    return registers + [f"{field_name(field)}={value:#x}" for field, value in exit.watched.items()]


def field_name(field: Field | int) -> str:
    """A field by name, or its encoding where no name is known."""
    return field.name if isinstance(field, Field) else f"field {field:#x}"


# --- the run -----------------------------------------------------------------------------------------------


def title(run: Run) -> str:
    """What a case is called: its name, or its number."""
    return run.name or (run.case.name if run.case is not None else "") or f"case {run.number}"


def remarks(run: Run) -> list[str]:
    """What is to be said of a run besides its exits.

    The processor model, where it is not the engine's default one; instructions of L1 that failed or read a
    value, the rules that a failed VM entry broke, faults in L1, memory.
    """
    lines = [f"on {run.engine}: {run.by_need}"] if run.by_need else []
    lines += [outcome_line(o) for o in run.outcomes if not o.ok or o.value is not None]
    lines += [f"broken rule {broken}" for broken in run.broken_rules()]
    lines += [str(fault) for fault in run.faults]
    for address, content in run.memory.items():
        more = f" ... ({len(content)} bytes)" if len(content) > _MEMORY_SHOWN_BYTES else ""
        lines.append(f"memory at {address:#x}: {content[:_MEMORY_SHOWN_BYTES].hex(' ')}{more}")
    return lines


def outcome_line(outcome: Outcome) -> str:
    """An outcome with the MSR it was about, and the value that was read."""
    text = str(outcome)
    if outcome.msr is not None:
        text = text.replace(":", f" of {msr_name(outcome.msr)}:", 1)
    return text if outcome.value is None else f"{text}, {outcome.value:#x}"


def verdict_text(run: Run) -> str:
    """The verdict's reason: what came, what differs, or why there is no result."""
    count = f"{len(run.exits)} exit{'' if len(run.exits) == 1 else 's'}"
    if isinstance(run.error, MissingCapability):
        return run.error.message
    if run.error is not None:
        return str(run.error)
    end = END_WORDS[run.end] if run.end is not None else "the records end before the case does"
    difference = run.difference()
    if difference is not None:
        return f"{difference} ({count}; {end})"
    expected = run.case is not None and run.case.expect is not None
    return f"{count}{', as expected' if expected else ''}; {end}"


def run_json(run: Run, code: Code | None = None) -> dict[str, Value]:
    """A run as JSON knows it."""
    return {
        "name": title(run),
        "verdict": run.verdict.name,
        "reason": verdict_text(run),
        "engine": run.engine,
        "by_need": run.by_need or None,
        "end": run.end.value if run.end is not None else None,
        "outcomes": [outcome_json(outcome) for outcome in run.outcomes],
        "exits": exit_table(run, code).json_rows(),
        "broken_rules": [broken.rule.name for broken in run.broken_rules()],
        "faults": [str(fault) for fault in run.faults],
        "memory": {f"{address:#x}": content.hex() for address, content in run.memory.items()},
        "log": str(run.log_path) if run.log_path is not None else None,
    }


def outcome_json(outcome: Outcome) -> dict[str, Value]:
    """An outcome as JSON knows it."""
    return {
        "operation": outcome.operation,
        "outcome": outcome.kind.value,
        "error": None if outcome.error is None else int(outcome.error),
        "vector": None if outcome.vector is None else int(outcome.vector),
        "error_code": outcome.error_code,
        "field": None if outcome.field is None else field_name(outcome.field),
        "msr": None if outcome.msr is None else f"{outcome.msr:#x}",
        "value": None if outcome.value is None else f"{outcome.value:#x}",
        "count": outcome.count,
    }


def summary(runs: Sequence[Run]) -> str:
    """How many of each verdict: "3 passed, 1 skipped"."""
    words = {
        Verdict.PASS: "passed",
        Verdict.FAIL: "failed",
        Verdict.SKIP: "skipped",
        Verdict.ERROR: "had an error",
        Verdict.CRASH: "crashed",
    }
    counts = [(sum(run.verdict is verdict for run in runs), word) for verdict, word in words.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "no cases"
