"""The commands of the prompt: help, VMX operation, the VMCS, capabilities and MSRs, cases, faults."""

from __future__ import annotations

import re

import pytest

from vmxlab.sdm.controls import EntryControls
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.sdm.msrs import Msr

COMMANDS = (
    *(
        "help",
        "caps",
        "rdmsr",
        "wrmsr",
        "vmxon",
        "vmxoff",
        "vmclear",
        "vmptrld",
        "vmptrst",
        "vmread",
        "vmwrite",
    ),
    *(
        "vmcs",
        "host",
        "state",
        "launch",
        "resume",
        "step",
        "skip",
        "go",
        "exit",
        "reg",
        "decode",
        "mem",
        "code",
    ),
    *("port", "msr", "ept", "cases", "load", "run", "reset", "fault"),
)


@pytest.fixture
def undone(prompt):
    """Out of VMX operation."""
    if "in VMX operation" in prompt("state") and "not in" not in prompt("state"):
        assert prompt("vmclear", "vmxoff") == "VMsucceed\n"
    return prompt


# --- help ---------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_command_and_fits_on_a_terminal(prompt):
    lines = prompt("help").splitlines()
    assert tuple(line.split()[0] for line in lines if line.startswith("  ")) == COMMANDS
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_for_a_command_begins_with_its_usage(prompt, name):
    assert prompt(f"help {name}").startswith(name)
    assert prompt(f"help {name}").splitlines()[0] in re.sub("  +", "  ", prompt("help"))


def test_help_for_no_command_says_so(prompt):
    assert prompt("help nonsense") == "there is no command 'nonsense'; 'help' lists them\n"


@pytest.mark.parametrize(
    "line",
    [
        "caps nonsense",
        "rdmsr IA32_NONSENSE",
        "vmxon 0x",
        "vmxon 1 2",
        "vmxoff 1",
        "vmread",
        "vmread NO_SUCH_FIELD",
        "vmread 0x1ffffffff",
        "vmwrite GUEST_RIP",
        "vmwrite GUEST_RIP x",
        "vmcs A B",
        "launch now",
        "step twice",
        "go 1001",
        "go x",
        "reg xyz",
        "reg rip x",
        "decode",
        "decode NO_SUCH_REASON",
        "mem gpa:",
        "mem u7 0",
        "mem u32 2",
        "mem 0x2000000 =",
        "mem 0x2000000 = 1",
        "mem 0x2000000 = zz",
        "mem u8 0x2000000 = 256",
        "code",
        "code f",
        "code at 0x8000",
        "port",
        "port 0x60",
        "port 0x10000 on",
        "port 2-1 on",
        "port 1 maybe",
        "msr",
        "msr IA32_EFER on",
        "msr IA32_EFER q on",
        "ept",
        "ept nonsense",
        "ept map 0",
        "ept map 0x123 0",
        "ept map 0 0x123",
        "ept map 0 0 1m",
        "ept map 0x1000 0 2m",
        "ept map 0x1000000000000 0",
        "ept unmap",
        "ept unmap 0x123",
        "ept new now",
        "load 1 2",
        "run 3",
        "fault xy",
    ],
)
def test_wrong_operands_are_answered_with_the_usage(prompt, line):
    prompt("load")
    assert f"usage: {line.split()[0]}" in prompt(line)


# --- VMX operation ------------------------------------------------------------------------------------------


def test_vmx_operation_by_hand_in_the_monitors_own_regions(undone):
    prompt = undone
    revision = prompt.session.capabilities.basic.revision_id
    assert prompt("state") == "not in VMX operation\n"
    assert re.fullmatch(r"vmxon 0x1000000: (revision identifier \S+ written, )?VMsucceed\n", prompt("vmxon"))
    assert prompt("state") == "in VMX operation, no current VMCS\n"
    assert prompt("vmread GUEST_RIP").startswith(
        "VMREAD of GUEST_RIP (0x681e): VMfailInvalid: no current VMCS"
    )
    prompt("mem u32 0x1001000 = 0")
    assert prompt("vmclear") == f"vmclear 0x1001000: revision identifier {revision:#x} written, VMsucceed\n"
    assert prompt("vmptrld") == "vmptrld 0x1001000: VMsucceed\n"
    assert prompt("vmptrst") == "0x1001000: VMsucceed\n"
    assert prompt("state") == "in VMX operation, current VMCS 0x1001000\n"
    assert prompt("vmxon 0x1000000") == "VMfailValid(15: VMXON executed in VMX root operation)\n"
    assert prompt("vmptrld 0x1000000") == "VMfailValid(10: VMPTRLD with the VMXON pointer)\n"
    assert prompt("vmxoff") == "VMsucceed\n"
    assert prompt("vmxoff") == (
        "fault: #UD (6), error code 0x0: not in VMX operation; 'vmxon' first, or 'load'\n"
    )


def test_a_region_with_an_address_is_taken_as_it_is(undone):
    """SDM Vol. 3C, 25.11.5: VMPTRLD of a region with another revision identifier fails."""
    prompt = undone
    prompt("vmxon", "vmclear", "vmptrld", "mem u32 0x2000000 = 0x12345678")
    assert prompt("vmptrld 0x2000000") == (
        "VMfailValid(11: VMPTRLD with an incorrect VMCS revision identifier)\n"
    )

    assert "12345678" in prompt("mem u32 0x2000000 1")


# --- the VMCS -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GUEST_RIP", "guest_rip", "0x681e", "26654", "guest_ri"])
def test_a_field_has_many_names(prompt, name):
    prompt("load", f"vmwrite {name} 0x1234")
    assert prompt(f"vmread {name}") == "GUEST_RIP (0x681e) = 0x1234\n"


def test_a_part_of_a_name_that_only_one_field_has_is_that_field(prompt):
    prompt("load")
    assert prompt("vmread link_p").startswith("VMCS_LINK_POINTER (0x2800) = 0xffffffffffffffff")


def test_a_part_of_several_names_lists_them(prompt):
    answer = prompt("vmread guest_es")
    fields = [field.name for field in Field if field.name.startswith("GUEST_ES")]
    assert answer.splitlines()[:-1] == [
        "'guest_es' is more than one VMCS field:",
        *(f"  {name}" for name in fields),
    ]


def test_a_long_list_of_names_says_how_many_more_there_are(prompt):
    answer = prompt("vmread guest")
    fields = [field for field in Field if field.name.startswith("GUEST")]
    assert f"  and {len(fields) - 24} more\n" in answer


def test_controls_are_shown_by_name(prompt):
    prompt("load")
    value, *names = prompt("vmread ENTRY_CONTROLS").split("\n  ")
    bits = EntryControls(int(value.rpartition(" = ")[2], 16))
    assert [name.strip() for name in names] == [flag.name for flag in EntryControls if flag in bits]


def test_an_unsupported_field_is_an_error_by_name(prompt):
    prompt("load")
    what = "VMfailValid(12: VMREAD or VMWRITE of a VMCS component that is not supported)"
    assert prompt("vmread 0x6ffe") == f"VMREAD of a field without name (0x6ffe): {what}\n"
    assert prompt("vmwrite HLAT_POINTER 1") == f"VMWRITE of HLAT_POINTER (0x2040): {what}\n"


def test_all_fields_of_the_baseline_are_listed_with_what_was_written(prompt):
    """By the names and the values that Python compiled."""
    prompt("load")
    shown = {}
    for line in prompt("vmcs").splitlines():
        encoding, name, value = line.split()
        assert Field(int(encoding, 16)).name == name
        shown[Field[name]] = int(value, 16)
    assert {field: shown.get(field) for field in prompt.cases[0].fields} == dict(prompt.cases[0].fields)


def test_some_fields_by_a_part_of_their_names(prompt):
    prompt("load")
    assert [line.split()[1] for line in prompt("vmcs cr3_target_c").splitlines()] == ["CR3_TARGET_COUNT"]
    assert prompt("vmcs nonsense") == "no field of this VMCS has 'nonsense' in its name\n"


def test_a_vmcs_made_by_hand_from_nothing_enters(undone):
    """Every VMWRITE typed; the host-state area by one command. L2's memory is what a case left."""
    prompt = undone
    prompt("load", "vmclear", "vmxoff", "vmxon", "vmclear", "vmptrld", "host")
    host = {
        field: value for field, value in prompt.cases[0].fields.items() if field.type is FieldType.HOST_STATE
    }
    for field, value in prompt.cases[0].fields.items():
        if field not in host:
            prompt(f"vmwrite {field.name} {value:#x}")
    for field, value in host.items():
        if field is Field.HOST_IA32_EFER:
            prompt(f"vmwrite {field.name} {value:#x}")
        assert prompt.value(f"vmread {field.name}") == value, field.name
    assert "exit: HLT (12): -\n" in prompt("launch")


# --- capabilities and MSRs ----------------------------------------------------------------------------------


def test_caps_has_each_msr_by_name(prompt):
    lines = prompt("caps").splitlines()[1:]
    raw = prompt.session.capabilities.raw
    assert lines == [f"{Msr(number).name} ({number:#x}) = {value:#x}" for number, value in raw.items()]


@pytest.mark.parametrize("name", ["pin", "PRIMARY", "secondary", "exit", "entry"])
def test_caps_of_a_set_say_what_each_control_may_be(prompt, name):
    from vmxlab.sdm.controls import ControlSet

    controls = ControlSet[name.upper()]
    capability = prompt.session.capabilities.control(controls)
    head, *lines = prompt(f"caps {name}").splitlines()
    assert head.startswith(prompt.session.capabilities.control_msr(controls).name + " (")
    for line, flag in zip(lines, controls.flags, strict=True):
        bit, shown, *may_be = line.split()
        assert (1 << int(bit), shown) == (int(flag), flag.name)
        one, zero = bool(capability.allowed1 & flag), not capability.allowed0 & flag
        assert " ".join(may_be) == ("0 or 1" if one and zero else "1" if one else "0"), line


def test_caps_of_a_set_that_the_processor_lacks_say_so(prompt):
    assert prompt("caps tertiary") == "this processor has no IA32_VMX_PROCBASED_CTLS3 (0x492)\n"


def test_an_msr_by_name(prompt):
    assert prompt("wrmsr ia32_sysenter_cs 0x1234") == "IA32_SYSENTER_CS (0x174) = 0x1234\n"
    assert prompt("rdmsr SYSENTER_CS") == "IA32_SYSENTER_CS (0x174) = 0x1234\n"


# --- cases --------------------------------------------------------------------------------------------------


def test_an_image_for_the_prompt_does_not_run_its_cases(prompt):
    assert "@case" not in prompt.session.log.path.read_text().partition("vmx> ")[0]


def test_cases_are_listed_and_run(prompt):
    assert prompt("cases") == "    0  baseline\n    1  all-intercepted\n    2  never-enters\n"
    answer = prompt("run 1")
    assert answer.count("@exit ") > 10
    assert "@done cases=0x1*" in answer


@pytest.mark.parametrize("name", ["1", "0x1", "all-intercepted", "inter"])
def test_a_case_is_loaded_by_number_or_name_and_not_entered(prompt, name):
    answer = prompt(f"load {name}")
    assert "@exit" not in answer
    assert "@case" not in answer  # nor does it run, for a reader of the log
    assert answer.endswith(
        "case 1, all-intercepted is set up; 'launch' enters it\nin VMX operation, current VMCS 0x1001000\n"
    )
    assert prompt.value("vmread GUEST_RIP") == 0x8000


def test_loading_undoes_what_was_there(prompt):
    prompt("load", "reg rax 5", "vmwrite TPR_THRESHOLD 5", "launch", "load")
    assert prompt.value("reg rax") == 0
    assert "by=vmlaunch" in prompt("launch")


def test_a_case_that_fails_before_its_entry_says_so(prompt):
    answer = prompt("load never")
    assert "@vmx op=vmxon rc=invalid*" in answer
    assert answer.endswith("case 2, never-enters failed on the way to its entry\nnot in VMX operation\n")


def test_a_case_that_is_not_there_is_not_loaded(prompt):
    assert prompt("load nonsense") == "there is no case 'nonsense'; 'cases' lists them\n"
    assert prompt("load 7") == "there is no case '7'; 'cases' lists them\n"


# --- faults in L1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("de", "#DE (0)"), ("bp", "#BP (3)"), ("ud", "#UD (6)"), ("gp", "#GP (13)"), ("pf", "#PF (14)")],
)
def test_a_fault_is_shown_with_registers_and_vmx_operation_goes_on(prompt, kind, shown):
    prompt("load", "code f4")
    record, head, *lines, state = prompt(f"fault {kind}").splitlines()
    assert record.startswith("@fault vector=")
    assert head.startswith(f"fault in the monitor (L1): {shown}, error code ")
    registers = dict(re.findall(r"(\w+) +([0-9a-f]{16})", " ".join(lines)))
    assert len(registers) == 24
    assert f"rip={int(registers['rip'], 16):#x} rsp={int(registers['rsp'], 16):#x} " in record
    assert int(registers["cr4"], 16) >> 13 & 1  # CR4.VMXE
    assert state == "in VMX operation, current VMCS 0x1001000"
    assert "exit: HLT (12)" in prompt("launch")
