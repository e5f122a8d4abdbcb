"""Known differences: where an engine does something else than the SDM says.

An entry is a finding, not an excuse: it names the section, what the manual says, what the engine does, and
the versions it was seen with. A test marked with its key is expected to fail on that engine, strictly: when
the difference goes away, the test fails until the entry is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownDifference:
    """One difference. `versions` is a regular expression that the engine's version must match from its start."""

    engine: str
    versions: str
    section: str
    sdm: str
    """What the manual says."""
    engine_does: str

    def applies(self, engine: str, version: str) -> bool:
        """Whether this is about that engine in that version."""
        return engine == self.engine and re.match(self.versions, version) is not None

    def __str__(self) -> str:
        return f"{self.engine} {self.versions}: {self.engine_does}; SDM {self.section}: {self.sdm}"


KNOWN_DIFFERENCES: Mapping[str, KnownDifference] = {}
"""By key: what the marker `vmx_known_difference` names."""
