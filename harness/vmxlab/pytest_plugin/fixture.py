"""What a test gets as `vmxlab`: cases in, runs out; and what is known of the test at hand.

The plugin (`vmxlab.pytest_plugin`) makes it and reports on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vmxlab.cases.case import Case
    from vmxlab.console.lab_by_need import LabByNeed
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.run import Run
    from vmxlab.errors import MissingCapability
    from vmxlab.structures import Capabilities
    from vmxlab.structures.capabilities import Need


@dataclass(slots=True)
class TestAtHand:
    """What the test that runs now has done so far."""

    __test__ = False  # a name that pytest would take for a test class

    runs: list[Run] = field(default_factory=list)
    needs: list[Need] = field(default_factory=list)
    """What it needs of the processor besides what its cases ask for."""
    lacking: MissingCapability | None = None
    """Why it was skipped."""
    live: list[LiveMachine] = field(default_factory=list)
    """The live machines that it asked for."""
    refused: Run | None = None
    """The last case that could not be run at all, with the error that the test got of it."""
    differing: list[Run] = field(default_factory=list)
    """The runs that are not as the oracle says, where it was asked (--vmx-oracle)."""

    def forget(self) -> None:
        """Start with the next test."""
        self.runs.clear()
        self.needs.clear()
        self.lacking = None
        self.close_live()
        self.live.clear()
        self.refused = None
        self.differing.clear()

    def close_live(self) -> None:
        """A live machine is there for one test."""
        for vm in self.live:
            vm.close()

    def live_sections(self) -> list[tuple[str, str]]:
        """What the last commands of each live machine did, for the report of a failed test."""
        sections = []
        for vm in self.live:
            runs = vm.link.recent
            lines = [str(what) for run in runs for what in (*run.outcomes, *run.exits, *run.faults)]
            title = f"vmxlab: the last {len(runs)} commands of a live machine on {vm.info.title()}"
            sections.append((title, "\n".join([*lines, f"log: {vm.log_path}"])))
        return sections


class VmxlabFixture:
    """What a test gets: cases in, runs out, on one engine.

    Where no processor model was named, a case that needs what the engine's default model lacks runs on
    another of its models that has it. After `require`, `require_ept` and the marker `vmx_needs` so do all
    cases of the test, and `capabilities` and `physical_address_width` are of the model that they run on;
    else these two are of the default model, whatever a single case asks for.

    `lab` is the LabByNeed behind it: it raises MissingCapability where this skips the test.
    """

    def __init__(self, lab: LabByNeed, test: TestAtHand) -> None:
        self.lab = lab
        self._test = test

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.lab.engine.name

    @property
    def model(self) -> str:
        """The processor model that the test's last case ran on; before it, the one it would run on."""
        if self._test.runs:
            return self.lab.info_of(self._test.runs[-1]).model
        with self._skipping():
            return self.lab.model_for(self._test.needs)

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs of the processor; skips the test where it has no VMX."""
        with self._skipping():
            return self.lab.target_for(self._test.needs).capabilities

    @property
    def physical_address_width(self) -> int:
        """MAXPHYADDR of the processor, in bits."""
        with self._skipping():
            return self.lab.target_for(self._test.needs).physical_address_width

    def run(self, case: Case) -> Run:
        """Run a case. Skips the test where no processor model has what it needs.

        Raises CaseError for a case that can't be, MachineError if the machine died or hung.
        """
        from vmxlab.console.unfinished import failed_run
        from vmxlab.errors import MachineError, VmxlabError

        try:
            with self._skipping():
                run = self.lab.run(case, needs=self._test.needs)
        except MachineError as error:
            if error.run is not None:
                self._test.runs.append(error.run)
            raise
        except VmxlabError as error:
            self._test.refused = failed_run(case, len(self._test.runs), error)
            raise
        self._test.runs.append(run)
        return run

    def run_all(self, cases: Sequence[Case]) -> list[Run]:
        """Run cases one after the other; each has its own verdict, and none raises."""
        runs = self.lab.run_all(cases, needs=self._test.needs)
        self._test.runs += runs
        return runs

    def run_image(self, cases: Sequence[Case]) -> list[Run]:
        """Run cases out of one image, booted afresh; out of several, where they need different models."""
        with self._skipping():
            runs = self.lab.run_image(cases, needs=self._test.needs)
        self._test.runs += runs
        return runs

    def live(self, case: Case | None = None) -> LiveMachine:
        """A live machine, set up as `case` says and not entered; it is closed when the test ends.

        A context manager, too. It is the machine that runs the cases: the next `run` undoes what it set up.
        Skips the test where no processor model has what the case needs.
        """
        with self._skipping():
            vm = self.lab.live(case, needs=self._test.needs)
        self._test.live.append(vm)
        return vm

    def require(self, *needs: Need) -> None:
        """Have the rest of the test run on a processor with all of this, or skip it where there is none.

        A need is a control, a field of a capability MSR (EptVpidCap.page_1g), or a bit of CR0 or CR4 that a
        processor with some feature lets be 1 (CR4.SMXE). CaseError for anything else.
        """
        from vmxlab.cases.needs import checked_needs

        self._test.needs += checked_needs(needs)
        with self._skipping():
            self.lab.model_for(self._test.needs)

    def require_ept(self, *features: str) -> None:
        """As `require`, for fields of IA32_VMX_EPT_VPID_CAP by their names."""
        from vmxlab.structures import EptVpidCap

        self.require(*(getattr(EptVpidCap, feature) for feature in features))

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        from vmxlab.errors import MissingCapability

        try:
            yield
        except MissingCapability as error:
            self._test.lacking = error
            pytest.skip(error.message)
