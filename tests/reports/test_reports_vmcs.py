"""A VMCS out of the texts that people have: read as far as it goes, each oddity with its line."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from vmxlab import Case, Field
from vmxlab.console.records import encode_record
from vmxlab.errors import CaseError
from vmxlab.image.compiler import Target, compile_case
from vmxlab.image.monitor import load_monitor
from vmxlab.oracle.entry import Environment, check_entry
from vmxlab.reports.vmcs import read_vmcs_text
from vmxlab.structures.processors import named_processor

from .kvm_dump import kvm_dump

SKYLAKE = named_processor("corei7_skylake_x")

PREFIXES = {
    "bare": "",
    "dmesg": "[  673.850218] ",
    "module": "[  673.850218] kvm_intel: ",
    "caller": "[  673.850218][ T4711] kvm_intel: ",
    "old": "[ 6026.560893] kvm [3412]: ",
    "syslog": "Nov 23 10:11:12 some-host kernel: [  673.850218] kvm_intel: ",
    "journal": "2026-11-23T10:11:12.123456+01:00 some-host kernel: kvm_intel: ",
    "level": "<3>[  673.850218] kvm_intel: ",
    "quoted": "> > [28041.075900][T78789] ",
}

FAULTS = {
    Field.GUEST_RFLAGS: (0x0, "guest-rflags-reserved"),
    Field.HOST_TR_SELECTOR: (0x0, "host-tr-is-not-null"),
    Field.GUEST_TR_ACCESS_RIGHTS: (0x89, "guest-tr-type"),
}


@pytest.fixture(scope="module")
def baseline() -> Mapping[Field, int]:
    target = Target(SKYLAKE.capabilities, load_monitor(), 1 << 27, SKYLAKE.physical_address_width)
    return compile_case(Case(), target).fields


@pytest.fixture(scope="module")
def faulty(baseline: Mapping[Field, int]) -> Mapping[Field, int]:
    return {**baseline, **{field: value for field, (value, _) in FAULTS.items()}}


def broken(fields: Mapping[Field, int]) -> set[str]:
    environment = Environment(capabilities=SKYLAKE.capabilities, maxphyaddr=SKYLAKE.physical_address_width)
    return set(check_entry(fields, environment).names)


def one(text: str):
    (found,) = read_vmcs_text(text)
    return found


# --- KVM's dump --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_kvm_dump_with_three_faults_yields_exactly_these_three(faulty, prefix, end):
    found = one("".join(prefix + line + end for line in kvm_dump(faulty)))
    assert found.oddities == ()
    assert {field: value for field, value in found.fields.items() if faulty.get(field, value) != value} == {}
    assert broken(found.fields) == {name for _, name in FAULTS.values()}


def test_kvm_dump_holds_all_of_the_guest_and_host_state_that_kvm_prints(baseline):
    found = one("\n".join(kvm_dump(baseline)))
    segments = [f"GUEST_{name}_BASE" for name in ("CS", "DS", "SS", "ES", "FS", "GS", "LDTR", "TR")]
    assert {Field[name] for name in segments} <= found.fields.keys()
    assert len(found.fields) == 104


def test_two_dumps_in_one_kernel_log_are_two(baseline, faulty):
    lines = [*kvm_dump(baseline, cpu=1), "usb 1-1: new device found", *kvm_dump(faulty, cpu=2)]
    first, second = read_vmcs_text("\n".join(f"[  1.5] {line}" for line in lines))
    assert (first.title, second.title) == ("dump 1, CPU 1", "dump 2, CPU 2")
    assert broken(first.fields) == set()
    assert len(broken(second.fields)) == 3


def test_older_kvm_printed_several_items_in_other_lines(baseline):
    text = "\n".join(kvm_dump(baseline)[1:])
    text = text.replace("CPUBased=0x", "PinBased=0000003f CPUBased=").replace("PinBased=0x0000007f ", "")
    text = text.replace("EFER= ", "EFER =     ").replace("SecondaryExec=0x", "SecondaryExec=")
    found = one(text)
    assert found.fields[Field.PIN_BASED_CONTROLS] == 0x3F
    assert found.fields[Field.GUEST_IA32_EFER] == 0x500


def test_efer_that_no_control_loads_is_no_field(baseline):
    lines = [
        line.replace("EFER= 0x0000000000000500", "EFER= 0x0000000000000501 (effective)")
        for line in kvm_dump(baseline)
    ]
    found = one("\n".join(lines))
    assert Field.GUEST_IA32_EFER not in found.fields


def test_kvm_dump_cut_at_any_byte_is_read_as_far_as_it_goes(baseline):
    text = "\n".join(f"[ 1.5] kvm_intel: {line}" for line in kvm_dump(baseline))
    whole = one(text).fields
    begins = text.index("actual=0x") + 9 + 16
    for end in range(begins, len(text), 7):
        found = one(text[:end])
        assert found.fields.items() <= whole.items()
        assert found.oddities or "*** Control State" in text[:end]


def test_items_that_no_version_has_are_named_with_their_line(baseline):
    lines = kvm_dump(baseline)
    lines.insert(5, "Frobnicator = 0x0000000000000001")
    (oddity,) = one("\n".join(lines)).oddities
    assert oddity.line == 6
    assert "Frobnicator" in oddity.what


# --- names and values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"GUEST_RIP": "0x8000", "GUEST_CR0": 2147483697}',
        '{"fields": {"guest_rip": "0x8000", "0x6800": "0x80000031"}}',
        "GUEST_RIP = 0x8000\nGUEST_CR0 = 0x8000_0031\n",
        "[vmcs]\nGUEST_RIP = 0x8000\nGUEST_CR0 = 2147483697 # paging\n",
        "GUEST_RIP=0x8000\r\nGUEST_CR0=0x80000031\r\n",
        "# a comment\nGUEST_RIP: 0x8000\nGUEST_CR0: 0x80000031\n",
    ],
    ids=["json", "nested-json", "toml", "toml-table", "crlf", "yaml-like"],
)
def test_names_and_values_in_any_of_these_ways(text):
    assert one(text).fields == {Field.GUEST_RIP: 0x8000, Field.GUEST_CR0: 0x8000_0031}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"GUEST_RIP": 1,\n "GUEST_RIPP": 2}', 2, "GUEST_RIPP"),
        ('{"GUEST_RIP": 1,\n "GUEST_RIP": 2}', 2, "was 0x1 in line 1"),
        ('{"GUEST_RIP": 1,\n "GUEST_CS_SELECTOR": "0x12345"}', 2, "too wide"),
        ('{"GUEST_RIP": 1,\n "GUEST_RSP": "much"}', 2, "no number"),
        ('{"GUEST_RIP": 1,\n "GUEST_RSP": "0x7f', 2, "cut off"),
        ('{"GUEST_RIP": 1,\n "GUEST_RSP": 1', 2, "read as far as it goes"),
        ("GUEST_RIP = 1\nGUEST_RSP = = 2\n", 2, "TOML"),
    ],
    ids=["unknown", "twice", "wide", "word", "cut-value", "cut-json", "bad-toml"],
)
def test_each_oddity_is_named_with_its_line(text, line, words):
    found = one(text)
    assert found.fields[Field.GUEST_RIP] == 1
    assert any(oddity.line == line and words in oddity.what for oddity in found.oddities), found.oddities


def test_fields_as_json_break_the_same_rules(faulty):
    text = json.dumps({field.name: hex(value) for field, value in faulty.items()}, indent=1)
    assert broken(one(text).fields) == {name for _, name in FAULTS.values()}


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "hello", "\0\1\2", "{" * 5000, "a = 1\n", "*** Guest State ***"]
)
def test_text_without_a_vmcs_is_refused_in_words(text):
    with pytest.raises(CaseError, match="no VMCS"):
        read_vmcs_text(text)


# --- the monitor's own log ---------------------------------------------------------------------------------


def log_of(fields: Mapping[Field, int]) -> str:
    items = list(fields.items())
    records = [
        encode_record("boot", {"maxphyaddr": SKYLAKE.physical_address_width}),
        encode_record("caps", {f"m{msr:03x}": value for msr, value in SKYLAKE.capabilities.raw.items()}),
        encode_record("case", {"id": 7, "name": "odd"}),
        encode_record("exit", {"n": 0, "reason": 0x80000021, "qual": 4}),
        *(
            encode_record("vmcs", {f"f{int(field):04x}": value for field, value in items[at : at + 24]})
            for at in range(0, len(items), 24)
        ),
        encode_record("end", {"why": "stop"}),
    ]
    return "\r\n".join(records) + "\r\n"


def test_log_of_the_monitor_says_which_case_failed_how_and_on_what(faulty):
    found = one(log_of(faulty))
    assert found.title == "case 7 odd: ENTRY_FAILURE_GUEST_STATE, qualification 4"
    assert found.capabilities == SKYLAKE.capabilities
    assert found.physical_address_width == SKYLAKE.physical_address_width
    assert found.fields == faulty


def test_damaged_record_in_a_log_is_named_and_its_fields_are_missing(faulty):
    lines = log_of(faulty).split("\r\n")
    lines[5] = lines[5].replace("=0x", "=0y", 1)
    found = one("\r\n".join(lines))
    assert len(found.fields) == len(faulty) - 24
    assert [oddity.line for oddity in found.oddities] == [6]


def test_log_without_a_failed_entry_holds_no_vmcs():
    text = "\n".join(line for line in log_of({}).split("\r\n"))
    with pytest.raises(CaseError, match="no VMCS"):
        read_vmcs_text(text)
