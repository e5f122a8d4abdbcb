"""What several folders of tests share: the capability MSRs of real sets of processors.

`processors.json` holds what `vmxlab caps --json` read on models of Bochs 2.7. Two more are made of them: one
as the first processors with VMX were (no TRUE MSRs, no secondary controls), and one with all the sets of
controls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pytest

from vmxlab import Capabilities

pytest_plugins = ["pytester"]

_TRUE_MSRS = range(0x48D, 0x491)


def _load() -> Mapping[str, Capabilities]:
    texts = json.loads((Path(__file__).parent / "processors.json").read_text())
    processors = {name: Capabilities.from_dict(msrs) for name, msrs in texts.items()}
    first = {msr: value for msr, value in processors["penryn"].raw.items() if msr not in _TRUE_MSRS}
    del first[0x48B]
    first[0x480] &= ~(1 << 55)  # no TRUE MSRs: the default1 class is forced to 1 (SDM Vol. 3D, A.2)
    first[0x482] &= ~(1 << 63)  # "activate secondary controls" may not be 1
    every = dict(processors["icelake"].raw)
    every[0x482] |= 1 << (32 + 17)  # "activate tertiary controls" (A.3.2)
    every[0x48E] |= 1 << (32 + 17)
    every[0x483] |= 1 << 63  # "activate secondary VM-exit controls" (A.4.1)
    every[0x48F] |= 1 << 63
    every[0x492] = 0x8000_0000_0000_001F
    every[0x493] = 0x0000_0000_0000_0009
    return MappingProxyType(
        {**processors, "first_vmx": Capabilities(first), "every_set": Capabilities(every)}
    )


_PROCESSORS = _load()


@pytest.fixture(scope="session")
def processors() -> Mapping[str, Capabilities]:
    """Capabilities by name: penryn has no EPT, lynnfield no "unrestricted guest", skylake nearly all."""
    return _PROCESSORS


@pytest.fixture(params=sorted(_PROCESSORS))
def processor(request: pytest.FixtureRequest) -> Capabilities:
    """Each of them in turn."""
    return _PROCESSORS[request.param]


@dataclass(frozen=True)
class Page:
    """A page that paging structures map: `entry` is the last entry of the walk without its address."""

    linear: int
    bytes: int
    physical: int
    entry: int


class PageWalker:
    """An independent walk of paging structures in memory, by SDM Vol. 3A, 5.3 and 5.5, and Vol. 3C, 29.3.2.

    `read(address)` gives the 4096 bytes of a page of memory. Nothing of the package is used.
    """

    PRESENT = 0x1
    PRESENT_IN_EPT = 0x7

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def pages(
        self, root: int, *, levels: int = 4, entry_bytes: int = 8, present: int = PRESENT
    ) -> list[Page]:
        """Every page mapped from the table at `root`, in order of the addresses."""
        index_bits = 12 - entry_bytes.bit_length() + 1
        content = self._read(root)
        found: list[Page] = []
        for index in range(1 << index_bits):
            entry = int.from_bytes(content[index * entry_bytes :][:entry_bytes], "little")
            if not entry & present:
                continue
            shift = 12 + (levels - 1) * index_bits
            address = entry & ((1 << 52 if entry_bytes == 8 else 1 << 32) - 0x1000)
            if levels == 1 or entry & 0x80:
                found.append(Page(index << shift, 1 << shift, address >> shift << shift, entry & 0xFFF))
                continue
            below = self.pages(address, levels=levels - 1, entry_bytes=entry_bytes, present=present)
            found += [replace(page, linear=page.linear + (index << shift)) for page in below]
        return found


@pytest.fixture
def page_walker() -> type[PageWalker]:
    """The class: `page_walker(read).pages(root)`."""
    return PageWalker
