"""VMCS field encodings: computed from width, type and index, and equal to what the manual prints."""

from __future__ import annotations

import pytest

from vmxlab.errors import OutOfRange, UnknownField
from vmxlab.sdm.fields import Encoding, Field, FieldType, FieldWidth, decode, encode

# Typed in from Appendix B by hand, and nowhere else: a wrong index in the package fails here. The first and
# the last field of each table, those around gaps in the numbering, and those that any VMX program uses.
PRINTED_ENCODINGS = {
    "VPID": 0x0000,
    "POSTED_INTERRUPT_NOTIFICATION_VECTOR": 0x0002,
    "EPTP_INDEX": 0x0004,
    "LAST_PID_POINTER_INDEX": 0x0008,
    "GUEST_ES_SELECTOR": 0x0800,
    "GUEST_CS_SELECTOR": 0x0802,
    "GUEST_TR_SELECTOR": 0x080E,
    "GUEST_INTERRUPT_STATUS": 0x0810,
    "PML_INDEX": 0x0812,
    "GUEST_UINV": 0x0814,
    "HOST_ES_SELECTOR": 0x0C00,
    "HOST_TR_SELECTOR": 0x0C0C,
    "IO_BITMAP_A": 0x2000,
    "IO_BITMAP_B": 0x2002,
    "MSR_BITMAP": 0x2004,
    "EXIT_MSR_STORE_ADDRESS": 0x2006,
    "ENTRY_MSR_LOAD_ADDRESS": 0x200A,
    "EXECUTIVE_VMCS_POINTER": 0x200C,
    "PML_ADDRESS": 0x200E,
    "TSC_OFFSET": 0x2010,
    "VIRTUAL_APIC_ADDRESS": 0x2012,
    "APIC_ACCESS_ADDRESS": 0x2014,
    "VM_FUNCTION_CONTROLS": 0x2018,
    "EPT_POINTER": 0x201A,
    "EOI_EXIT_BITMAP_0": 0x201C,
    "EOI_EXIT_BITMAP_3": 0x2022,
    "EPTP_LIST_ADDRESS": 0x2024,
    "VMREAD_BITMAP": 0x2026,
    "VMWRITE_BITMAP": 0x2028,
    "XSS_EXITING_BITMAP": 0x202C,
    "SUB_PAGE_PERMISSION_TABLE_POINTER": 0x2030,
    "TSC_MULTIPLIER": 0x2032,
    "TERTIARY_PROCESSOR_BASED_CONTROLS": 0x2034,
    "ENCLV_EXITING_BITMAP": 0x2036,
    "LOW_PASID_DIRECTORY_ADDRESS": 0x2038,
    "PCONFIG_EXITING_BITMAP": 0x203E,
    "HLAT_POINTER": 0x2040,
    "PID_POINTER_TABLE_ADDRESS": 0x2042,
    "SECONDARY_EXIT_CONTROLS": 0x2044,
    "IA32_SPEC_CTRL_MASK": 0x204A,
    "IA32_SPEC_CTRL_SHADOW": 0x204C,
    "INJECTED_EVENT_DATA": 0x2052,
    "GUEST_PHYSICAL_ADDRESS": 0x2400,
    "ORIGINAL_EVENT_DATA": 0x2404,
    "VMCS_LINK_POINTER": 0x2800,
    "GUEST_IA32_DEBUGCTL": 0x2802,
    "GUEST_IA32_PAT": 0x2804,
    "GUEST_IA32_EFER": 0x2806,
    "GUEST_PDPTE0": 0x280A,
    "GUEST_PDPTE3": 0x2810,
    "GUEST_IA32_PKRS": 0x2818,
    "GUEST_IA32_FRED_SSP3": 0x2828,
    "HOST_IA32_PAT": 0x2C00,
    "HOST_IA32_EFER": 0x2C02,
    "HOST_IA32_FRED_SSP3": 0x2C16,
    "PIN_BASED_CONTROLS": 0x4000,
    "PRIMARY_PROCESSOR_BASED_CONTROLS": 0x4002,
    "EXCEPTION_BITMAP": 0x4004,
    "CR3_TARGET_COUNT": 0x400A,
    "EXIT_CONTROLS": 0x400C,
    "ENTRY_CONTROLS": 0x4012,
    "ENTRY_INTERRUPTION_INFORMATION": 0x4016,
    "ENTRY_INSTRUCTION_LENGTH": 0x401A,
    "TPR_THRESHOLD": 0x401C,
    "SECONDARY_PROCESSOR_BASED_CONTROLS": 0x401E,
    "PLE_WINDOW": 0x4022,
    "INSTRUCTION_TIMEOUT_CONTROL": 0x4024,
    "VM_INSTRUCTION_ERROR": 0x4400,
    "EXIT_REASON": 0x4402,
    "EXIT_INTERRUPTION_INFORMATION": 0x4404,
    "IDT_VECTORING_INFORMATION": 0x4408,
    "EXIT_INSTRUCTION_LENGTH": 0x440C,
    "EXIT_INSTRUCTION_INFORMATION": 0x440E,
    "GUEST_ES_LIMIT": 0x4800,
    "GUEST_IDTR_LIMIT": 0x4812,
    "GUEST_ES_ACCESS_RIGHTS": 0x4814,
    "GUEST_TR_ACCESS_RIGHTS": 0x4822,
    "GUEST_INTERRUPTIBILITY_STATE": 0x4824,
    "GUEST_ACTIVITY_STATE": 0x4826,
    "GUEST_IA32_SYSENTER_CS": 0x482A,
    "VMX_PREEMPTION_TIMER_VALUE": 0x482E,
    "HOST_IA32_SYSENTER_CS": 0x4C00,
    "CR0_GUEST_HOST_MASK": 0x6000,
    "CR4_READ_SHADOW": 0x6006,
    "CR3_TARGET_VALUE_3": 0x600E,
    "EXIT_QUALIFICATION": 0x6400,
    "IO_RIP": 0x6408,
    "GUEST_LINEAR_ADDRESS": 0x640A,
    "GUEST_CR0": 0x6800,
    "GUEST_CR3": 0x6802,
    "GUEST_ES_BASE": 0x6806,
    "GUEST_IDTR_BASE": 0x6818,
    "GUEST_DR7": 0x681A,
    "GUEST_RSP": 0x681C,
    "GUEST_RIP": 0x681E,
    "GUEST_RFLAGS": 0x6820,
    "GUEST_PENDING_DEBUG_EXCEPTIONS": 0x6822,
    "GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR": 0x682C,
    "HOST_CR0": 0x6C00,
    "HOST_FS_BASE": 0x6C06,
    "HOST_RSP": 0x6C14,
    "HOST_RIP": 0x6C16,
    "HOST_IA32_INTERRUPT_SSP_TABLE_ADDR": 0x6C1C,
}

# How many fields each table of Appendix B has (64-bit ones counted once; ENCLV, which later editions dropped,
# included), so that a field that got lost or came twice is noticed.
FIELDS_OF_EACH_TABLE = {
    (FieldWidth.U16, FieldType.CONTROL): 5,
    (FieldWidth.U16, FieldType.GUEST_STATE): 11,
    (FieldWidth.U16, FieldType.HOST_STATE): 7,
    (FieldWidth.U64, FieldType.CONTROL): 38,
    (FieldWidth.U64, FieldType.EXIT_INFORMATION): 3,
    (FieldWidth.U64, FieldType.GUEST_STATE): 21,
    (FieldWidth.U64, FieldType.HOST_STATE): 12,
    (FieldWidth.U32, FieldType.CONTROL): 20,
    (FieldWidth.U32, FieldType.EXIT_INFORMATION): 8,
    (FieldWidth.U32, FieldType.GUEST_STATE): 23,
    (FieldWidth.U32, FieldType.HOST_STATE): 1,
    (FieldWidth.NATURAL, FieldType.CONTROL): 8,
    (FieldWidth.NATURAL, FieldType.EXIT_INFORMATION): 6,
    (FieldWidth.NATURAL, FieldType.GUEST_STATE): 23,
    (FieldWidth.NATURAL, FieldType.HOST_STATE): 15,
}

UNUSED_INDICES = {
    (FieldWidth.U64, FieldType.CONTROL): {35, 36, 39, 40},
    (FieldWidth.U32, FieldType.GUEST_STATE): {22},
}


@pytest.mark.parametrize(("name", "encoding"), PRINTED_ENCODINGS.items())
def test_a_field_has_the_encoding_that_the_manual_prints(name: str, encoding: int) -> None:
    assert Field[name] == encoding


def test_each_table_of_appendix_b_is_complete() -> None:
    counts: dict[tuple[FieldWidth, FieldType], int] = {}
    for field in Field:
        counts[field.width, field.type] = counts.get((field.width, field.type), 0) + 1
    assert counts == FIELDS_OF_EACH_TABLE


@pytest.mark.parametrize("table", FIELDS_OF_EACH_TABLE, ids=lambda table: f"{table[0].name}-{table[1].name}")
def test_the_indices_of_a_table_rise_without_gaps_but_the_known_ones(
    table: tuple[FieldWidth, FieldType],
) -> None:
    indices = [field.index for field in Field if (field.width, field.type) == table]
    gaps = UNUSED_INDICES.get(table, set())
    assert indices == [index for index in range(len(indices) + len(gaps)) if index not in gaps]


@pytest.mark.parametrize("part", ["SELECTOR", "LIMIT", "ACCESS_RIGHTS", "BASE"])
def test_segment_registers_come_in_the_order_of_the_manual(part: str) -> None:
    fields = [Field[f"GUEST_{name}_{part}"] for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")]
    assert fields == list(range(fields[0], fields[0] + 16, 2))


@pytest.mark.parametrize("field", Field, ids=lambda field: field.name)
def test_an_encoding_decodes_back_to_what_it_was_made_of(field: Field) -> None:
    assert decode(field) == Encoding(False, field.type, field.width, field.index)
    assert encode(False, field.type, field.width, field.index) == field


@pytest.mark.parametrize("field", Field, ids=lambda field: field.name)
def test_the_name_of_a_state_field_says_where_it_belongs(field: Field) -> None:
    if field.name.startswith("HOST_"):
        assert field.type is FieldType.HOST_STATE
    if field.type is FieldType.HOST_STATE:
        assert field.name.startswith("HOST_")
    if field.name.startswith("GUEST_") and field not in (
        Field.GUEST_PHYSICAL_ADDRESS,
        Field.GUEST_LINEAR_ADDRESS,
    ):
        assert field.type is FieldType.GUEST_STATE


@pytest.mark.parametrize(
    ("field", "bits"),
    [(Field.VPID, 16), (Field.EXIT_REASON, 32), (Field.EPT_POINTER, 64), (Field.GUEST_RIP, 64)],
)
def test_the_width_of_a_field_bounds_its_values(field: Field, bits: int) -> None:
    assert field.bits == bits
    assert field.max == 2**bits - 1


def test_only_64_bit_fields_have_a_high_half() -> None:
    assert Field.IO_BITMAP_A.high_encoding == 0x2001
    assert decode(0x2001) == Encoding(True, FieldType.CONTROL, FieldWidth.U64, 0)
    for field in (Field.VPID, Field.EXIT_REASON, Field.GUEST_RIP):
        with pytest.raises(OutOfRange, match="only 64-bit fields"):
            _ = field.high_encoding


@pytest.mark.parametrize("index", [-1, 0x200])
def test_an_index_of_more_than_9_bits_is_refused(index: int) -> None:
    with pytest.raises(OutOfRange, match="9 bits"):
        encode(False, FieldType.CONTROL, FieldWidth.U16, index)


@pytest.mark.parametrize("encoding", [-1, 1 << 12, 1 << 15, 1 << 31, 1 << 32])
def test_reserved_bits_of_an_encoding_are_refused(encoding: int) -> None:
    with pytest.raises(OutOfRange, match="reserved"):
        decode(encoding)


@pytest.mark.parametrize(
    "text", ["GUEST_RIP", "guest_rip", "guest-rip", " Guest RIP ", "0x681e", "0X681E", "26654"]
)
def test_a_field_is_found_by_any_spelling_of_its_name_or_encoding(text: str) -> None:
    assert Field.parse(text) is Field.GUEST_RIP


def test_the_names_of_later_editions_mean_the_same_fields() -> None:
    assert Field.parse("exiting-event identification") is Field.EXIT_INTERRUPTION_INFORMATION
    assert Field.parse("injected-event error code") is Field.ENTRY_EXCEPTION_ERROR_CODE


def test_an_unknown_name_comes_with_close_ones() -> None:
    with pytest.raises(UnknownField, match="GUEST_RIPP") as caught:
        Field.parse("GUEST_RIPP")
    assert "GUEST_RIP" in caught.value.close
    assert "did you mean GUEST_RIP" in str(caught.value)


@pytest.mark.parametrize("text", ["", "nothing like a field", "0xa", "-1", "0x1ffff"])
def test_what_is_no_field_is_refused(text: str) -> None:
    with pytest.raises(UnknownField):
        Field.parse(text)


def test_the_high_half_of_a_field_is_named_as_such() -> None:
    with pytest.raises(UnknownField, match="0x2001 is its high half"):
        Field.parse("0x2001")
