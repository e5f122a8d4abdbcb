"""A case as the Python text that makes it: a test that can be pasted into a file.

    print(case_source(case))

What a failed property test shows, and what `vmxlab image` and a report give along. Running the text gives an
equal case; a structure that takes too many statements stands in it as bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import sys
import zlib
from collections.abc import Iterable, Mapping
from enum import Enum, Flag
from types import FunctionType

from vmxlab.cases import reactions as r
from vmxlab.cases.case import Case
from vmxlab.cases.memory import guest_ept
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.structures import Ept, IOBitmap, MsrArea, MsrBitmap

_MANY = 24
_WIDTH = 104
_INDENT = "    "
_PLAIN = (str, bool, type(None), float)


@dataclasses.dataclass(frozen=True, slots=True)
class Asserted:
    """What a test asserts of its run.

    `statement` calls the run `run`; `names` are the other names in it with what they stand for, of which some
    are expressions that begin with `run` (`expressions`).
    """

    statement: str = "assert not run.check()"
    names: Mapping[str, object] = dataclasses.field(default_factory=dict)
    expressions: Mapping[str, str] = dataclasses.field(default_factory=dict)


BY_THE_ORACLE = Asserted()


def case_source(case: Case, *, name: str = "test_case", asserted: Asserted = BY_THE_ORACLE) -> str:
    """A module with one test: it runs the case, and compares the run with the oracle, or as `asserted` says.

    TypeError for a value that can't be written as Python text.
    """
    writer = _Writer()
    call = writer.call("Case", _changed(case), indent=1)
    body = [*writer.statements, f"run = vmxlab.run({call})"]
    body += [line for name, value in asserted.names.items() for line in writer.bind(name, value)]
    body += [f"{name} = {expression}" for name, expression in asserted.expressions.items()]
    body.append(asserted.statement)
    text = "".join(f"{_INDENT}{line}\n" for statement in body for line in statement.splitlines())
    return f"{writer.imports()}\n\n\ndef {name}(vmxlab):\n{text}"


def _changed(value: object) -> dict[str, object]:
    """The attributes of a dataclass that are not what they are by default."""
    changed = {}
    for item in dataclasses.fields(value):  # type: ignore[arg-type]
        given = getattr(value, item.name)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if default is dataclasses.MISSING or not _same(given, default):
            changed[item.name] = given
    return changed


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _importable(module: str) -> str:
    """A module that whoever runs the text has: of this package, or Python's own. Else TypeError."""
    if module.partition(".")[0] not in {"vmxlab", *sys.stdlib_module_names} - {"__main__"}:
        raise TypeError(f"the module {module} may be missing elsewhere")
    return module


class _Writer:
    """Writes expressions; remembers which names they use, and the statements that must come before them."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self._names: dict[str, str] = {}
        self._modules: set[str] = set()

    def imports(self) -> str:
        """The import lines of all modules and names that were used."""
        exported = sys.modules["vmxlab"].__all__  # the top of the package, which this is below
        names: dict[str, set[str]] = {}
        for name, module in self._names.items():
            names.setdefault("vmxlab" if name in exported else module, set()).add(name)
        lines = [f"import {module}" for module in sorted(self._modules)] + [""] * bool(self._modules)
        lines += [f"from {module} import {', '.join(sorted(some))}" for module, some in sorted(names.items())]
        return "\n".join(lines)

    def bind(self, name: str, value: object) -> list[str]:
        """The statements that give a name its value: none where an import does."""
        if isinstance(value, type | FunctionType):
            if not value.__name__ == value.__qualname__ == name:
                raise TypeError(f"{name} can't be imported")
            self._names[name] = _importable(value.__module__)
            return []
        return [f"{name} = {self._exactly(value)}"]

    def _exactly(self, value: object) -> str:
        """A value as an expression of the same type: a tuple stays one."""
        match value:
            case Enum():
                _importable(type(value).__module__)
                return self.expression(value)
            case int() | str() | bytes() | None:
                return self.expression(value)
            case range():
                return repr(value)
        if type(value) is list:
            return f"[{', '.join(map(self._exactly, value))}]"
        if type(value) is tuple:
            items = [*map(self._exactly, value)]
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if type(value) is dict:
            pairs = (f"{self._exactly(key)}: {self._exactly(item)}" for key, item in value.items())
            return f"{{{', '.join(pairs)}}}"
        if type(value) in (set, frozenset):
            kind = type(value).__name__
            return f"{kind}([{', '.join(sorted(map(self._exactly, value)))}])"  # type: ignore[call-overload]
        raise TypeError(f"{value!r} can't be written as Python text")

    # --- expressions ---------------------------------------------------------------------------------------

    def name(self, thing: type) -> str:
        """A class by its name."""
        self._names[thing.__name__] = thing.__module__
        return thing.__name__

    def call(self, function: str, arguments: Mapping[str, object], *, indent: int = 0) -> str:
        """A call with keyword arguments, in lines of their own where it is long."""
        if function == "Case":
            self.name(Case)
        parts = [f"{key}={self.expression(value, key)}" for key, value in arguments.items()]
        line = f"{function}({', '.join(parts)})"
        if len(line) + len(_INDENT) * (indent + 2) <= _WIDTH and "\n" not in line:
            return line
        return f"{function}(\n" + "".join(f"{_INDENT}{part},\n" for part in parts) + ")"

    def expression(self, value: object, what: str = "value") -> str:
        """A value as an expression; `what` names the variable where it takes statements."""
        match value:
            case Flag():
                return self._flags(value)
            case Enum():
                return f"{self.name(type(value))}.{value.name}"
            case bytes():
                return self._bytes(value)
            case _ if isinstance(value, _PLAIN):
                return repr(value)
            case int():
                return str(value) if 0 <= value < 10 else f"{value:#x}"
            case IOBitmap() | MsrBitmap():
                return self._bitmap(value, what)
            case Ept():
                return self._ept(value, what)
            case MsrArea():
                entries = ", ".join(self.expression(entry) for entry in value.entries)
                return f"{self.name(MsrArea)}([{entries}])"
            case r.Reaction():
                return self._reaction(value)
            case Mapping():
                items = (f"{self.expression(k)}: {self.expression(v)}" for k, v in value.items())
                return "{" + ", ".join(items) + "}"
            case tuple() | list():
                return "[" + ", ".join(self.expression(item) for item in value) + "]"
        if dataclasses.is_dataclass(value):
            return self.call(self.name(type(value)), _changed(value))
        to_bytes = getattr(value, "to_bytes", None)
        if to_bytes is not None:
            return f"{self.name(type(value))}.from_bytes({self._bytes(to_bytes())})"
        raise TypeError(f"{value!r} can't be written as Python text")

    def _flags(self, value: Flag) -> str:
        name = self.name(type(value))
        rest = int(value.value)
        words = []
        for member in type(value):
            if rest & member.value:
                words.append(f"{name}.{member.name}")
                rest &= ~member.value
        if rest or not words:
            words.append(f"{name}({rest:#x})")
        return " | ".join(words)

    def _bytes(self, value: bytes) -> str:
        if len(value) <= 64:
            return f'bytes.fromhex("{value.hex()}")' if value else 'b""'
        if not any(value):
            return f"bytes({len(value):#x})"
        self._modules |= {"base64", "zlib"}
        packed = base64.b85encode(zlib.compress(value, 9)).decode()
        pieces = [packed[at : at + _WIDTH - 12] for at in range(0, len(packed), _WIDTH - 12)]
        joined = "\n".join(f"{_INDENT * 2}{piece!r}" for piece in pieces)
        return f"zlib.decompress(base64.b85decode(\n{joined}\n{_INDENT}))"

    def _bitmap(self, bitmap: IOBitmap | MsrBitmap, what: str) -> str:
        kind = self.name(type(bitmap))
        raw = bitmap.to_bytes()
        if raw == bytes(len(raw)):
            return f"{kind}.passthrough_all()"
        if raw == type(bitmap).intercept_all().to_bytes():
            return f"{kind}.intercept_all()"
        lines = list(_bitmap_statements(bitmap, what))
        if len(lines) > _MANY:
            return f"{kind}.from_bytes({self._bytes(raw)})"
        self.statements += [f"{what} = {kind}.passthrough_all()", *lines]
        return what

    def _ept(self, ept: Ept, what: str) -> str:
        first = "guest_ept()"
        lines = _changes(guest_ept(), ept, what)
        if lines is None:
            first, lines = f"{self.name(Ept)}()", _changes(Ept(), ept, what) or []
        else:
            self._names["guest_ept"] = "vmxlab"
        if not lines:
            return first
        self.statements += [f"{what} = {first}", *lines]
        return what

    def _reaction(self, reaction: r.Reaction) -> str:
        self._names["on"] = "vmxlab"
        known = reaction.reason in ExitReason.__members__.values()
        reason = ExitReason(reaction.reason) if known else reaction.reason
        arguments = [self.expression(reason)]
        if reaction.qualification_mask:
            mask, value = reaction.qualification_mask, reaction.qualification_value
            arguments.append(f"qualification=({mask:#x}, {value:#x})")
        if reaction.from_match:
            arguments.append(f"first={reaction.from_match}")
        if reaction.match_count:
            arguments.append(f"times={reaction.match_count}")
        return f"on({', '.join(arguments)})" + "".join(self._action(action) for action in reaction.actions)

    def _action(self, action: r.Act) -> str:
        method = _METHODS[type(action)]
        arguments = [self.expression(value) for value in dataclasses.astuple(action)]
        return f".{method}({', '.join(arguments)})"


_METHODS: Mapping[type, str] = {
    r.SetRegister: "set",
    r.SetField: "vmwrite",
    r.SetMemory: "write",
    r.InveptAction: "invept",
    r.WriteApic: "apic_write",
    r.Skip: "skip",
    r.Resume: "resume",
    r.Stop: "stop",
}


def _changes(base: Ept, wanted: Ept, what: str) -> list[str] | None:
    """The statements that make one EPT of another; None where it takes more than to write entries."""
    made = base.copy()
    now, before = ({(gpa, level): value for gpa, level, value in ept.leaves()} for ept in (wanted, base))
    lines = []
    for gpa, level in sorted(before.keys() - now.keys()):
        made.set_raw_entry(gpa, level, 0)
        lines.append(f"{what}.set_raw_entry({gpa:#x}, {level}, 0)")
    for (gpa, level), value in now.items():
        if before.get((gpa, level)) != value:
            made.set_raw_entry(gpa, level, value)
            lines.append(f"{what}.set_raw_entry({gpa:#x}, {level}, {value:#x})")
    present = {(gpa, level): value for gpa, level, value in made.table_entries()}
    for gpa, level, value in wanted.table_entries():
        if present.get((gpa, level), value) != value:
            made.set_table_entry(gpa, level, value)
            lines.append(f"{what}.set_table_entry({gpa:#x}, {level}, {value:#x})")
    return lines if made == wanted else None


def _bitmap_statements(bitmap: IOBitmap | MsrBitmap, what: str) -> Iterable[str]:
    if isinstance(bitmap, IOBitmap):
        for run in bitmap.intercepted_ports():
            yield f"{what}.set_intercept_of_range({run.start:#x}, {len(run)}, True)"
        return
    for kind, runs in (("read", bitmap.intercepted_msrs()), ("write", bitmap.intercepted_msrs(write=True))):
        for run in runs:
            yield f"{what}.set_{kind}_intercept_of_range({run.start:#x}, {len(run)}, True)"
