"""Several labs behind one face: each case runs on a processor model that has what the case needs.

The engine's default model runs all that it can. A case that needs more runs on the first of the engine's
other models that has it, and `Run.engine` names that model. Where the user named a model, there is no other.

Which model has what is learnt by booting it once, and remembered. Besides the default model's machine at
most one is up, of the other model that was used last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vmxlab.cases.case import Case
from vmxlab.cases.controls import compute_controls
from vmxlab.console.lab import Lab
from vmxlab.console.run import Run
from vmxlab.console.unfinished import failed_run
from vmxlab.errors import MachineError, MissingCapability, VmxlabError
from vmxlab.structures.capabilities import Capabilities, Need

if TYPE_CHECKING:
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.session import Session
    from vmxlab.engines.base import Engine, EngineInfo
    from vmxlab.image.compiler import Target


@dataclass(frozen=True, slots=True)
class _Choice:
    """A model, and what the default one lacks where it is another."""

    model: str
    why: str


class LabByNeed:
    """One engine and, where no `model` is named, all its models. A context manager.

    The arguments are those of `Lab` (`deadlines`: its two), and so are the properties and methods; `debugged`
    leaves the default model alone. `needs` are what the processor must have besides what a case itself asks
    for. `info`, `capabilities` and `target` are those of the default model: a case that runs on another one
    may meet another MAXPHYADDR, for example.
    """

    def __init__(
        self,
        engine: str | None = None,
        *,
        model: str | None = None,
        log_dir: Path | None = None,
        why: str | None = None,
        debugged: bool = False,
        **deadlines: float,
    ) -> None:
        self._deadlines = deadlines
        self._default = Lab(engine, model=model, log_dir=log_dir, why=why, debugged=debugged, **deadlines)
        self._default_model = model or self._default.engine.default_model
        # One machine is enough for a person with a debugger.
        self._others: tuple[str, ...] | None = () if model is not None or debugged else None
        self._learnt: dict[str, tuple[EngineInfo, Capabilities]] = {}
        self._other: Lab | None = None
        self._other_model = ""
        self._numbers = itertools.count(0)

    # --- what it runs on -------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that was chosen."""
        return self._default.engine

    @property
    def info(self) -> EngineInfo:
        """Engine, version, default model and why."""
        return self._default.info

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs of the default model. Raises MissingCapability where it has no VMX."""
        return self._default.capabilities

    @property
    def target(self) -> Target:
        """What cases are compiled for on the default model."""
        return self._default.target

    @property
    def log_dir(self) -> Path:
        """Where the logs are."""
        return self._default.log_dir

    @property
    def log_path(self) -> Path | None:
        """The serial log of the default model's machine."""
        return self._default.log_path

    def session(self) -> Session:
        """The session of the default model's machine, at its prompt."""
        return self._default.session()

    def nested_entries(self) -> int | None:
        """See `Lab.nested_entries`. An engine that counts has one model only."""
        return self._default.nested_entries()

    def info_of(self, run: Run) -> EngineInfo:
        """What a run of this lab ran on; the default model where it came to no machine."""
        return self.known_info_of(run) or self.info

    def known_info_of(self, run: Run) -> EngineInfo | None:
        """As `info_of`; None where no machine has been up yet."""
        infos = (info for info, _ in self._learnt.values())
        return next((info for info in infos if info.title() == run.engine), self._default.known_info)

    def model_for(self, needs: Sequence[Need]) -> str:
        """The first model that has all of this. Raises MissingCapability where none has."""
        return self._model_with(needs).model

    def target_for(self, needs: Sequence[Need]) -> Target:
        """What cases are compiled for on the first model that has all of this, as `model_for`."""
        return self._lab(self.model_for(needs)).target

    def processors(self) -> list[tuple[EngineInfo, Capabilities]]:
        """All models that a case may run on; those that have not been up yet are booted.

        Empty where the engine has no VMX.
        """
        try:
            for model in self._candidates():
                self._ask(model)
        except MissingCapability:
            return []
        return [(info, capabilities) for info, capabilities in self._learnt.values() if capabilities.raw]

    # --- running ---------------------------------------------------------------------------------------

    def run(self, case: Case, *, needs: Sequence[Need] = ()) -> Run:
        """See `Lab.run`. Raises MissingCapability where no model has what the case needs."""
        return self._run(case, next(self._numbers), needs)

    def run_all(self, cases: Sequence[Case], *, needs: Sequence[Need] = ()) -> list[Run]:
        """See `Lab.run_all`."""
        runs = []
        for case in cases:
            number = next(self._numbers)
            try:
                runs.append(self._run(case, number, needs))
            except VmxlabError as error:
                runs.append(failed_run(case, number, error))
        return runs

    def run_image(self, cases: Sequence[Case], *, needs: Sequence[Need] = ()) -> list[Run]:
        """See `Lab.run_image`: one image, or where cases need different models, one for each model.

        Raises MissingCapability where no model has the `needs` themselves.
        """
        self._model_with(needs)
        runs: dict[int, Run] = {}
        groups: dict[_Choice, list[int]] = {}
        for number, case in enumerate(cases):
            try:
                groups.setdefault(self._model_for(case, number, needs), []).append(number)
            except MissingCapability as error:
                runs[number] = failed_run(case, number, error)
        for choice, numbers in groups.items():
            results = self._lab(choice.model).run_image([cases[n] for n in numbers], numbers=numbers)
            runs |= {n: replace(run, by_need=choice.why) for n, run in zip(numbers, results, strict=True)}
        return [runs[number] for number in range(len(cases))]

    def live(self, case: Case | None = None, *, needs: Sequence[Need] = ()) -> LiveMachine:
        """See `Lab.live`: on the first model that has what the case and `needs` ask for."""
        if case is None and not needs:
            return self._default.live()
        return self._lab(self._model_with(needs, case).model).live(case)

    def _run(self, case: Case, number: int, needs: Sequence[Need]) -> Run:
        choice = self._model_for(case, number, needs)
        try:
            return replace(self._lab(choice.model).run(case, number=number), by_need=choice.why)
        except MachineError as error:
            if error.run is not None:
                error.run = replace(error.run, by_need=choice.why)
            raise

    # --- which model -----------------------------------------------------------------------------------

    def _model_for(self, case: Case, number: int, needs: Sequence[Need]) -> _Choice:
        try:
            return self._model_with(needs, case)
        except VmxlabError as error:
            error.locate(case=case.name or f"case {number}")
            if isinstance(error, MachineError):  # while a model was booted
                error.run = failed_run(case, number, error)
            raise

    def _model_with(self, needs: Sequence[Need], case: Case | None = None) -> _Choice:
        """The first model that has it all. Raises MissingCapability, for what the default one lacks."""
        lacking: MissingCapability | None = None
        for model in self._candidates():
            capabilities = self._ask(model)
            try:
                for need in needs:
                    capabilities.require(need)
                if case is not None:
                    compute_controls(case, capabilities)
            except MissingCapability as error:
                lacking = lacking or error
            else:
                return _Choice(model, self._why(lacking))
        assert lacking is not None
        raise lacking.in_no_model(self._default_model, self.engine.name) if self._others else lacking

    def _why(self, lacking: MissingCapability | None) -> str:
        if lacking is None:
            return ""
        return f"{self._default_model} lacks {lacking.feature} ({lacking.bit} is {lacking.value})"

    def _candidates(self) -> Iterator[str]:
        yield self._default_model
        if self._others is None:  # asking for them takes a look at the engine's program
            self._others = self.engine.models_by_need()
        yield from self._others

    def _ask(self, model: str) -> Capabilities:
        """What a model's processor can do; of another than the default model nothing, if it has no VMX."""
        if model not in self._learnt:
            lab = self._lab(model)
            try:
                capabilities = lab.capabilities
            except MissingCapability:
                if lab is self._default:
                    raise
                capabilities = Capabilities({})
            self._learnt[model] = (lab.info, capabilities)
        return self._learnt[model][1]

    def _lab(self, model: str) -> Lab:
        if model == self._default_model:
            return self._default
        if self._other is None or self._other_model != model:
            self._close_other()
            self._other = Lab(
                self.engine.name,
                model=model,
                log_dir=self._default.log_dir,
                why=f"{self._default.info.why}; by need: a case needs what {self._default_model} lacks",
                debugged=False,
                **self._deadlines,
            )
            self._other_model = model
        return self._other

    def _close_other(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            other.close()

    # --- the end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the machines; nothing of them stays behind but the logs in `log_dir`."""
        try:
            self._close_other()
        finally:
            self._default.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
