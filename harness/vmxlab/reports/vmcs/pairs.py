"""Field names with values: JSON, TOML, or just lines of NAME = VALUE.

    {"GUEST_CS_ACCESS_RIGHTS": "0xa09b", "0x6820": 2}

Names are those of the SDM in upper or lower case, or encodings; values are decimal or hexadecimal. One
lenient reader takes all three, so that a text which is cut off or damaged is read as far as it goes; the
strict readers of JSON and TOML only say what is wrong with it.
"""

from __future__ import annotations

import json
import re
import tomllib

from vmxlab.errors import VmxlabError
from vmxlab.reports.vmcs.text import FieldCollector, VmcsText
from vmxlab.sdm.fields import Field

FORMAT = "field names and values"

_PAIR = re.compile(
    r"""(?P<quote>["']?)(?P<name>[A-Za-z_][\w .-]*?|0[xX][0-9a-fA-F]+)(?P=quote)
        [ \t]*[:=][ \t]*
        (?P<value>"[^"\n]*"?|'[^'\n]*'?|[^\s,}\]\#]+)""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"(?:0[xX][0-9a-fA-F_]+|[0-9][0-9_]*)$")
_TABLES = frozenset({"fields", "vmcs"})
_COMMENT = re.compile(r"^\s*(?:#|//|;)")


def is_meant(text: str) -> bool:
    """Whether there is any pair in it."""
    return _PAIR.search(text) is not None


def read(text: str) -> list[VmcsText]:
    """The one VMCS of the text; none where no pair names a field."""
    collector = FieldCollector()
    strict = _complaint(text)
    if strict is not None:
        collector.odd(*strict)
    for number, line in enumerate(text.splitlines(), 1):
        if not _COMMENT.match(line):
            _line(collector, number, line)
    if not collector.fields:
        return []
    return [VmcsText("the VMCS", FORMAT, collector.fields, tuple(collector.oddities))]


def _line(collector: FieldCollector, number: int, line: str) -> None:
    for pair in _PAIR.finditer(line):
        name, text = pair["name"].strip(), pair["value"].strip()
        if name.lower() in _TABLES and text.startswith(("{", "[")):
            _line(collector, number, line[pair.end("value") - len(pair["value"]) + 1 :])
            return
        try:
            field = Field.parse(name)
        except VmxlabError as error:
            collector.odd(number, str(error.message))
            continue
        cut = text[:1] in "\"'" and text[-1:] != text[:1]
        digits = text.strip("\"'").strip()
        if cut or not _NUMBER.match(digits):
            collector.odd(number, f"{field.name}: {digits!r} is {'cut off' if cut else 'no number'}")
            continue
        collector.take(number, field, int(digits.replace("_", ""), 0 if digits[:2].lower() == "0x" else 10))


def _complaint(text: str) -> tuple[int, str] | None:
    """What a strict reader says against the text, where it looks as if it were for one."""
    if text.lstrip().startswith("{"):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return error.lineno, f"as JSON it ends here: {error.msg}; read as far as it goes"
        except RecursionError:
            return 1, "as JSON it is nested too deep; read as far as it goes"
        return None
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"line (\d+)", str(error))
        line = int(where[1]) if where else text.count("\n") + 1
        return line, f"as TOML it is not right here: {error}; read as far as it goes"
    return None
