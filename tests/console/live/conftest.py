"""One machine of Bochs for the tests of a file; each test begins with it set up anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmxlab import Lab, LiveMachine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder: Path = tmp_path_factory.mktemp("logs")
    with Lab("bochs", log_dir=folder) as made:
        yield made


@pytest.fixture
def vm(lab: Lab) -> Iterator[LiveMachine]:
    with lab.live() as made:
        yield made
