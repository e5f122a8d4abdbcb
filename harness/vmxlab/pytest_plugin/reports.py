"""What a test's report says of its runs: sections, JUnit properties, exits compared field by field.

The plugin (`vmxlab.pytest_plugin`) asks for these; none of them needs pytest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.run import Exit, Run
    from vmxlab.engines.base import EngineInfo

_MAX_LOG_LINES = 200
_MAX_SECTIONS = 10


def failure_sections(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What a failed test shows of its cases: the decoded log of each, up to a limit that is said."""
    sections = [_log_section(run) for run in _worth_showing(runs)]
    if len(runs) > _MAX_SECTIONS:
        more = f"{len(runs) - _MAX_SECTIONS} more cases of this test in {runs[-1].log_path}"
        sections.append(("vmxlab", more))
    return sections


def _worth_showing(runs: Sequence[Run]) -> Sequence[Run]:
    """All, or where there are many those without PASS and the last ones; in their order."""
    from vmxlab.console.run import Verdict

    # Sorting keeps the order of equals: what is not PASS comes first, then the latest.
    latest_first = list(runs)[::-1]
    ranked = sorted(latest_first, key=lambda run: run.verdict is Verdict.PASS)[:_MAX_SECTIONS]
    return [run for run in runs if any(run is kept for kept in ranked)]


def _log_section(run: Run) -> tuple[str, str]:
    """The decoded serial log of one case."""
    lines = [str(outcome) for outcome in run.outcomes]
    lines += [str(exit_) for exit_ in run.exits]
    lines += [str(fault) for fault in run.faults]
    lines.append(f"end: {run.end.value if run.end else 'none'}; verdict {run.verdict.value}")
    if run.error is not None:
        lines.append(str(run.error))
    lines += [f"broken rule {broken}" for broken in run.broken_rules()]
    lines += ["", "records:", *(record.line for record in run.records)]
    if len(lines) > _MAX_LOG_LINES:
        lines[_MAX_LOG_LINES:] = [f"... {len(lines) - _MAX_LOG_LINES} more lines in the log"]
    lines.append(f"log: {run.log_path}")
    title = f"vmxlab case {run.number}{f' ({run.name})' if run.name else ''} on {run.engine}"
    return title, "\n".join(lines)


def by_need_section(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Which cases ran on another processor model than the id says."""
    lines = [f"case {run.number} ran on {run.engine}: {run.by_need}" for run in runs if run.by_need]
    return [("vmxlab: processor model by need", "\n".join(lines))] if lines else []


def run_properties(
    runs: Sequence[Run], live: Sequence[LiveMachine], infos: Sequence[EngineInfo]
) -> list[tuple[str, object]]:
    """What stands in JUnit of a test: its runs and live machines.

    `infos`, one or more: what they ran on, or would have. Each VM entry of a live machine is an exit.
    """
    paths = [*(run.log_path for run in runs), *(vm.log_path for vm in live)]
    logs = [str(path) for path in paths if path is not None]
    return [
        ("vmx_engine", f"{infos[0].name} {infos[0].version}"),
        ("vmx_model", ",".join(dict.fromkeys(info.model for info in infos))),
        ("vmx_cases", len(runs)),
        ("vmx_exits", sum(len(run.exits) for run in runs) + sum(vm.entries for vm in live)),
        *(("vmx_log", log) for log in logs[-1:]),
    ]


def failure_lines(runs: Sequence[Run]) -> list[str]:
    """A failed test in few lines: its engines, the first case that failed by itself, the first difference."""
    from vmxlab.console.run import Verdict
    from vmxlab.reports.runs import title, verdict_text

    lines = [f"on {engine}" for engine in dict.fromkeys(run.engine for run in runs) if engine]
    bad = [run for run in runs if run.verdict not in (Verdict.PASS, Verdict.SKIP)]
    for run in bad[:1]:
        lines.append(f"{title(run)}: {run.verdict.name}: {verdict_text(run).splitlines()[0]}")
    lines += [f"broken rule {broken}" for run in runs[-1:] for broken in run.broken_rules()]
    return lines


def exits_differ(left: Exit, right: Exit) -> list[str]:
    """The fields in which two exits differ, one a line."""
    lines = ["two exits differ"]
    for name in left.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            lines += [f"  {name}[{key}]: {_number(a.get(key))} != {_number(b.get(key))}" for key in keys]
        else:
            lines.append(f"  {name}: {_number(a)} != {_number(b)}")
    return lines


def _number(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else repr(value)
