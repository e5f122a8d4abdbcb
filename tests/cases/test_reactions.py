"""Reactions: values that say what the monitor does on an exit."""

from __future__ import annotations

import dataclasses

import pytest

from vmxlab import ExitReason, Field, on, port_is
from vmxlab.cases.reactions import (
    DEFAULT_ACTIONS,
    InveptAction,
    Resume,
    SetField,
    SetMemory,
    SetRegister,
    Skip,
    Stop,
)
from vmxlab.errors import CaseError, OutOfRange, UnknownField

CPUID = ExitReason.CPUID


def test_each_method_gives_a_new_reaction():
    first = on(CPUID)
    second = first.set("rax", 1)
    third = second.skip()
    assert (first.actions, second.actions) == ((), (SetRegister("rax", 1),))
    assert third.actions == (SetRegister("rax", 1), Skip())
    assert first == on(CPUID)


def test_actions_stand_in_the_order_in_which_they_were_said():
    reaction = (
        on(ExitReason.EPT_VIOLATION)
        .write(0x1000000, b"entry")
        .invept()
        .vmwrite("guest_rip", 0x8000)
        .set("r15", 2)
        .resume()
    )
    assert reaction.actions == (
        SetMemory(0x1000000, b"entry"),
        InveptAction(1, None),
        SetField(Field.GUEST_RIP, 0x8000),
        SetRegister("r15", 2),
        Resume(),
    )


def test_nothing_is_done_after_stop():
    stopped = on(CPUID).stop()
    assert stopped.actions == (Stop(),)
    for more in (stopped.skip, stopped.resume, stopped.stop, lambda: stopped.set("rax", 0)):
        with pytest.raises(CaseError, match="after stop"):
            more()


def test_a_reaction_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        on(CPUID).reason = 1


def test_the_bytes_of_a_write_are_its_own():
    content = bytearray(b"abc")
    reaction = on(CPUID).write(0x1000000, content)
    content[0] = 0
    assert reaction.actions == (SetMemory(0x1000000, b"abc"),)


# --- operands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eax", "RAX", "rip", "", "xmm0"])
def test_an_unknown_register_is_refused_with_those_there_are(name):
    with pytest.raises(CaseError) as caught:
        on(CPUID).set(name, 0)
    assert repr(name) in caught.value.message
    assert "r15" in caught.value.advice


@pytest.mark.parametrize("value", [1 << 64, -1])
def test_a_register_takes_64_bits(value):
    assert on(CPUID).set("rsp", (1 << 64) - 1)
    with pytest.raises(OutOfRange, match="register rsp") as caught:
        on(CPUID).set("rsp", value)
    assert caught.value.value == value


@pytest.mark.parametrize(
    ("field", "bits"),
    [(Field.GUEST_CS_SELECTOR, 16), (Field.EXCEPTION_BITMAP, 32), (Field.TSC_OFFSET, 64), ("guest rip", 64)],
)
def test_a_vmwrite_is_as_wide_as_its_field(field, bits):
    assert on(CPUID).vmwrite(field, (1 << bits) - 1).actions[0].value == (1 << bits) - 1
    for value in (1 << bits, -1):
        with pytest.raises(OutOfRange, match=f"{bits} bits"):
            on(CPUID).vmwrite(field, value)


def test_a_vmwrite_of_no_field_says_which_it_may_have_been():
    with pytest.raises(UnknownField, match="GUEST_RIP"):
        on(CPUID).vmwrite("GUEST_RIB", 0)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda v: on(CPUID).write(v, b"x"), "machine address"),
        (lambda v: on(CPUID).invept(v), "INVEPT type"),
        (lambda v: on(CPUID).invept(2, v), "EPTP"),
    ],
)
@pytest.mark.parametrize("value", [1 << 64, -1])
def test_addresses_and_descriptors_take_64_bits(make, what, value):
    make((1 << 64) - 1)
    with pytest.raises(OutOfRange) as caught:
        make(value)
    assert (caught.value.what, caught.value.value) == (what, value)


def test_injection_is_what_the_next_vm_entry_reads():
    """SDM Vol. 3C, 25.8.3: the event, its error code and its instruction length are three fields."""
    full = on(CPUID).inject(0x8000_0B0D, error_code=0x18, length=2).resume()
    assert full.actions == (
        SetField(Field.ENTRY_INTERRUPTION_INFORMATION, 0x8000_0B0D),
        SetField(Field.ENTRY_EXCEPTION_ERROR_CODE, 0x18),
        SetField(Field.ENTRY_INSTRUCTION_LENGTH, 2),
        Resume(),
    )
    assert on(CPUID).inject(0x8000_0306).actions == (
        SetField(Field.ENTRY_INTERRUPTION_INFORMATION, 0x8000_0306),
    )
    assert len(on(CPUID).inject(0x8000_0B0E, error_code=0, length=0).actions) == 3


# --- which exits --------------------------------------------------------------------------------------------


def test_a_reaction_is_for_every_exit_of_its_reason_unless_said_otherwise():
    reaction = on(ExitReason.HLT)
    assert (reaction.reason, reaction.from_match, reaction.match_count) == (12, 0, 0)
    assert (reaction.qualification_mask, reaction.qualification_value) == (0, 0)


@pytest.mark.parametrize("port", [0, 0x60, 0x7FFF, 0x8000, 0xFFFF])
def test_port_is_compares_bits_31_to_16_and_no_others(port):
    """SDM Vol. 3C, table 28-5."""
    mask, value = port_is(port)
    for other_bits in (0, 0xFFFF, 0x5A5A):
        assert (port << 16 | other_bits) & mask == value
    assert ((port ^ 1) << 16) & mask != value


@pytest.mark.parametrize("port", [-1, 0x10000])
def test_there_is_no_port_beyond_ffff(port):
    with pytest.raises(OutOfRange, match="I/O port") as caught:
        port_is(port)
    assert caught.value.value == port


@pytest.mark.parametrize(
    ("qualification", "kind", "message"),
    [
        ((0, 1), CaseError, "0x1 has bits outside its mask 0x0"),
        ((0xFF, 0x100), CaseError, "could never match"),
        ((1 << 64, 0), OutOfRange, "qualification"),
        ((-1, 0), OutOfRange, "qualification"),
        (((1 << 64) - 1, 1 << 64), OutOfRange, "qualification"),
        (((1 << 64) - 1, -1), OutOfRange, "qualification"),
    ],
)
def test_a_qualification_that_can_not_match_is_refused(qualification, kind, message):
    with pytest.raises(kind, match=message):
        on(CPUID, qualification=qualification)


@pytest.mark.parametrize(
    ("arguments", "what", "bits"),
    [("first", "first match", 32), ("times", "number of matches", 32)],
)
def test_matches_are_counted_in_32_bits(arguments, what, bits):
    on(CPUID, **{arguments: (1 << bits) - 1})
    for value in (1 << bits, -1):
        with pytest.raises(OutOfRange) as caught:
            on(CPUID, **{arguments: value})
        assert (caught.value.what, caught.value.value) == (what, value)


@pytest.mark.parametrize("reason", [-1, 0x10000, 1 << 31 | 33])
def test_a_reaction_is_for_a_basic_reason(reason):
    with pytest.raises(OutOfRange, match="basic exit reason"):
        on(reason)


def test_a_reason_that_the_sdm_has_no_name_for_can_be_answered():
    assert on(0xFFFF).skip().reason == 0xFFFF


# --- defaults -----------------------------------------------------------------------------------------------

# SDM Vol. 3C, 26.1.2 and 26.1.3: what exits because an instruction was executed, and can be skipped. HLT is
# one too, but ends a guest program.
INSTRUCTIONS = """
    CPUID GETSEC INVD XSETBV INVEPT INVVPID VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMRESUME VMXOFF VMXON
    CONTROL_REGISTER_ACCESS IO_INSTRUCTION RDMSR WRMSR INVLPG INVPCID MONITOR MOV_DR MWAIT PAUSE RDPMC
    RDRAND RDSEED RDTSC RDTSCP VMREAD VMWRITE VMFUNC WBINVD GDTR_IDTR_ACCESS LDTR_TR_ACCESS XRSTORS XSAVES
    TPAUSE UMWAIT
"""
SKIPPED = {ExitReason[name] for name in INSTRUCTIONS.split()}


@pytest.mark.parametrize("reason", ExitReason, ids=lambda reason: reason.name)
def test_an_instruction_that_exits_is_skipped_and_everything_else_stops(reason):
    assert DEFAULT_ACTIONS.get(reason, Stop) is (Skip if reason in SKIPPED else Stop)
