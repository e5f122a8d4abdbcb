"""Which engines a session's tests run on: those that were named, or the chosen one; and those of markers.

None of them is booted for it: what stands in a test's id is known before.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest

OPTION = "--vmx-engine"


@dataclass(frozen=True, slots=True)
class DescribedEngine:
    """An engine that tests run on, as far as can be told without booting it."""

    name: str
    version: str
    model: str
    why: str
    named_model: str | None = None
    """The model, where a user named it: then no case runs on another one."""
    problem: str | None = None
    """Why it can't run here; only for one that a marker names."""

    @property
    def test_id(self) -> str:
        """What stands in the test's id."""
        return f"{self.name}-{self.version}-{self.model}"


_DESCRIBED = pytest.StashKey[list[DescribedEngine]]()
_BY_MARKER = pytest.StashKey[dict[str, DescribedEngine]]()


def engines_of_session(config: pytest.Config) -> list[DescribedEngine]:
    """The engines of this session."""
    from vmxlab.errors import EngineUnavailable

    if _DESCRIBED not in config.stash:
        model = config.option.vmx_model
        try:
            described = [_describe(name, model, OPTION) for name in _engine_names(config)]
        except EngineUnavailable as error:
            raise pytest.UsageError(str(error)) from None
        # "auto" may be one that is named as well.
        config.stash[_DESCRIBED] = list({about.name: about for about in described}.values())
    return config.stash[_DESCRIBED]


def engine_of_marker(config: pytest.Config, name: str) -> DescribedEngine:
    """An engine that a test names, with its default model; where it can't run, that is a skip."""
    from vmxlab.errors import EngineUnavailable

    found = config.stash.setdefault(_BY_MARKER, {})
    if name not in found:
        try:
            found[name] = _describe(name, None, "the marker vmx_also_on")
        except EngineUnavailable as error:
            found[name] = DescribedEngine(name, "unavailable", "none", "", problem=str(error))
    return found[name]


def engine_named(config: pytest.Config, name: str) -> DescribedEngine:
    """The description of an engine that some test runs on."""
    session = {about.name: about for about in engines_of_session(config)}
    return session[name] if name in session else engine_of_marker(config, name)


def as_parameter(about: DescribedEngine) -> Any:
    """The parameter for an engine that a marker names."""
    marks = [] if about.problem is None else [pytest.mark.skip(reason=about.problem)]
    return pytest.param(about.name, marks=marks)


def _engine_names(config: pytest.Config) -> list[str | None]:
    names = [name.strip() for name in (config.option.vmx_engine or "").split(",")]
    return [name for name in names if name] or [None]


def _describe(name: str | None, model: str | None, named_by: str) -> DescribedEngine:
    from vmxlab.engines.choose import choose

    engine, why = choose(name, model, named_by=named_by)
    engine.prepare(lambda what: print(f"vmxlab: {what}", file=sys.stderr, flush=True))
    version = engine.availability().version or "unknown"
    return DescribedEngine(engine.name, version, model or engine.default_model, why, model)
