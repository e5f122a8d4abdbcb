"""One case of a log, as its records come in: each is told as it arrives, and what is missing is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from vmxlab.console.rebuild import RunBuilder
from vmxlab.console.records import Record
from vmxlab.console.run import Exit, Outcome, OutcomeKind, Run, Verdict
from vmxlab.errors import VmxlabError
from vmxlab.oracle.entry import Environment, check_entry
from vmxlab.reports.disassembly import Code
from vmxlab.reports.entry_rules import outcome_in_words
from vmxlab.reports.runs import (
    END_WORDS,
    changes,
    describe_exit,
    exit_as_json,
    field_name,
    outcome_json,
    outcome_line,
    state_at_entry,
    state_at_exit,
)
from vmxlab.reports.story.explain import FAULT, Place
from vmxlab.reports.story.passage import Kind, Passage
from vmxlab.reports.tables import Value
from vmxlab.sdm.fields import Field
from vmxlab.sdm.instruction_errors import InstructionError
from vmxlab.sdm.registers import GENERAL_REGISTERS
from vmxlab.structures.vmcs_values import FieldValue

_SHOWN_BYTES = 32
_SHOWN_INSTRUCTIONS = 6
_SHOWN_FIELDS = 6

_ABOUT_THE_VMCS = frozenset(
    {InstructionError.ENTRY_INVALID_CONTROL_FIELDS, InstructionError.ENTRY_INVALID_HOST_STATE}
)

NO_BYTES = "(its bytes are not in the log)"


@dataclass(slots=True)
class CaseTeller:
    """The case from line `line` on.

    `environment`: the processor, where the log has it. `with_data`: exits have all their fields in `data`.
    `whole`: its start was there, and nothing in it was missing so far.
    """

    line: int
    environment: Environment | None = None
    with_data: bool = False
    is_live: bool = False
    by_hand: bool = False
    """What was typed at the prompt made these records: no case, and without start or end."""
    whole: bool = True
    place: Place = Place.SETUP
    last: str = ""
    """What came last, in words: "exit 3 (HLT)"."""
    builder: RunBuilder = field(default_factory=lambda: RunBuilder(lenient=True))
    registers: Mapping[str, int] = field(default_factory=lambda: state_at_entry(None))
    """L2's, as the last exit found them."""
    broken: tuple[str, ...] = ()
    """The rules that the last failed VM entry broke."""
    _codes: list[Record] = field(default_factory=list)
    _code: Code | None = None
    _vmcs_line: int = 0

    @property
    def title(self) -> str:
        """ "case 3 ports", "live command 5"."""
        if self.by_hand:
            return "what was done by hand"
        if self.is_live:
            return f"live command {self.builder.number}"
        return f"case {self.builder.number} {self.builder.name}".rstrip()

    @property
    def where(self) -> str:
        """How far it had come."""
        return f"in {self.title}, {self.last or 'at its start'}"

    @property
    def code(self) -> Code | None:
        """L2's code as the log has it."""
        return self._code

    def program(self, place: Place) -> Iterator[str]:
        """What L2 has to execute, where the log ends in it: a loop shows in its first instructions."""
        if self._code is None or not place.enters:
            return
        first = list(islice(self._code.listing(), _SHOWN_INSTRUCTIONS + 1))
        if first:
            more = "; ..." if len(first) > _SHOWN_INSTRUCTIONS else ""
            text = "; ".join(text for _, text in first[:_SHOWN_INSTRUCTIONS])
            yield f"L2 has at {first[0][0]:#x}: {text}{more}"

    def run(self) -> Run:
        """What came of it so far, as a run. Records that are missing make it an ERROR."""
        return self.builder.run(verdict_on_error=None if self.whole else Verdict.ERROR)

    def add_code(self, records: Sequence[Record]) -> None:
        """Bytes of L2. Raises KeyError or ValueError where they make no sense."""
        code = Code.from_records([*self._codes, *records])
        self._codes += records
        self._code = code

    def start(self, record: Record) -> Iterator[Passage]:
        """Its first record."""
        self.builder.take(record)
        builder, head = self.builder, "live command" if self.is_live else "case"
        data: dict[str, Value] = {"case": builder.number, "name": builder.name, "live": self.is_live}
        yield Passage(self.line, Kind.CASE, f"{head} {builder.number}", builder.name, data=data)

    def take(self, line: int, record: Record) -> Iterator[Passage]:
        """One record of it. Raises KeyError or ValueError for one that makes no sense."""
        if record.kind != "vmcs":
            yield from self.finish_vmcs()
        builder = self.builder
        outcomes, exits, faults = len(builder.outcomes), len(builder.exits), len(builder.faults)
        builder.take(record)
        yield from self._oddities(line)
        yield from self._outcomes(line, builder.outcomes[outcomes:], record)
        for exit in builder.exits[exits:]:
            yield self._exit(line, exit)
        for fault in builder.faults[faults:]:
            self.place, self.last = Place.ENDING, "after a fault in L1"
            yield Passage(line, Kind.FAULT, "fault", str(fault), notes=(FAULT,))
        match record.kind:
            case "vmcs":
                self._vmcs_line = self._vmcs_line or line
                self.last = "while the VMCS was reported, after its VM entry had failed"
            case "snapshot":
                yield from self._snapshot(line, record)
            case "sweep":
                yield self._sweep(line, record)
            case "memory" if not record.number("left", 0):
                yield self._memory(line)
            case "end":
                yield self._end(line)

    def finish_vmcs(self, *, cut: bool = False) -> Iterator[Passage]:
        """The VMCS of a failed VM entry is complete, or was cut: what the rules say of it."""
        line, self._vmcs_line = self._vmcs_line, 0
        if not line:
            return
        rules = self._rules(line)
        if cut:
            text = f"{rules.text}; where the log ends the VMCS may not have been reported in full"
            yield replace(rules, text=text)
        else:
            self.last = "after its VM entry had failed"
            yield rules

    # --- the kinds of records ---------------------------------------------------------------------------

    def _oddities(self, line: int) -> Iterator[Passage]:
        oddities, self.builder.oddities = self.builder.oddities, []
        for oddity in oddities:
            self.whole = False
            yield Passage(
                line, Kind.TROUBLE, "missing", f"{oddity}; registers that did not change since are not in it"
            )

    def _outcomes(self, line: int, outcomes: Sequence[Outcome], record: Record) -> Iterator[Passage]:
        if not outcomes:
            return
        data = {"outcomes": [outcome_json(outcome) for outcome in outcomes]}
        self.place = Place.STEP
        last = outcomes[-1]
        self.last = f"after {_what(last)}{'' if last.ok else ', which failed'}"
        if record.kind == "exit":
            failed = self.builder.exits[-1].entry_failed
            text = "fails while it checks or loads guest state or MSRs" if failed else "enters L2"
            yield Passage(line, Kind.OUTCOME, "", f"{last.operation.upper()} {text}", data=data)
        elif "ok" in record.values:
            # The monitor ends its list before it enters L2.
            self.place = Place.ENTRY
            yield Passage(line, Kind.OUTCOME, "", f"{', '.join(map(_what, outcomes))}: VMsucceed", data=data)
        else:
            kind = Kind.OUTCOME if last.ok else Kind.FAILURE
            yield Passage(line, kind, "", outcome_line(last), data=data)

    def _exit(self, line: int, exit: Exit) -> Passage:
        data = exit_as_json(exit, self.registers, self._code) if self.with_data else {}
        changed = changes(self.registers, state_at_exit(exit), exit)
        self.registers = state_at_exit(exit)
        self.place = Place.EXIT
        self.last = f"after exit {exit.number} ({exit.reason_name})"
        place, words = f"{exit.rip:#x}", describe_exit(exit)
        text = "" if words == "-" else words
        if exit.entry_failed:
            text = f"{text}; L2 executed nothing" if text else "L2 executed nothing"
        elif self._code is not None:
            place += f"  {self._code.at(exit.rip) or NO_BYTES}"
        notes = (" ".join(changed),) if changed else ()
        return Passage(line, Kind.EXIT, f"exit {exit.number} {exit.reason_name}", text, place, notes, data)

    def _rules(self, line: int) -> Passage:
        fields = self.builder.vmcs
        data = {"fields": {field_name(name): f"{value:#x}" for name, value in fields.items()}}
        outcome = self.builder.outcomes[-1] if self.builder.outcomes else None
        if (
            outcome is not None
            and outcome.kind is OutcomeKind.FAIL_VALID
            and outcome.error not in _ABOUT_THE_VMCS
        ):
            text = f"the VMCS has {len(fields)} fields; this error is not about what they hold"
            return Passage(line, Kind.RULES, "", text, data=data)
        if self.environment is None:
            text = "which rules of VM entry it breaks is not known: the log has no @boot and @caps before it"
            return Passage(line, Kind.RULES, "", text, data=data)
        verdict = check_entry(fields, self.environment)
        self.broken = tuple(item.rule.name for item in verdict.broken)
        count = len(verdict.broken)
        text = f"{count} broken rule{'' if count == 1 else 's'} of VM entry: {outcome_in_words(verdict)}"
        if not count:
            text = f"no rule of VM entry is known to be broken; {len(verdict.unchecked)} were not checked"
        notes = tuple(str(item) for item in verdict.broken)
        return Passage(
            line, Kind.RULES, "", text, notes=notes, data={**data, "broken_rules": list(self.broken)}
        )

    def _sweep(self, line: int, record: Record) -> Passage:
        number, at = record.number("n"), record.number("at")
        exits, crc = record.number("exits"), record.number("crc")
        self.place, self.last = Place.EXIT, f"in sweep {number}, after {exits} exits from value {at:#x} on"
        text = f"{exits} exits from value {at:#x} on; their CRC-32 is {crc:#010x}"
        data: dict[str, Value] = {"at": f"{at:#x}", "exits": exits, "crc": f"{crc:#x}"}
        return Passage(line, Kind.SWEEP, f"sweep {number}", text, data=data)

    def _snapshot(self, line: int, record: Record) -> Iterator[Passage]:
        """What is not as in the snapshot before: of a live command, the monitor says it before each entry."""
        self.place, self.last = Place.ENTRY, "after a snapshot of the VMCS"
        words = [_said(key, int(text, 16)) for key, text in record.values.items()]
        if len(words) > _SHOWN_FIELDS:
            words[_SHOWN_FIELDS:] = [f"and {len(words) - _SHOWN_FIELDS} more"]
        if words:
            yield Passage(line, Kind.OUTCOME, "now", ", ".join(words), data=dict(record.values))

    def _memory(self, line: int) -> Passage:
        address, content = list(self.builder.memory.items())[-1]
        self.place, self.last = Place.STEP, f"after memory at {address:#x} was reported"
        more = f" ... ({len(content)} bytes)" if len(content) > _SHOWN_BYTES else ""
        text = f"{content[:_SHOWN_BYTES].hex(' ')}{more}"
        data = {"address": f"{address:#x}", "bytes": content.hex()}
        return Passage(line, Kind.MEMORY, f"memory at {address:#x}", text, data=data)

    def _end(self, line: int) -> Passage:
        run = self.run()
        end = self.builder.end
        assert end is not None
        count = f"{len(run.exits)} exit{'' if len(run.exits) == 1 else 's'}"
        data = {"why": end.value, "exits": len(run.exits)}
        return Passage(line, Kind.END, "end", f"{END_WORDS[end]}; {count}", data=data)


def _said(key: str, value: int) -> str:
    if key in GENERAL_REGISTERS:
        return f"{key} {value:#x}"
    field = Field(int(key[1:], 16))
    return f"{field.name} {FieldValue(field, value)!r}"


def _what(outcome: Outcome) -> str:
    name = outcome.operation.upper()
    if outcome.count is None:
        return name
    return f"{name} of {outcome.count} field{'' if outcome.count == 1 else 's'}"


def environment_of(boot: Record, caps: Record) -> Environment | None:
    """What the two records say of a processor; None where they make no sense."""
    from vmxlab.console.session import capabilities_from_record

    try:
        return Environment(
            capabilities=capabilities_from_record(caps),
            maxphyaddr=boot.number("maxphyaddr"),
            linear_address_width=boot.number("linear", 48),
        )
    except (KeyError, ValueError, VmxlabError):
        return None
