"""How much the property tests generate, and a place for what they count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from vmxlab.structures import Capabilities

from ..generated import EXPLORED
from .drawing import Drawn
from .exploring import Plan, Tally, explore

Strategy = Callable[[Capabilities], st.SearchStrategy[Drawn]]
Explore = Callable[..., Tally]

SHARE = {"kvm-in-bochs": 0.1}
"""Of the examples, how many a slow engine gets where it was not named."""


@pytest.fixture
def explored(request: pytest.FixtureRequest, vmxlab) -> Explore:
    """`explored(strategy, examples=30, predicted=0.9)`: see `exploring.explore`.

    Without `--vmx-examples` these are the same examples each time. `predicted`: the share of the cases that
    the oracle must predict to their end; what agrees for want of a prediction shows nothing.
    """

    def run_all(strategy: Strategy, *, examples: int, predicted: float) -> Tally:
        config = request.config
        wanted = config.getoption("--vmx-examples")
        seed = config.getoption("--vmx-seed")
        if wanted is not None and seed is None:
            seed = 0
        share = 1.0 if vmxlab.engine in (config.option.vmx_engine or "") else SHARE.get(vmxlab.engine, 1.0)
        wanted = max(1, round((wanted or examples) * share))
        too_few = wanted < examples  # to say anything of a share
        info = vmxlab.lab.info
        tally = Tally()
        try:
            explore(
                strategy(vmxlab.capabilities),
                lambda drawn: vmxlab.lab.run(drawn.case),  # of thousands of runs none is kept
                Plan(wanted, seed),
                info.name,
                info.version,
                tally,
            )
        except Exception:
            if tally.failed is not None:
                vmxlab.run(tally.failed.case)  # once more, for the log in the report
            raise
        request.node.user_properties.append((EXPLORED, dict(tally.counts())))
        assert too_few or tally.share >= predicted, (
            f"only {tally.whole} of {tally.cases} cases were predicted to their end: {tally.unknown}"
        )
        return tally

    return run_all
