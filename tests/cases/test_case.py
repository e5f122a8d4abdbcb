"""The case as a value: what it refuses at once, and that it can't change afterwards."""

from __future__ import annotations

import dataclasses
import re

import pytest

from vmxlab import (
    CR4,
    Case,
    ControlSet,
    EntryControls,
    EptVpidCap,
    ExitReason,
    FeatureControl,
    Field,
    IOBitmap,
    Limits,
    MsrArea,
    MsrBitmap,
    PinControls,
    PostedInterruptDescriptor,
    PrimaryControls,
    SecondaryControls,
    VirtualApicPage,
    guest_ept,
    on,
)
from vmxlab.cases.memory import L2_MEMORY_BYTES, PROGRAM, PROGRAM_LIMIT
from vmxlab.cases.steps import (
    STANDARD,
    Enter,
    Invept,
    Invvpid,
    Rdmsr,
    ReportMemory,
    SetCr0,
    Store,
    Vmclear,
    Vmread,
    Vmwrite,
    Vmxon,
    Wrmsr,
)
from vmxlab.errors import CaseError, OutOfRange, UnknownField, VmxlabError
from vmxlab.sdm.registers import CR0, EFER
from vmxlab.structures import VmFunc


def refusal(kind: type[VmxlabError], **arguments: object) -> VmxlabError:
    """The error that a case with these arguments raises; exactly of this kind."""
    with pytest.raises(kind) as caught:
        Case(**arguments)
    assert type(caught.value) is kind
    return caught.value


# --- the baseline -------------------------------------------------------------------------------------------


def test_a_case_with_nothing_said_executes_hlt_in_64_bit_mode():
    case = Case()
    assert case.program == "hlt"
    assert case.mode.bits == 64
    assert case.steps == STANDARD
    assert (case.fields, case.registers, case.reactions, case.enable) == ({}, {}, (), ())


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x", "a-b_c/d:e@f", "!" * 64, "~"])
def test_a_name_of_printable_characters_is_taken(name):
    assert Case(name=name).name == name


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\n", "a=b", "a*b", "é", "\x7f", "x" * 65, "\0"])
def test_a_name_that_would_break_a_record_is_refused(name):
    error = refusal(CaseError, name=name)
    assert repr(name) in str(error)
    assert "64 printable" in error.advice


# --- registers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eax", "RAX", "rip", "r16", ""])
def test_an_unknown_register_is_named_with_those_there_are(name):
    error = refusal(CaseError, registers={name: 0})
    assert repr(name) in error.message
    assert "rax, rcx" in error.advice


@pytest.mark.parametrize("value", [1 << 64, -1])
def test_a_register_holds_64_bits(value):
    error = refusal(OutOfRange, registers={"r15": value})
    assert (error.what, error.value, error.limit) == ("register r15", value, "64 bits")


# --- fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [Field.GUEST_CR0, "GUEST_CR0", "guest-cr0", "Guest CR0", 0x6800, "0x6800"])
def test_a_field_may_be_given_by_name_or_encoding(key):
    case = Case(fields={key: 0x31}, watch=[key])
    assert case.fields == {Field.GUEST_CR0: 0x31}
    assert all(type(field) is Field for field in (*case.fields, *case.watch))


@pytest.mark.parametrize("where", ["fields", "watch"])
@pytest.mark.parametrize("key", ["GUEST_CRO", "GUST_CR0", "guest_cr00"])
def test_a_misspelt_field_is_answered_with_those_it_may_have_been(where, key):
    error = refusal(UnknownField, **{where: {key: 0}})
    assert error.name == key
    assert "GUEST_CR0" in error.close
    assert "GUEST_CR0" in str(error)


@pytest.mark.parametrize("key", [0xFFFF, 0x6801, 1 << 40])
def test_an_encoding_that_is_no_field_is_refused(key):
    assert f"{key:#x}" in str(refusal(UnknownField, fields={key: 0}))


def test_one_field_under_two_keys_is_a_contradiction():
    error = refusal(CaseError, fields={"GUEST_CR0": 1, Field.GUEST_CR0: 2})
    assert "GUEST_CR0" in error.message


WIDTHS = [
    (Field.VPID, 16),
    (Field.GUEST_ES_SELECTOR, 16),
    (Field.EXCEPTION_BITMAP, 32),
    (Field.GUEST_CS_ACCESS_RIGHTS, 32),
    (Field.EPT_POINTER, 64),
    (Field.GUEST_RIP, 64),
]


@pytest.mark.parametrize(("field", "bits"), WIDTHS)
def test_a_field_takes_what_fits_and_no_more(field, bits):
    assert Case(fields={field: (1 << bits) - 1}).fields[field] == (1 << bits) - 1
    error = refusal(OutOfRange, fields={field: 1 << bits})
    assert (error.what, error.value) == (f"VMCS field {field.name}", 1 << bits)
    assert f"{bits} bits" in error.limit
    assert refusal(OutOfRange, fields={field: -1}).value == -1


# --- controls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [c for c in ControlSet if c.bits == 32])
def test_raw_controls_are_as_wide_as_their_field(controls):
    assert Case(raw_controls={controls: 0xFFFF_FFFF}).raw_controls == {controls: 0xFFFF_FFFF}
    error = refusal(OutOfRange, raw_controls={controls: 1 << 32})
    assert controls.field.name in error.what
    assert "32 bits" in error.limit


def test_raw_tertiary_controls_have_64_bits():
    assert Case(raw_controls={ControlSet.TERTIARY: (1 << 64) - 1})
    assert "64 bits" in refusal(OutOfRange, raw_controls={ControlSet.TERTIARY: 1 << 64}).limit


@pytest.mark.parametrize("where", ["enable", "disable"])
@pytest.mark.parametrize("flag", [CR0.PE, EptVpidCap.invept, 4, "RDTSC_EXITING", None])
def test_what_is_no_control_is_refused(where, flag):
    error = refusal(CaseError, **{where: [flag]})
    assert error.message.startswith(f"{where}: ")
    assert "PrimaryControls" in error.advice


@pytest.mark.parametrize("need", [EFER.NXE, FeatureControl, 4, "ENABLE_EPT", None])
def test_what_no_processor_can_be_asked_for_is_refused(need):
    for needs in ([need], need):
        error = refusal(CaseError, needs=needs)
        assert error.message.startswith("needs: ")
        assert "CR4.SMXE" in error.advice


def test_a_case_needs_controls_fields_of_capability_msrs_and_bits_of_cr0_and_cr4():
    needs = (SecondaryControls.ENABLE_EPT, EptVpidCap.page_1g, VmFunc.eptp_switching, CR4.SMXE, CR0.NE)
    assert Case(needs=needs).needs == needs
    assert Case(needs=needs[1]).needs == needs[1:2]
    assert repr(needs[1]) == "EptVpidCap.page_1g"


def test_a_number_is_no_set_of_controls():
    assert "enable" in refusal(CaseError, enable=5).message


def test_one_control_needs_no_brackets_and_several_may_come_from_anywhere():
    flags = (PrimaryControls.RDTSC_EXITING, SecondaryControls.ENABLE_VPID)
    assert Case(enable=flags[0]).enable == flags[:1]
    assert Case(enable=iter(flags)).enable == flags
    assert Case(disable={*flags[:1]}, needs=[*flags]).needs == flags


def test_a_control_both_enabled_and_disabled_is_a_contradiction():
    both = PrimaryControls.RDTSC_EXITING | PrimaryControls.HLT_EXITING
    error = refusal(CaseError, enable=both, disable=PrimaryControls.HLT_EXITING)
    assert "HLT_EXITING" in error.message
    assert "RDTSC" not in error.message


def test_the_same_bit_of_two_sets_is_no_contradiction():
    assert int(PrimaryControls.RDPMC_EXITING) == int(SecondaryControls.RDRAND_EXITING)
    Case(enable=PrimaryControls.RDPMC_EXITING, disable=SecondaryControls.RDRAND_EXITING)


# --- memory and structures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "length"),
    [(L2_MEMORY_BYTES, 1), (L2_MEMORY_BYTES - 1, 2), (-1, 1), (0, L2_MEMORY_BYTES + 1), (1 << 64, 1)],
)
def test_data_outside_of_l2s_memory_is_refused(address, length):
    error = refusal(OutOfRange, data={address: bytes(length)})
    assert error.value == address
    assert f"{length} bytes" in error.what
    assert "0x20000" in error.limit


def test_data_may_fill_l2s_memory_to_its_last_byte():
    assert Case(data={L2_MEMORY_BYTES - 1: b"x"}).data == {L2_MEMORY_BYTES - 1: b"x"}


@pytest.mark.parametrize("bitmap", ["vmread_bitmap", "vmwrite_bitmap"])
@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_a_vmread_or_vmwrite_bitmap_is_a_page(bitmap, size):
    error = refusal(OutOfRange, **{bitmap: bytes(size)})
    assert error.value == size
    assert "4096" in error.limit


@pytest.mark.parametrize("eptp", [1 << 64, -1])
def test_an_eptp_has_64_bits(eptp):
    error = refusal(OutOfRange, eptp=eptp)
    assert (error.what, error.value) == ("EPTP", eptp)


def test_an_illegal_eptp_is_taken_as_it_is():
    assert Case(eptp=(1 << 64) - 1).eptp == (1 << 64) - 1


def test_machine_code_must_fit_into_the_programs_pages():
    room = PROGRAM_LIMIT - PROGRAM
    assert len(Case(program=bytes(room)).program) == room
    error = refusal(OutOfRange, program=bytes(room + 1))
    assert error.value == room + 1


# --- how many, how long -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "item", "what"),
    [("watch", Field.GUEST_CR0, "watched fields"), ("reactions", on(ExitReason.CPUID).skip(), "reactions")],
)
def test_as_many_as_the_monitor_has_room_for(name, item, what):
    assert len(getattr(Case(**{name: [item] * 64}), name)) == 64
    error = refusal(OutOfRange, **{name: [item] * 65})
    assert (error.what, error.value) == (f"number of {what}", 65)
    assert "64" in error.limit


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"exits": 0}, "Limits.exits"),
        ({"exits": -1}, "Limits.exits"),
        ({"exits": 1 << 32}, "Limits.exits"),
        ({"l2_tsc": 0}, "Limits.l2_tsc"),
        ({"l2_tsc": -5}, "Limits.l2_tsc"),
    ],
)
def test_limits_out_of_range_are_refused(limits, what):
    with pytest.raises(OutOfRange, match=re.escape(what)) as caught:
        Limits(**limits)
    assert caught.value.value == next(iter(limits.values()))


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("-inf"), float("nan")])
def test_a_deadline_lies_in_the_future_and_comes(seconds):
    with pytest.raises(CaseError, match=r"Limits\.seconds"):
        Limits(seconds=seconds)


def test_limits_may_be_as_wide_as_they_go():
    assert Limits(exits=1).exits == 1
    assert Limits(exits=0xFFFF_FFFF, l2_tsc=1 << 80, seconds=1e-9).l2_tsc == 1 << 80


# --- steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "what", "bits"),
    [
        (lambda v: Vmxon(region=v), "Vmxon: region", 64),
        (lambda v: Vmclear(region=v), "Vmclear: region", 64),
        (lambda v: Vmread(v), "Vmread: field", 32),
        (lambda v: Vmwrite(v, 0), "Vmwrite: field", 32),
        (lambda v: Vmwrite(Field.VPID, v), "Vmwrite: value", 64),
        (lambda v: Invept(v), "Invept: type", 64),
        (lambda v: Invept(1, v), "Invept: eptp", 64),
        (lambda v: Invvpid(0, v), "Invvpid: vpid", 64),
        (lambda v: Invvpid(0, 0, v), "Invvpid: linear_address", 64),
        (lambda v: Rdmsr(v), "Rdmsr: msr", 32),
        (lambda v: Wrmsr(v, 0), "Wrmsr: msr", 32),
        (lambda v: Wrmsr(0x10, v), "Wrmsr: value", 64),
        (lambda v: SetCr0(v), "SetCr0: value", 64),
        (lambda v: Store(v, b"x"), "Store: address", 64),
        (lambda v: ReportMemory(v, 8), "ReportMemory: address", 64),
        (lambda v: ReportMemory(0, v), "ReportMemory: length", 32),
    ],
)
def test_a_step_takes_operands_as_wide_as_the_instructions(make, what, bits):
    make((1 << bits) - 1)
    for value in (1 << bits, -1):
        with pytest.raises(OutOfRange) as caught:
            make(value)
        assert (caught.value.what, caught.value.value) == (what, value)
        assert f"{bits} bits" in caught.value.limit


def test_a_vmwrite_step_may_be_wider_than_its_field():
    """The step is the instruction with a 64-bit operand: what it does to a 16-bit field is the question."""
    assert Vmwrite(Field.VPID, (1 << 64) - 1).value == (1 << 64) - 1


# --- a case is a value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", dataclasses.fields(Case), ids=lambda field: field.name)
def test_nothing_of_a_case_can_be_set_again(field):
    case = Case()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(case, field.name, getattr(case, field.name))


def test_a_case_takes_no_attribute_it_does_not_have():
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(Case(), "fileds", {})


def test_all_arguments_are_named():
    with pytest.raises(TypeError):
        Case("hlt")


@pytest.mark.parametrize("name", ["fields", "registers", "data", "memory", "raw_controls"])
def test_what_a_mapping_gains_later_the_case_does_not(name):
    key = {"registers": "rax", "fields": Field.GUEST_CR0, "raw_controls": ControlSet.PIN}.get(name, 0x10000)
    value = b"x" if name in ("data", "memory") else 1
    given = {key: value}
    case = Case(**{name: given})
    given.clear()
    assert getattr(case, name) == {key: value}


@pytest.mark.parametrize("name", ["watch", "reactions", "steps", "expect", "enable"])
def test_what_a_list_gains_later_the_case_does_not(name):
    item = {
        "watch": Field.GUEST_CR0,
        "reactions": on(ExitReason.HLT).stop(),
        "steps": Enter(),
        "expect": ExitReason.HLT,
        "enable": PrimaryControls.RDTSC_EXITING,
    }[name]
    given = [item]
    case = Case(**{name: given})
    given.append(item)
    assert getattr(case, name) == (item,)


def test_one_bitmap_changed_in_a_loop_makes_different_cases():
    bitmap = IOBitmap.passthrough_all()
    cases = []
    for port in (0x60, 0x8000):
        bitmap.set_intercept(port, True)
        cases.append(Case(io_bitmap=bitmap))
    assert [case.io_bitmap.intercepts(0x8000) for case in cases] == [False, True]
    assert cases[0] != cases[1]


def test_the_msr_bitmap_and_the_ept_are_the_cases_own_too():
    bitmap, ept = MsrBitmap.passthrough_all(), guest_ept()
    case = Case(msr_bitmap=bitmap, ept=ept)
    bitmap.set_read_intercept(0x10, True)
    ept.unmap(0, 0x1000)
    assert not case.msr_bitmap.intercepts(0x10)
    assert case.ept == guest_ept()


DIFFERENCES = [
    {"program": "cpuid"},
    {"name": "x"},
    {"io_bitmap": IOBitmap.passthrough_all()},
    {"eptp": 0},
    {"shadow_vmcs": True},
    {"virtual_apic_page": VirtualApicPage({0x80: 0x10})},
    {"entry_msr_load": MsrArea([(0x10, 1)])},
    {"exit_msr_store": MsrArea([(0x10, 1)])},
    {"exit_msr_load": MsrArea([(0x10, 2)])},
    {"posted_interrupts": PostedInterruptDescriptor((0x41,))},
    {"enable": PrimaryControls.RDPMC_EXITING},
    {"enable": SecondaryControls.RDRAND_EXITING},
    {"disable": PinControls.NMI_EXITING},
    {"disable": EntryControls.LOAD_DEBUG_CONTROLS},
    {"fields": {Field.GUEST_CR0: 1}},
    {"registers": {"rax": 1}},
    {"data": {0x10000: b"x"}},
    {"limits": Limits(exits=1)},
    {"steps": (Enter(),)},
    {"steps": (Enter(go_on=True),)},
    {"expect": []},
]


@pytest.mark.parametrize("index", range(len(DIFFERENCES)))
def test_cases_are_equal_when_they_ask_the_same(index):
    assert Case(**DIFFERENCES[index]) == Case(**DIFFERENCES[index])
    others = [Case(), *(Case(**d) for i, d in enumerate(DIFFERENCES) if i != index)]
    assert Case(**DIFFERENCES[index]) not in others


def test_a_case_can_be_made_of_another():
    case = Case(io_bitmap=IOBitmap.intercept_all(), enable=PrimaryControls.RDTSC_EXITING, name="one")
    other = dataclasses.replace(case, name="two")
    assert (other.name, other.io_bitmap, other.enable) == ("two", case.io_bitmap, case.enable)
    assert dataclasses.replace(other, name="one") == case
