"""Cases of two families at once: the instructions of both, with the controls and structures of both."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import SecondaryControls
from vmxlab.structures import Capabilities

from .drawing import Drawn, merged
from .strategies_ept import ept_cases
from .strategies_exceptions import exception_cases
from .strategies_instructions import instruction_cases
from .strategies_io import io_cases
from .strategies_msr import msr_cases
from .strategies_registers import control_register_cases, debug_register_cases

FAMILIES = (
    io_cases,
    msr_cases,
    control_register_cases,
    debug_register_cases,
    instruction_cases,
    exception_cases,
    ept_cases,
)
_FIRST_ONLY = (exception_cases, ept_cases)
"""Their reactions name addresses in their own program: it has to stay where it is."""


@cache
@st.composite
def mixed_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """One family's case, and behind its program another's, where both are for the same mode."""
    with_ept = capabilities.supports(SecondaryControls.ENABLE_EPT)
    families = [family for family in FAMILIES if with_ept or family is not ept_cases]
    first = draw(st.sampled_from(families))
    second = draw(st.sampled_from([f for f in families if f is not first and f not in _FIRST_ONLY]))
    one, other = draw(first(capabilities)), draw(second(capabilities))
    if one.mode is not other.mode:
        return one
    return Drawn(one.mode, (*one.lines[:-1], *other.lines), merged(one.rest, other.rest))
