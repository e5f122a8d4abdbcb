"""Processors by name: the capability MSRs of the models that Bochs 2.7 has, as they were read there.

For checks that need a processor and no machine, such as `vmxlab check --model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

from vmxlab.errors import CaseError
from vmxlab.structures.capabilities import Capabilities


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor: its capability MSRs and its MAXPHYADDR in bits."""

    name: str
    capabilities: Capabilities
    physical_address_width: int


@lru_cache(maxsize=1)
def known_processors() -> Mapping[str, Processor]:
    """All that are known, by name."""
    text = files(__package__).joinpath("processors.json").read_text(encoding="utf-8")
    return MappingProxyType(
        {
            name: Processor(name, Capabilities.from_dict(about["msrs"]), about["physical_address_width"])
            for name, about in json.loads(text)["processors"].items()
        }
    )


def named_processor(name: str) -> Processor:
    """The processor of that name. Raises CaseError where none is known by it."""
    found = known_processors().get(name)
    if found is None:
        raise CaseError(
            f"no processor model {name!r} is known", advice=f"known are {', '.join(known_processors())}"
        )
    return found
