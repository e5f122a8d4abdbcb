"""The package's shape: what importing it costs, what it offers, and which way imports run."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vmxlab

PACKAGE = Path(vmxlab.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

NAMES = {".".join(("vmxlab", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in MODULES}

# Each layer may import itself and those before it. Where two stand on one step, only the later may import the
# earlier one: the console knows engines, an engine knows no console.
LAYERS = ("sdm", "structures", "cases", "image", "oracle", "engines", "console", "reports", "cli")
TOP = ("pytest_plugin", "demo", "__init__", "__main__")
EVERYWHERE = ("errors",)

HEAVY = {"pexpect", "rich", "click", "elftools", "qemu", "asyncio", "iced_x86", "platformdirs", "bitarray"}


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


# --- what an import costs -----------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import vmxlab") & HEAVY == set()


def test_naming_a_case_needs_no_engine_no_console_and_no_terminal():
    loaded = loaded_after("from vmxlab import Case, ExitReason, IOBitmap, on; Case(io_bitmap=IOBitmap())")
    assert loaded & (HEAVY - {"bitarray"}) == set()


def test_the_commands_start_without_the_things_only_some_of_them_need():
    assert loaded_after("import vmxlab.cli") & {"elftools", "qemu", "asyncio", "iced_x86"} == set()


def test_the_pytest_plugin_is_light_for_suites_that_do_not_use_it():
    """It is loaded into every pytest of an environment where the package is installed."""
    loaded = loaded_after("import pytest, sys; before = set(sys.modules); import vmxlab.pytest_plugin")
    assert loaded & {"pexpect", "elftools", "qemu", "iced_x86", "click", "bitarray"} == set()


# --- what it offers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vmxlab.__all__)
def test_every_public_name_is_there(name):
    value = getattr(vmxlab, name)
    assert name in dir(vmxlab)
    assert getattr(value, "__name__", name) == name
    assert value.__doc__


def test_the_lazy_names_are_the_public_ones_and_those_mypy_sees():
    typed = {
        alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmxlab.")
        for alias in node.names
    }
    assert set(vmxlab.__all__) == set(vmxlab._HOMES) == typed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Cse'"):
        _ = vmxlab.Cse


# --- which way imports run ----------------------------------------------------------------------------------


def layer_of(path: Path) -> str:
    """The part of the package that a file belongs to: a folder, or a module beside them."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST, *, in_functions: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of the package's own modules, but those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from imports_of(other, in_functions=in_functions)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "vmxlab")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            if node.module == "vmxlab":
                yield from ((node.lineno, f"vmxlab.{alias.name}") for alias in node.names)
            elif (node.module or "").startswith("vmxlab."):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield node.lineno, inner if inner in NAMES else node.module
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_of(node, in_functions=in_functions)


def imported_layer(name: str) -> str:
    """The layer of `vmxlab.x...`: where a public name of the package comes from is where its module lies."""
    part = name.split(".")[1]
    return vmxlab._HOMES[part].split(".")[0] if part in vmxlab._HOMES else part


def wrong_way(path: Path, source: str) -> list[str]:
    """The imports of a file that run upward."""
    here = layer_of(path)
    if here in TOP:
        return []
    allowed = {*EVERYWHERE}
    if here in LAYERS:
        allowed |= {*LAYERS[: LAYERS.index(here) + 1], "__version__"}
    return [
        f"{path.relative_to(PACKAGE)}:{line}: {here} imports {name}"
        for line, name in imports_of(ast.parse(source))
        if imported_layer(name) not in allowed and not (here == "cli" and imported_layer(name) in TOP)
    ]


def test_every_part_of_the_package_has_its_layer():
    assert {layer_of(path) for path in MODULES} <= {*LAYERS, *TOP, *EVERYWHERE}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward_only(path):
    assert wrong_way(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("sdm/x.py", "from vmxlab.structures import Ept"),
        ("sdm/x.py", "def f():\n    import vmxlab.cli"),
        ("structures/x.py", "from vmxlab import Case"),
        ("structures/x.py", "from vmxlab import cases"),
        ("cases/x.py", "try:\n    pass\nexcept OSError:\n    from vmxlab.image import layout"),
        ("image/x.py", "class A:\n    from vmxlab.engines import base"),
        ("engines/x.py", "from vmxlab.console.records import Record"),
        ("console/x.py", "import os, vmxlab.reports.tables"),
        ("errors.py", "from vmxlab.sdm.fields import Field"),
    ],
)
def test_an_import_that_runs_upward_is_found_wherever_it_stands(where, source):
    assert len(wrong_way(PACKAGE / where, source)) == 1


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("sdm/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vmxlab import Case"),
        ("console/x.py", "from vmxlab.engines.base import Machine"),
        ("image/x.py", "from vmxlab.cases.case import Case\nfrom vmxlab.errors import CaseError"),
        ("cli/x.py", "from vmxlab import Field, demo"),
    ],
)
def test_an_import_that_runs_downward_is_not(where, source):
    assert wrong_way(PACKAGE / where, source) == []


def test_every_module_can_be_imported_by_itself_and_says_what_it_is():
    for info in pkgutil.walk_packages([str(PACKAGE)], "vmxlab."):
        if not info.name.endswith("__main__"):
            assert importlib.import_module(info.name).__doc__, info.name


def test_no_import_runs_in_a_circle_whichever_module_comes_first():
    """Imports inside of functions aside: they run when all modules are there."""
    graph = {}
    for path in MODULES:
        parts = ("vmxlab", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = {target for _, target in imports_of(ast.parse(path.read_text()), in_functions=False)}
    assert list(TopologicalSorter(graph).static_order())
