"""Suites that use the plugin, run by pytester."""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest

import vmxlab

# The Hypothesis plugin is of no use in these suites, and slow to start.
PLAIN = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")


class Suite:
    """A suite in a folder of its own. `temporary` is where its temporary files go: empty at first."""

    def __init__(self, pytester, temporary):
        self._pytester = pytester
        self.path = pytester.path
        self.temporary = temporary

    def write(self, text, name="test_it", *, imports=True):
        """Write a file of tests (or the conftest)."""
        head = "import pytest\nfrom vmxlab import *\nfrom vmxlab.sdm.fields import Field\n" if imports else ""
        self._pytester.makepyfile(**{name: head + text})

    def run(self, *arguments, engine="bochs"):
        """Run it in this process; `engine` None leaves the choice to the plugin."""
        named = ["--vmx-engine", engine] if engine is not None else []
        return self._pytester.runpytest_inprocess(*PLAIN, *named, *arguments, no_reraise_ctrlc=True)

    def run_workers(self, *arguments):
        """Run it in two workers of pytest-xdist: three Pythons that start, so better once for many tests."""
        pytest.importorskip("xdist")
        command = [sys.executable, "-m", "pytest", *PLAIN, "-n", "2", "--vmx-engine", "bochs"]
        return self._pytester.run(*command, *arguments, timeout=100)

    def log_folders(self):
        """The folders of logs that the plugin made by itself."""
        return sorted(self.temporary.glob("vmxlab-logs-*"))


@pytest.fixture(scope="session")
def whole_package():
    """pytester drops the modules that a suite in this process imported: half a package would be left."""
    for module in pkgutil.walk_packages(vmxlab.__path__, "vmxlab."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)


@pytest.fixture
def suite(pytester, monkeypatch, whole_package):
    """A suite. No log folder of it must be left but where a test says so."""
    temporary = pytester.path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST", "GITHUB_"))]:
        monkeypatch.delenv(name)
    return Suite(pytester, temporary)


README = Path(__file__).resolve().parents[2] / "README.md"

BOCHS_ID = r"\[bochs-[\w.]+-corei7_skylake_x\]"
