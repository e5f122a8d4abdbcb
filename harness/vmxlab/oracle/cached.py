"""Translations that the processor may have cached (SDM Vol. 3A, 4.10; Vol. 3C, 29.4)."""

from __future__ import annotations

from dataclasses import dataclass, field

Translations = dict[tuple[int, int], int]
"""(address, size) of a page to where it lies in the machine."""


@dataclass(slots=True)
class Cached:
    """What may be cached: translations of linear and of guest-physical addresses."""

    linear: Translations = field(default_factory=dict)
    physical: Translations = field(default_factory=dict)

    def drop(self, *, physical: bool = False) -> None:
        """An invalidation of linear (and combined) translations, or of guest-physical ones as well."""
        self.linear.clear()
        if physical:
            self.physical.clear()

    def drop_gpa(self, gpa: int) -> None:
        """An EPT violation invalidates what would translate its address (Vol. 3C, 29.4.3.1)."""
        for base, size in list(self.physical):
            if base == gpa & -size:
                del self.physical[base, size]
