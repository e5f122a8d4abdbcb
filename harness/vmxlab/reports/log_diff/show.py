"""The difference of two logs, as people and programs read it."""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.reports.capabilities import difference_table
from vmxlab.reports.log_diff.compare import ComparedCase, LogDiff, LogDifference
from vmxlab.reports.story import State, Storyteller, Told
from vmxlab.reports.story.machine import count_of
from vmxlab.reports.tables import Column, Table, Value


def head(log: Storyteller) -> str:
    """What a log is of: engine and model, monitor, how much it holds, how it ends."""
    engine, _, _ = log.engine.partition("; ")
    build = log.boot.values.get("build", "?") if log.boot is not None else "unknown"
    held = f"{count_of(log.cases, 'case')}, {count_of(log.exits, 'exit')}"
    words = [engine or "the log names no engine", f"monitor build {build}", held]
    if log.damaged:
        words.append(f"{count_of(log.damaged, 'line')} damaged or missing")
    if log.state is not State.WHOLE:
        words.append(log.state.value)
    return "; ".join(words)


def case_table(case: ComparedCase, names: tuple[str, str], *, everything: bool = False) -> Table:
    """What differs in a case; `everything`: what may differ, too, and why it may."""
    columns = [
        Column("where", "where", style="bold"),
        Column("what", "what"),
        Column("one", names[0], fold=True, style="red"),
        Column("other", names[1], fold=True, style="green"),
        Column("why", "may differ, because" if everything else None, fold=True, style="dim"),
    ]
    shown = case.everything if everything else case.differences
    rows = [(d.where, d.what, d.one, d.other, None if d.left_out is None else str(d.left_out)) for d in shown]
    return Table(columns, rows, case_title(case))


def case_title(case: ComparedCase) -> str:
    """The case's name, and where it stands in both logs."""
    lines = f"lines {case.one.line} and {case.other.line}"
    title = case.one.title if case.one.title == case.other.title else f"{case.one.title} | {case.other.title}"
    return f"{title}  ({lines})"


def capabilities_table(one: Storyteller, other: Storyteller, names: tuple[str, str]) -> Table | None:
    """What the two processors can do differently; None where nothing, or where a log doesn't say."""
    if one.capabilities is None or other.capabilities is None or one.capabilities == other.capabilities:
        return None
    return difference_table(one.capabilities, other.capabilities, names)


def alone(told: Told) -> str:
    """A case that one log has, and the other not."""
    return f"{told.title} (line {told.line}, {count_of(len(told.run.exits), 'exit')})"


def summary(diff: LogDiff, names: tuple[str, str], *, everything: bool = False) -> Iterator[str]:
    """How many cases are the same, and what was left out (or shown too)."""
    differing = sum(bool(case.differences) for case in diff.cases)
    same = len(diff.cases) - differing
    counts = [f"{count_of(same, 'case')} {'is' if same == 1 else 'are'} the same"]
    counts += [f"{differing} differ{'s' if differing == 1 else ''}"] if differing else []
    counts += [f"{len(diff.only_one)} only in {names[0]}"] if diff.only_one else []
    counts += [f"{len(diff.only_other)} only in {names[1]}"] if diff.only_other else []
    yield ", ".join(counts)
    left_out = sum(len(case.left_out) for case in diff.cases)
    if left_out:
        shown = "shown too" if everything else "left out"
        hint = "" if everything else " (--all shows them, and why)"
        yield f"{shown}: {count_of(left_out, 'value')} that may differ{hint}"


def diff_json(
    diff: LogDiff, one: Storyteller, other: Storyteller, names: tuple[str, str]
) -> dict[str, Value]:
    """Everything, what was left out too."""
    table = capabilities_table(one, other, ("one", "other"))
    return {
        "one": _log_json(one, names[0]),
        "other": _log_json(other, names[1]),
        "same": diff.same,
        "capabilities": table.json_rows() if table is not None else [],
        "cases": [_case_json(case) for case in diff.cases],
        "only_one": [_told_json(told) for told in diff.only_one],
        "only_other": [_told_json(told) for told in diff.only_other],
    }


def _log_json(log: Storyteller, name: str) -> dict[str, Value]:
    return {
        "log": name,
        "engine": log.engine or None,
        "boot": dict(log.boot.values) if log.boot is not None else None,
        "cases": log.cases,
        "exits": log.exits,
        "damaged": log.damaged,
        "state": log.state.value,
    }


def _told_json(told: Told) -> dict[str, Value]:
    return {"title": told.title, "line": told.line, "exits": len(told.run.exits)}


def _case_json(case: ComparedCase) -> dict[str, Value]:
    return {
        "title": case.one.title,
        "lines": [case.one.line, case.other.line],
        "differences": [_difference_json(d) for d in case.differences],
        "left_out": [_difference_json(d) for d in case.left_out],
    }


def _difference_json(difference: LogDifference) -> dict[str, Value]:
    words: dict[str, Value] = {
        "where": difference.where,
        "what": difference.what,
        "one": difference.one,
        "other": difference.other,
    }
    if difference.left_out is not None:
        words |= {"why": difference.left_out.why, "section": difference.left_out.section}
    return words
