"""`vmxlab doctor`: which engines run here, and what each missing one needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from vmxlab.cli.common import Status, json_option
from vmxlab.cli.output import Output, write_json
from vmxlab.engines.base import Availability, Engine
from vmxlab.engines.choose import ENGINES
from vmxlab.errors import VmxlabError
from vmxlab.reports.tables import Column, Table

_MODELS_SHOWN = 20

_ENGINES = (
    Column("engine", "engine", style="bold"),
    Column("runs", "runs here", styles={"yes": "bold green", "no": "bold red"}),
    Column("vmx", "VMX"),
    Column("version", "version"),
    Column("default_model", "default model", fold=True),
    Column("model_count", "models", right=True),
    Column("models", None),
    Column("problem", None),
    Column("advice", None),
)
_PARTS = (
    Column("part", "part", style="bold"),
    Column("there", "there", styles={"yes": "bold green", "no": "bold red"}),
    Column("what", "what", fold=True),
    Column("advice", None),
)


@dataclass(frozen=True, slots=True)
class _Finding:
    """An engine and what was found out about it."""

    engine: Engine
    state: Availability
    models: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Part:
    """Something else that is needed."""

    name: str
    there: bool
    what: str
    advice: str | None = None


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Show which engines run here, and what each missing one needs.

    Exit status 0 if an engine with VMX runs here, else 3.
    """
    findings = [_look_at(kind()) for kind in ENGINES.values()]
    parts = [_monitor(), _assembler(), _carrier()]
    engines, others = _engine_table(findings), _part_table(parts)
    ready = [f.engine.name for f in findings if f.state.ok and f.engine.has_vmx()]
    if as_json:
        write_json({"engines": engines.json_rows(), "parts": others.json_rows(), "vmx_engines": ready})
        return Status.PASS if ready else Status.ERROR
    output = Output()
    output.table(engines)
    for finding in findings:
        _explain(output, finding)
    output.table(others)
    for part in parts:
        if part.advice is not None:
            output.line(f"{part.name}: {part.advice}")
    if ready:
        output.line(f"Cases run here, on {' and '.join(ready)}.", "bold green")
        return Status.PASS
    output.line("No engine with VMX runs here: see above for what is missing.", "bold red")
    return Status.ERROR


def _look_at(engine: Engine) -> _Finding:
    state = engine.availability()
    return _Finding(engine, state, engine.models() if state.ok else ())


def _engine_table(findings: Sequence[_Finding]) -> Table:
    rows = [
        (
            f.engine.name,
            f.state.ok,
            f.engine.has_vmx() if f.state.ok else None,
            f.state.version,
            f.engine.default_model,
            len(f.models) if f.state.ok else None,
            list(f.models),
            f.state.problem,
            f.state.advice,
        )
        for f in findings
    ]
    return Table(_ENGINES, rows)


def _part_table(parts: Sequence[_Part]) -> Table:
    return Table(_PARTS, [(part.name, part.there, part.what, part.advice) for part in parts])


def _explain(output: Output, finding: _Finding) -> None:
    """Below the table: why an engine does not run, or which models it has."""
    name, state = finding.engine.name, finding.state
    if not state.ok:
        rows = [(f"{name}:", state.problem or "does not run here")]
        if state.advice:
            rows.append(("", f"what to do: {state.advice}"))
        output.pairs(rows)
        output.line()
    elif 1 < len(finding.models) <= _MODELS_SHOWN:
        rows = [(f"{name} models:", " ".join(finding.models))]
        if finding.engine.models_by_need():
            default = finding.engine.default_model
            rows.append(
                ("", f"without --model a case that needs what {default} lacks runs on another of these")
            )
        output.pairs(rows)
        output.line()


def _monitor() -> _Part:
    from vmxlab.image.monitor import load_monitor

    try:
        monitor = load_monitor()
    except VmxlabError as error:
        return _Part("monitor", False, error.message, error.advice)
    return _Part("monitor", True, f"built, {len(monitor.code)} bytes")


def _carrier() -> _Part:
    from vmxlab.engines.carrier.image import carrier_availability

    state = carrier_availability()
    if not state.ok:
        return _Part("carrier", False, state.problem or "can't be built here", state.advice)
    if state.version is None:
        return _Part("carrier", False, "not built yet", "kvm-in-bochs builds it when needed: vmxlab carrier")
    return _Part("carrier", True, state.version)


def _assembler() -> _Part:
    from vmxlab.cases.assembler import find_tool

    try:
        tool = find_tool()
    except VmxlabError as error:
        return _Part("as", False, error.message, error.advice)
    return _Part("as", True, str(tool.path))
