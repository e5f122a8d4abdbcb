"""Exit qualifications: each bit lands in its attribute, and whatever a processor says decodes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import OutOfRange
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT, ExitReason
from vmxlab.sdm.qualifications import (
    ApicAccessQualification,
    ApicAccessType,
    ControlRegisterQualification,
    CrAccessType,
    DebugExceptionQualification,
    DebugRegisterQualification,
    DisplacementQualification,
    EntryFailureCause,
    EntryFailureQualification,
    EptViolationQualification,
    InvalidationQualification,
    InvlpgQualification,
    IoQualification,
    MsrLoadFailureQualification,
    MsrQualification,
    PageFaultQualification,
    PlainQualification,
    Qualification,
    SipiQualification,
    TaskSwitchQualification,
    TaskSwitchSource,
    decode_qualification,
)
from vmxlab.sdm.registers import Vector

ALL_ONES = (1 << 64) - 1


@settings(derandomize=True, deadline=None)
@given(
    reason=st.integers(0, 0xFFFF_FFFF), raw=st.integers(0, ALL_ONES), vector=st.none() | st.integers(0, 255)
)
def test_any_reason_with_any_value_decodes_and_keeps_the_raw_value(
    reason: int, raw: int, vector: int | None
) -> None:
    qualification = decode_qualification(reason, raw, vector)
    assert isinstance(qualification, Qualification)
    assert qualification.raw == raw
    assert qualification.describe()


@pytest.mark.parametrize("raw", [0, 1, ALL_ONES, 0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA])
def test_every_known_reason_and_its_neighbours_decode(raw: int) -> None:
    for reason in range(100):
        for vector in (None, Vector.DB, Vector.PF, Vector.NMI, 255):
            qualification = decode_qualification(reason, raw, vector)
            assert qualification.raw == raw
            assert qualification.describe()


@pytest.mark.parametrize("raw", [-1, 1 << 64])
def test_a_value_that_is_not_64_bits_is_refused(raw: int) -> None:
    with pytest.raises(OutOfRange, match="exit qualification"):
        decode_qualification(ExitReason.HLT, raw)


@pytest.mark.parametrize(
    ("raw", "expected", "words"),
    [
        (
            0x0060_0048,
            IoQualification(0x0060_0048, 1, True, False, False, True, 0x60),
            "IN port 0x60, 1 byte",
        ),
        (
            0xFFFF_0001,
            IoQualification(0xFFFF_0001, 2, False, False, False, False, 0xFFFF),
            "OUT port 0xffff, 2 bytes",
        ),
        (
            0x03F8_0033,
            IoQualification(0x03F8_0033, 4, False, True, True, False, 0x3F8),
            "REP OUTS port 0x3f8, 4 bytes",
        ),
        (
            0x0070_001B,
            IoQualification(0x0070_001B, 4, True, True, False, False, 0x70),
            "INS port 0x70, 4 bytes",
        ),
    ],
)
def test_an_io_exit_tells_port_size_and_direction(raw: int, expected: IoQualification, words: str) -> None:
    qualification = decode_qualification(ExitReason.IO_INSTRUCTION, raw)
    assert qualification == expected
    assert isinstance(qualification, IoQualification)
    assert qualification.is_in is expected.direction_in
    assert qualification.describe() == words


@pytest.mark.parametrize(
    ("raw", "expected", "words"),
    [
        (
            0x0000_0300,
            ControlRegisterQualification(0x300, 0, CrAccessType.MOV_TO_CR, False, 3, 0),
            "MOV to CR0 from rbx",
        ),
        (
            0x0000_0F18,
            ControlRegisterQualification(0xF18, 8, CrAccessType.MOV_FROM_CR, False, 15, 0),
            "MOV from CR8 to r15",
        ),
        (0x0000_0020, ControlRegisterQualification(0x20, 0, CrAccessType.CLTS, False, 0, 0), "CLTS"),
        (
            0xBEEF_0030,
            ControlRegisterQualification(0xBEEF_0030, 0, CrAccessType.LMSW, False, 0, 0xBEEF),
            "LMSW 0xbeef",
        ),
        (
            0x0001_0070,
            ControlRegisterQualification(0x1_0070, 0, CrAccessType.LMSW, True, 0, 1),
            "LMSW 0x1, memory operand",
        ),
    ],
)
def test_a_control_register_exit_tells_what_was_done(
    raw: int, expected: ControlRegisterQualification, words: str
) -> None:
    qualification = decode_qualification(ExitReason.CONTROL_REGISTER_ACCESS, raw)
    assert qualification == expected
    assert qualification.describe() == words


@pytest.mark.parametrize(
    ("raw", "dr", "from_dr", "register", "words"),
    [(0x0007, 7, False, 0, "MOV to DR7 from rax"), (0x0C16, 6, True, 12, "MOV from DR6 to r12")],
)
def test_a_debug_register_exit_tells_register_and_direction(
    raw: int, dr: int, from_dr: bool, register: int, words: str
) -> None:
    qualification = decode_qualification(ExitReason.MOV_DR, raw)
    assert qualification == DebugRegisterQualification(raw, dr, from_dr, register)
    assert qualification.describe() == words


# Table 28-7, bit by bit.
EPT_BITS = [
    "read",
    "write",
    "fetch",
    "readable",
    "writable",
    "executable",
    "user_executable",
    "guest_linear_valid",
    "translated",
    "user_linear_address",
    "read_write_linear",
    "execute_disable_linear",
    "nmi_unblocking",
    "shadow_stack",
    "supervisor_shadow_stack",
    "guest_paging_verification",
    "asynchronous",
]


@pytest.mark.parametrize(("position", "name"), list(enumerate(EPT_BITS)))
def test_each_bit_of_an_ept_violation_is_its_own_attribute(position: int, name: str) -> None:
    qualification = decode_qualification(ExitReason.EPT_VIOLATION, 1 << position)
    assert isinstance(qualification, EptViolationQualification)
    values = dataclasses.asdict(qualification)
    assert {key for key, value in values.items() if key != "raw" and value} == {name}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (0x181, "read, EPT allows ---"),
        (0x1AA, "write, EPT allows r-x"),
        (0x1A4, "fetch, EPT allows --x"),
        (0x08B, "read+write of a paging structure, EPT allows r--"),
        (0x001, "read, EPT allows ---, no linear address"),
    ],
)
def test_an_ept_violation_is_put_in_words(raw: int, words: str) -> None:
    assert decode_qualification(ExitReason.EPT_VIOLATION, raw).describe() == words


@pytest.mark.parametrize(
    ("raw", "expected", "words"),
    [
        (
            0x0080,
            ApicAccessQualification(0x80, 0x80, ApicAccessType.LINEAR_READ, False),
            "linear read at offset 0x80",
        ),
        (
            0x1300,
            ApicAccessQualification(0x1300, 0x300, ApicAccessType.LINEAR_WRITE, False),
            "linear write at offset 0x300",
        ),
        (
            0x1_B000,
            ApicAccessQualification(0x1_B000, 0, ApicAccessType.GUEST_PHYSICAL_ASYNCHRONOUS, True),
            "guest-physical asynchronous",
        ),
        (0x7000, ApicAccessQualification(0x7000, 0, 7, False), "unknown access type 7 at offset 0x0"),
    ],
)
def test_an_apic_access_tells_offset_and_kind(
    raw: int, expected: ApicAccessQualification, words: str
) -> None:
    qualification = decode_qualification(ExitReason.APIC_ACCESS, raw)
    assert qualification == expected
    assert qualification.describe() == words


def test_exceptions_have_a_qualification_only_for_debug_and_page_fault() -> None:
    debug = decode_qualification(ExitReason.EXCEPTION_OR_NMI, 0x4001, Vector.DB)
    assert debug == DebugExceptionQualification(0x4001, True, False, False, False, False, False, True, False)
    assert debug.describe() == "B0 BS"
    assert decode_qualification(0, 0xDEAD_F000, Vector.PF) == PageFaultQualification(0xDEAD_F000, 0xDEAD_F000)
    assert decode_qualification(0, 0, Vector.GP) == PlainQualification(0)
    assert decode_qualification(0, 0x4001) == PlainQualification(0x4001)


@pytest.mark.parametrize(
    ("position", "name"),
    [(0, "b0"), (1, "b1"), (2, "b2"), (3, "b3"), (11, "bld"), (13, "bd"), (14, "bs"), (16, "rtm")],
)
def test_each_bit_of_a_debug_exception_is_its_own_attribute(position: int, name: str) -> None:
    qualification = decode_qualification(0, 1 << position, Vector.DB)
    assert isinstance(qualification, DebugExceptionQualification)
    values = dataclasses.asdict(qualification)
    assert {key for key, value in values.items() if key != "raw" and value} == {name}


@pytest.mark.parametrize(
    ("raw", "selector", "source", "words"),
    [
        (0x0000_0028, 0x28, TaskSwitchSource.CALL, "to TSS 0x28 by CALL"),
        (0x8000_0030, 0x30, TaskSwitchSource.JMP, "to TSS 0x30 by JMP"),
        (0xC000_0038, 0x38, TaskSwitchSource.TASK_GATE, "to TSS 0x38 by a task gate in the IDT"),
    ],
)
def test_a_task_switch_tells_where_to_and_by_what(
    raw: int, selector: int, source: TaskSwitchSource, words: str
) -> None:
    qualification = decode_qualification(ExitReason.TASK_SWITCH, raw)
    assert qualification == TaskSwitchQualification(raw, selector, source)
    assert qualification.describe() == words


@pytest.mark.parametrize(
    ("raw", "cause", "words"),
    [
        (0, EntryFailureCause.UNSPECIFIED, "no cause given"),
        (2, EntryFailureCause.PDPTE_LOADING, "problem loading the PDPTEs"),
        (3, EntryFailureCause.NMI_INTO_STI_BLOCKING, "NMI injected while blocking by STI"),
        (4, EntryFailureCause.VMCS_LINK_POINTER, "invalid VMCS link pointer"),
        (9, 9, "unknown cause 0x9"),
    ],
)
def test_a_failed_entry_tells_its_cause(raw: int, cause: int, words: str) -> None:
    qualification = decode_qualification(ENTRY_FAILURE_BIT | ExitReason.ENTRY_FAILURE_GUEST_STATE, raw)
    assert qualification == EntryFailureQualification(raw, cause)
    assert qualification.describe() == words


def test_a_failed_msr_load_tells_the_entry() -> None:
    qualification = decode_qualification(ENTRY_FAILURE_BIT | 34, 3)
    assert qualification == MsrLoadFailureQualification(3, 3)
    assert qualification.describe() == "entry 3 of the MSR-load area"


@pytest.mark.parametrize(
    "reason", [ExitReason.INVEPT, ExitReason.INVVPID, ExitReason.INVPCID], ids=lambda reason: reason.name
)
def test_an_invalidation_has_a_signed_displacement(reason: ExitReason) -> None:
    qualification = decode_qualification(reason, ALL_ONES - 7)
    assert qualification == InvalidationQualification(ALL_ONES - 7, -8)
    assert qualification.describe() == "displacement -0x8"


def test_a_memory_operand_has_a_displacement() -> None:
    assert decode_qualification(ExitReason.VMPTRLD, 0x10) == DisplacementQualification(0x10, 16)
    assert decode_qualification(ExitReason.GDTR_IDTR_ACCESS, 0).describe() == "displacement 0x0"


@pytest.mark.parametrize(
    ("reason", "raw", "words"),
    [
        (ExitReason.INVLPG, 0x401000, "linear address 0x401000"),
        (ExitReason.SIPI, 0x9F, "vector 0x9f"),
        (ExitReason.MWAIT, 1, "monitoring armed"),
        (ExitReason.MWAIT, 0, "monitoring not armed"),
        (ExitReason.WBINVD, 0, "WBINVD"),
        (ExitReason.WBINVD, 1, "WBNOINVD"),
        (ExitReason.WRMSR, 0, "WRMSR"),
        (ExitReason.WRMSR, 1, "WRMSRNS"),
        (ExitReason.VIRTUALIZED_EOI, 0x31, "vector 0x31"),
        (ExitReason.APIC_WRITE, 0x300, "offset 0x300"),
        (ExitReason.PML_FULL, 1 << 12, "log full, NMI unblocking by IRET"),
        (ExitReason.SPP, 0, "SPP misconfiguration"),
        (ExitReason.SPP, 1 << 11, "SPP miss"),
        (ExitReason.RDMSRLIST, 0xC000_0080, "MSR 0xc0000080"),
        (ExitReason.ENQCMD_PASID_TRANSLATION_FAILURE, 0x12, "PASID 0x12"),
        (ExitReason.INSTRUCTION_TIMEOUT, 1, "context invalid"),
        (ExitReason.HLT, 0, "-"),
        (ExitReason.HLT, 5, "0x5"),
        (200, 5, "0x5"),
    ],
)
def test_the_other_qualifications_are_put_in_words(reason: int, raw: int, words: str) -> None:
    assert decode_qualification(reason, raw).describe() == words


def test_a_qualification_is_a_frozen_value() -> None:
    first: Qualification = decode_qualification(ExitReason.INVLPG, 0x1000)
    assert {first, InvlpgQualification(0x1000, 0x1000)} == {first}
    others: list[Qualification] = [SipiQualification(0x1000, 0), MsrQualification(0x1000, 0x1000)]
    assert first not in others
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.raw = 0  # type: ignore[misc]
