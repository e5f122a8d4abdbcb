"""What several folders of tests share: the capability MSRs of real sets of processors.

Some of the known processors (`vmxlab.structures.processors`) under short names, and two more that are made
of them: one as the first processors with VMX were (no TRUE MSRs, no secondary controls), and one with all the
sets of controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest

from vmxlab import Capabilities
from vmxlab.structures.processors import named_processor

from .generated import pytest_addoption, pytest_terminal_summary  # noqa: F401
from .scheduling import beyond_the_core, place_of, unit_of

pytest_plugins = ["pytester"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where no engine is named, a test with many parameters runs with a few on kvm-in-bochs."""
    if config.option.vmx_engine is not None:
        return
    left_out = beyond_the_core(item.nodeid for item in items)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where no engine is named, the tests on kvm-in-bochs share one carrier."""
    if config.option.vmx_engine is not None or config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OneCarrier(LoadScopeScheduling):
        """Asks for the unit of a test, and hands the next unit to a worker."""

        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            self.workqueue.move_to_end(min(self.workqueue, key=place_of), last=False)
            super()._assign_work_unit(node)

    return OneCarrier(config, log)


_TRUE_MSRS = range(0x48D, 0x491)
_MODELS = {
    "penryn": "core2_penryn_t9600",
    "lynnfield": "corei5_lynnfield_750",
    "sandy_bridge": "corei7_sandy_bridge_2600k",
    "haswell": "corei7_haswell_4770",
    "skylake": "corei7_skylake_x",
    "icelake": "corei7_icelake_u",
}


def _load() -> Mapping[str, Capabilities]:
    processors = {name: named_processor(model).capabilities for name, model in _MODELS.items()}
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
