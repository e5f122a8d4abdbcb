"""`vmxlab caps`: the capability MSRs of an engine's processor."""

from __future__ import annotations

from vmxlab.cli import main
from vmxlab.reports.caps_file import CapsFile
from vmxlab.sdm.controls import SecondaryControls


def test_every_control_is_shown_by_name(vmxlab_cli) -> None:
    result = vmxlab_cli("caps", "--engine", "bochs")
    assert result.status == 0
    assert "IA32_VMX_BASIC = 0x" in result.out
    settings = {
        line.split()[1]: line.split()[2:] for line in result.out.splitlines() if len(line.split()) > 2
    }
    assert settings["ENABLE_EPT"] == ["free"]
    assert settings["ENABLE_PCONFIG"] == ["fixed", "0"]
    assert settings["NE"] == ["fixed", "1"]


def test_a_poorer_model_has_less(vmxlab_cli) -> None:
    text = vmxlab_cli("caps", "--engine", "bochs", "--model", "core2_penryn_t9600", "--json").out
    assert not CapsFile.from_json(text).capabilities.supports(SecondaryControls.ENABLE_EPT)


def test_json_is_a_file_for_caps_and_always_the_same(vmxlab_cli) -> None:
    first, second = (vmxlab_cli("caps", "--engine", "bochs", "--json") for _ in range(2))
    assert first.out == second.out
    found = CapsFile.from_json(first.out)
    assert found.engine["name"] == "bochs"
    assert found.physical_address_width == 40
    assert found.capabilities.supports(SecondaryControls.ENABLE_EPT)


def test_without_vmx_it_is_a_skip_that_names_the_bit(vmxlab_cli) -> None:
    result = vmxlab_cli("caps", "--engine", "tcg")
    assert result.status == 0
    assert "SKIP: the processor has no VMX (CPUID.1:ECX.VMX[5] is 0)" in result.err
    assert "tcg" in result.out


def test_without_vmx_the_json_has_no_msrs(vmxlab_cli) -> None:
    result = vmxlab_cli("caps", "--engine", "tcg", "--json")
    assert result.json["msrs"] == {}
    assert "SKIP" in result.err


def test_unknown_commands_and_help_have_the_usual_status(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["nonsense"]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "vmxlab" in capsys.readouterr().out


def test_two_processors_differ_by_name(vmxlab_cli) -> None:
    result = vmxlab_cli("caps", "--diff", "corei7_skylake_x", "--diff", "corei7_icelake_u")
    assert result.status == 1
    rows = [line.split() for line in result.out.splitlines()]
    assert ["IA32_VMX_PROCBASED_CTLS", "MONITOR_TRAP_FLAG", "fixed", "0", "free"] in rows
    assert ["IA32_VMX_BASIC", "revision_id", "0x2b", "4"] in rows
    assert not any("HLT_EXITING" in row for row in rows)


def test_engine_is_compared_with_a_file(vmxlab_cli, tmp_path) -> None:
    same = tmp_path / "same.json"
    same.write_text(vmxlab_cli("caps", "--engine", "bochs", "--json").out)
    result = vmxlab_cli("caps", "--engine", "bochs", "--diff", str(same))
    assert result.status == 0
    assert "the same VMX capabilities" in result.err
    other = vmxlab_cli("caps", "--engine", "bochs", "--diff", "core2_penryn_t9600", "--json")
    assert other.status == 1
    assert {
        "msr": "IA32_VMX_PROCBASED_CTLS2",
        "what": "ENABLE_EPT",
        "first": "free",
        "second": "fixed 0",
    } in other.json


def test_what_is_compared_must_be_a_file_or_a_model(vmxlab_cli) -> None:
    result = vmxlab_cli("caps", "--diff", "i8086", "--diff", "corei7_skylake_x")
    assert result.status == 2
    assert "no such file, and no known model" in result.err
