"""`vmxlab doctor`: which engines run here, and what each missing one needs."""

from __future__ import annotations

import pytest

from vmxlab.engines.bochs import BochsEngine


def test_every_engine_and_part_is_listed(vmxlab_cli) -> None:
    result = vmxlab_cli("doctor")
    assert result.status == 0
    first = [line.split()[0] for line in result.out.splitlines() if line]
    for name in ("kvm", "bochs", "tcg", "monitor", "as"):
        assert name in first
    assert "corei7_icelake_u" in result.out


def test_as_json_it_has_all_models_and_which_engines_have_vmx(vmxlab_cli) -> None:
    shown = vmxlab_cli("doctor", "--json").json
    engines = {engine["engine"]: engine for engine in shown["engines"]}
    assert "corei7_skylake_x" in engines["bochs"]["models"]
    assert engines["tcg"]["vmx"] is False
    assert "bochs" in shown["vmx_engines"]
    assert "tcg" not in shown["vmx_engines"]
    assert [part["part"] for part in shown["parts"]] == ["monitor", "as", "carrier"]


def test_without_an_engine_with_vmx_the_status_is_3_and_says_what_to_do(
    vmxlab_cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    result = vmxlab_cli("doctor")
    assert result.status == 3
    assert "No engine with VMX runs here" in result.out
    assert "what to do: on Debian or Ubuntu: apt-get install bochs" in result.out
    assert "as: apt-get install binutils" in result.out


def test_a_monitor_that_is_not_built_is_told(vmxlab_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmxlab.image.monitor._PLACES", ())
    assert "monitor: build it with" in vmxlab_cli("doctor").out


def test_an_engine_that_does_not_run_claims_nothing(vmxlab_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    row = next(e for e in vmxlab_cli("doctor", "--json").json["engines"] if e["engine"] == BochsEngine.name)
    assert (row["runs"], row["vmx"], row["models"]) == (False, None, [])
