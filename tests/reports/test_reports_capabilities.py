"""Capability MSRs as tables: every field and every control of the SDM, with what this processor says."""

from __future__ import annotations

from typing import Any

import pytest

from vmxlab.errors import MissingCapability
from vmxlab.reports.capabilities import (
    FIXED_0,
    FIXED_1,
    FREE,
    capability_tables,
    control_table,
    setting,
    spans,
)
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.msrs import Msr
from vmxlab.structures.capabilities import Capabilities
from vmxlab.structures.control_capability import ControlCapability


def rows_by(key: str, rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {row[key]: row for row in rows}


@pytest.mark.parametrize("controls", ControlSet, ids=lambda c: c.name)
def test_every_control_is_listed_once_with_its_bit(skylake: Capabilities, controls: ControlSet) -> None:
    rows = [row for row in control_table(skylake, controls).json_rows() if row["bit"] != ""]
    assert [(row["bit"], row["control"]) for row in rows] == sorted(
        (int(flag).bit_length() - 1, flag.name) for flag in controls.flags
    )


@pytest.mark.parametrize(
    ("controls", "name", "state"),
    [
        (ControlSet.PIN, "PROCESS_POSTED_INTERRUPTS", FIXED_0),
        (ControlSet.PIN, "NMI_EXITING", FREE),
        (ControlSet.PRIMARY, "CR3_LOAD_EXITING", FREE),
        (ControlSet.SECONDARY, "ENABLE_EPT", FREE),
        (ControlSet.SECONDARY, "ENABLE_PCONFIG", FIXED_0),
        (ControlSet.TERTIARY, "ENABLE_HLAT", FIXED_0),
    ],
)
def test_a_control_is_fixed_or_free(
    skylake: Capabilities, controls: ControlSet, name: str, state: str
) -> None:
    assert rows_by("control", control_table(skylake, controls).json_rows())[name]["setting"] == state


def test_without_the_true_msrs_a_default1_control_is_fixed_to_1(skylake: Capabilities) -> None:
    raw = dict(skylake.raw)
    raw[Msr.IA32_VMX_BASIC] &= ~(1 << 55)
    table = control_table(Capabilities(raw), ControlSet.PRIMARY)
    assert rows_by("control", table.json_rows())["CR3_LOAD_EXITING"]["setting"] == FIXED_1
    assert table.title.endswith("IA32_VMX_PROCBASED_CTLS = 0xf7f9fffe0401e172")


def test_reserved_bits_that_must_be_1_share_a_row(skylake: Capabilities) -> None:
    rows = control_table(skylake, ControlSet.PIN).json_rows()
    assert rows[-1] == {"bit": "", "control": "bits 1-2, 4 (reserved)", "setting": FIXED_1}


def test_a_set_that_the_processor_lacks_says_so(skylake: Capabilities) -> None:
    table = control_table(skylake, ControlSet.TERTIARY)
    assert "this processor has none of them" in table.title
    assert {row["setting"] for row in table.json_rows()} == {FIXED_0}


@pytest.mark.parametrize(("bit", "state"), [(0, FIXED_1), (1, FREE), (2, FIXED_0)])
def test_the_setting_of_a_bit(bit: int, state: str) -> None:
    assert setting(ControlCapability(0b001, 0b011), bit) == state


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([1, 2, 4], "1-2, 4"), ([0, 1, 2, 5, 6, 9], "0-2, 5-6, 9")]
)
def test_neighbouring_bits_are_written_as_a_range(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_every_msr_that_was_read_is_shown_in_one_table(skylake: Capabilities) -> None:
    text = "\n".join(line for table in capability_tables(skylake) for line in table.plain())
    for msr, value in skylake.raw.items():
        shown = f"{value:#x}" if Msr(msr).name.startswith("IA32_VMX_CR") else f"{value:#018x}"
        assert shown in text, Msr(msr).name


def test_fields_of_vmx_basic_with_their_values(skylake: Capabilities) -> None:
    table = capability_tables(skylake)[0]
    fields = rows_by("field", table.json_rows())
    assert table.title == "IA32_VMX_BASIC = 0x00d810000000002b"
    assert (fields["revision_id"]["bits"], fields["revision_id"]["value"]) == ("30:0", "0x2b")
    assert (fields["vmx_flex_controls"]["bits"], fields["vmx_flex_controls"]["value"]) == ("55", True)
    assert fields["is_32bit_address"]["value"] is False


def test_bits_that_the_manual_does_not_define_are_not_hidden(skylake: Capabilities) -> None:
    raw = {**skylake.raw, Msr.IA32_VMX_BASIC: skylake.raw[Msr.IA32_VMX_BASIC] | 1 << 63}
    fields = rows_by("field", capability_tables(Capabilities(raw))[0].json_rows())
    assert fields["(undefined)"]["value"] == f"{1 << 63:#x}"


def test_a_processor_without_vmx_has_no_tables() -> None:
    with pytest.raises(MissingCapability, match="VMX"):
        capability_tables(Capabilities({}))
