"""The file of a processor's capabilities: written, read, and put together with another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmxlab.engines.base import EngineInfo
from vmxlab.errors import CaseError
from vmxlab.reports.caps_file import CapsFile, read_caps_file
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.capabilities import Capabilities

INFO = EngineInfo("bochs", "2.7", "corei7_skylake_x", "auto: kvm can't run here")


def test_what_is_written_is_read_back(skylake: Capabilities) -> None:
    written = CapsFile.of(skylake, 40, INFO)
    assert CapsFile.from_json(written.to_json()) == written


def test_the_text_depends_on_the_processor_alone(skylake: Capabilities) -> None:
    other_choice = EngineInfo("bochs", "2.7", "corei7_skylake_x", "named by --engine")
    again = Capabilities(dict(reversed(skylake.raw.items())))
    assert CapsFile.of(skylake, 40, INFO).to_json() == CapsFile.of(again, 40, other_choice).to_json()


def test_the_msrs_stand_there_as_capabilities_write_them(skylake: Capabilities) -> None:
    values = json.loads(CapsFile.of(skylake, 40, INFO).to_json())
    assert Capabilities.from_dict(values["msrs"]) == skylake
    assert values["engine"] == {"name": "bochs", "version": "2.7", "model": "corei7_skylake_x"}
    assert values["physical_address_width"] == 40


def test_a_file_of_msrs_alone_is_read_too(skylake: Capabilities) -> None:
    found = CapsFile.from_json(skylake.to_json())
    assert found.capabilities == skylake
    assert found.physical_address_width == 52


def test_an_intersection_is_what_both_can_do(skylake: Capabilities) -> None:
    raw = {**skylake.raw, Msr.IA32_VMX_BASIC: skylake.raw[Msr.IA32_VMX_BASIC] & ~0x7FFF_FFFF | 4}
    raw[Msr.IA32_VMX_EPT_VPID_CAP] &= ~1
    both = CapsFile(skylake, 46).intersection(CapsFile(Capabilities(raw), 39))
    assert both.physical_address_width == 39
    assert not both.capabilities.ept_vpid.execute_only
    assert both.capabilities.ept_vpid.page_walk_length_4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON"),
        ("[]", "no JSON object"),
        ('{"msrs": []}', "'msrs' is no JSON object"),
        ('{"msrs": {"NONSENSE": "0x1"}}', "NONSENSE"),
        ('{"msrs": {"IA32_VMX_BASIC": 4}}', "IA32_VMX_BASIC"),
        ('{"msrs": {}, "physical_address_width": 99}', "physical_address_width is 99"),
        ('{"msrs": {}, "physical_address_width": "40"}', "physical_address_width is '40'"),
    ],
)
def test_a_text_that_is_no_such_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "caps.json"
    path.write_text(text)
    with pytest.raises(CaseError, match=r"caps\.json") as caught:
        read_caps_file(path)
    assert problem in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="can't be read"):
        read_caps_file(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaseError, match="is no text"):
        read_caps_file(tmp_path / "binary")


def test_no_case_can_be_made_for_a_processor_without_vmx(tmp_path: Path) -> None:
    path = tmp_path / "amd.json"
    path.write_text(CapsFile.of(Capabilities({}), 40, INFO).to_json())
    with pytest.raises(CaseError, match="without VMX"):
        read_caps_file(path)
