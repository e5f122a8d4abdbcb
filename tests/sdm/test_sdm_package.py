"""The package as a whole: names, cheap import, one edition."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vmxlab.sdm
import vmxlab.sdm.qualifications


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "package", [vmxlab.sdm, vmxlab.sdm.qualifications], ids=lambda package: package.__name__
)
def test_every_name_a_package_promises_is_there(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Fields'"):
        _ = vmxlab.sdm.Fields


def test_importing_the_package_loads_none_of_its_modules() -> None:
    assert not {name for name in modules_after("import vmxlab.sdm") if name.startswith("vmxlab.sdm.")}


def test_a_name_loads_only_what_it_needs() -> None:
    loaded = modules_after("from vmxlab.sdm import ExitReason")
    assert {name for name in loaded if name.startswith("vmxlab.sdm.")} == {"vmxlab.sdm.exit_reasons"}


def test_the_types_of_qualifications_wait_for_the_first_one() -> None:
    loaded = modules_after("from vmxlab.sdm.qualifications import decode_qualification")
    assert "vmxlab.sdm.qualifications.dispatch" not in loaded


def test_the_edition_is_stated() -> None:
    assert "325462-083US" in vmxlab.sdm.EDITION
