"""`vmxlab check`: the broken rules of a VMCS, and the exit status that a script needs."""

from __future__ import annotations

import json

import pytest

from vmxlab import Case, Field
from vmxlab.image.compiler import Target, compile_case
from vmxlab.image.monitor import load_monitor
from vmxlab.structures.processors import named_processor

MODEL = "corei7_skylake_x"


def vmcs(**changes: int) -> str:
    processor = named_processor(MODEL)
    target = Target(processor.capabilities, load_monitor(), 1 << 27, processor.physical_address_width)
    fields = {field.name: value for field, value in compile_case(Case(), target).fields.items()}
    return json.dumps({name: f"{value:#x}" for name, value in (fields | changes).items()}, indent=1)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "vmcs.json") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_valid_vmcs_enters(vmxlab_cli, write):
    result = vmxlab_cli("check", write(vmcs()), "--model", MODEL)
    assert result.status == 0
    assert "0 broken: the VM entry takes place" in result.out


def test_each_broken_rule_is_printed_with_its_section_and_values(vmxlab_cli, write):
    result = vmxlab_cli("check", write(vmcs(GUEST_RFLAGS=0, GUEST_TR_ACCESS_RIGHTS=0x89)), "--model", MODEL)
    assert result.status == 1
    assert "2 broken: VM-entry failure, exit reason 33" in result.out
    for words in ("guest-rflags-reserved", "27.3.1.4", "GUEST_RFLAGS 0x0", "guest-tr-type", "27.3.1.2"):
        assert words in result.out


def test_json_has_rules_values_and_what_was_not_checked(vmxlab_cli, write):
    text = json.loads(vmcs(HOST_TR_SELECTOR=0))
    del text["VMCS_LINK_POINTER"]
    result = vmxlab_cli("check", write(json.dumps(text)), "--model", MODEL, "--json")
    assert result.status == 1
    (found,) = result.json
    assert [row["rule"] for row in found["broken"]] == ["host-tr-is-not-null"]
    assert {row["why"] for row in found["not_checked"]} == {"VMCS_LINK_POINTER is missing"}
    assert found["fields"]["HOST_TR_SELECTOR"] == "0x0"


def test_verdict_is_about_the_processor_that_is_named(vmxlab_cli, write):
    path = write(vmcs())
    assert vmxlab_cli("check", path, "--model", "corei7_icelake_u").status == 0
    assert vmxlab_cli("check", path, "--model", "core2_penryn_t9600").status == 1  # no EPT


def test_capabilities_come_from_a_file_too(vmxlab_cli, write):
    processor = named_processor(MODEL)
    caps = {"physical_address_width": 36, "msrs": processor.capabilities.to_dict()}
    path = write(vmcs(GUEST_CR3=1 << 37))
    assert vmxlab_cli("check", path, "--model", MODEL).status == 0
    assert vmxlab_cli("check", path, "--caps", write(json.dumps(caps), "caps.json")).status == 1
    assert vmxlab_cli("check", path, "--model", MODEL, "--maxphyaddr", "36").status == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--caps FILE"),
        (["--model", "i8086"], "corei7_skylake_x"),
        (["--model", MODEL, "--caps", "caps.json"], "give one of them"),
    ],
    ids=["no-processor", "unknown-model", "both"],
)
def test_usage_is_said(vmxlab_cli, write, arguments, words):
    result = vmxlab_cli("check", write(vmcs()), *arguments)
    assert result.status == 2
    assert words in result.err


@pytest.mark.parametrize("text", ["", "nothing of the sort", "\0" * 100], ids=["empty", "words", "zeros"])
def test_text_that_holds_no_vmcs_is_status_3(vmxlab_cli, write, text):
    result = vmxlab_cli("check", write(text), "--model", MODEL)
    assert result.status == 3
    assert "no VMCS" in result.err
    assert "Traceback" not in result.err


def test_processor_that_can_not_be_the_one_is_said(vmxlab_cli, write):
    path = write(vmcs(GUEST_RFLAGS=0, PIN_BASED_CONTROLS=0xFF, EXIT_REASON=0x8000_0021))
    result = vmxlab_cli("check", path, "--model", MODEL)
    assert "the VMCS itself says VM-entry failure, exit reason 33" in result.out
    (found,) = vmxlab_cli("check", path, "--model", MODEL, "--json").json
    assert found["contradiction"] in result.out


def test_file_that_is_not_there_is_status_3(vmxlab_cli):
    result = vmxlab_cli("check", "not-there.json", "--model", MODEL)
    assert result.status == 3
    assert "not-there.json can't be read" in result.err


def test_log_of_a_run_needs_no_processor_to_be_named(vmxlab_cli, tmp_path):
    case = tmp_path / "case.py"
    case.write_text("from vmxlab import Case\nCASE = Case(fields={'GUEST_RFLAGS': 0}, name='bad-flags')\n")
    logs = tmp_path / "logs"
    vmxlab_cli("run", str(case), "--engine", "bochs", "--log-dir", str(logs))
    (log,) = logs.glob("serial-*.log")
    result = vmxlab_cli("check", str(log))
    assert result.status == 1
    assert "bad-flags: ENTRY_FAILURE_GUEST_STATE, qualification 0" in result.out
    assert "1 broken" in result.out
    assert Field.GUEST_RFLAGS.name in result.out
