"""A case's virtual APIC, posted interrupts and MSR areas: what lies where, and the fields that say so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmxlab import (
    Capabilities,
    Case,
    Field,
    MsrArea,
    PinControls,
    PostedInterruptDescriptor,
    PrimaryControls,
    SecondaryControls,
    VirtualApicPage,
)
from vmxlab.errors import MissingCapability, OutOfRange
from vmxlab.image import layout

SHADOW = PrimaryControls.USE_TPR_SHADOW
APIC_FIELDS = (
    Field.VIRTUAL_APIC_ADDRESS,
    Field.TPR_THRESHOLD,
    Field.APIC_ACCESS_ADDRESS,
    Field.GUEST_INTERRUPT_STATUS,
    Field.EOI_EXIT_BITMAP_0,
    Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
)


def test_a_case_that_uses_none_of_it_has_none_of_its_fields(script_of):
    fields = script_of().fields
    assert not set(APIC_FIELDS) & set(fields)
    assert fields[Field.ENTRY_MSR_LOAD_COUNT] == 0
    assert Field.ENTRY_MSR_LOAD_ADDRESS not in fields


def test_a_page_that_is_given_is_used(script_of):
    page = VirtualApicPage({0x80: 0x50, 0x300: 7})
    script = script_of(virtual_apic_page=page)
    assert script.fields[Field.PRIMARY_PROCESSOR_BASED_CONTROLS] & SHADOW
    assert script.fields[Field.TPR_THRESHOLD] == 0
    address = script.fields[Field.VIRTUAL_APIC_ADDRESS]
    assert address == layout.VIRTUAL_APIC_PAGE
    assert script.read()(address) == page.to_bytes()


def test_what_is_used_and_not_given_is_all_zeros(script_of):
    controls = (
        SHADOW,
        SecondaryControls.VIRTUALIZE_APIC_ACCESSES,
        SecondaryControls.VIRTUAL_INTERRUPT_DELIVERY,
    )
    script = script_of(enable=controls)
    read = script.read()
    for field in (Field.VIRTUAL_APIC_ADDRESS, Field.APIC_ACCESS_ADDRESS):
        assert read(script.fields[field]) == bytes(4096)
    zero = (Field.GUEST_INTERRUPT_STATUS, *(Field[f"EOI_EXIT_BITMAP_{n}"] for n in range(4)))
    assert all(script.fields[field] == 0 for field in zero)


def test_a_page_of_the_case_can_not_be_changed_later(script_of):
    page = VirtualApicPage()
    case = Case(virtual_apic_page=page)
    page[0x80] = 0x10
    assert case.virtual_apic_page == VirtualApicPage()


def test_posted_interrupts_that_a_processor_lacks_are_named(refused):
    error = refused(MissingCapability, posted_interrupts=PostedInterruptDescriptor())
    assert "PROCESS_POSTED_INTERRUPTS" in str(error)


@pytest.mark.parametrize("kind", ["entry_msr_load", "exit_msr_store", "exit_msr_load"])
def test_an_msr_area_is_laid_out_with_its_count(script_of, kind):
    area = MsrArea([(0xC000_0081, 1), (0xC000_0082, 2), (0xC000_0081, 3)])
    script = script_of(**{kind: area})
    address = script.fields[Field[f"{kind.upper()}_ADDRESS"]]
    assert script.fields[Field[f"{kind.upper()}_COUNT"]] == 3
    assert script.read()(address, 48) == area.to_bytes()


def test_the_three_areas_have_places_of_their_own(script_of):
    full = MsrArea.of_msrs([0xC000_0081] * (layout.MSR_AREA_BYTES // 16))
    fields = script_of(entry_msr_load=full, exit_msr_store=full, exit_msr_load=full).fields
    kinds = ("ENTRY_MSR_LOAD", "EXIT_MSR_STORE", "EXIT_MSR_LOAD")
    starts = [fields[Field[f"{kind}_ADDRESS"]] for kind in kinds]
    assert all(start % 4096 == 0 for start in starts)
    assert starts[0] + layout.MSR_AREA_BYTES <= starts[1]
    assert starts[1] + layout.MSR_AREA_BYTES <= starts[2]


def test_an_area_without_entries_is_no_memory(script_of):
    script = script_of(exit_msr_store=MsrArea())
    assert script.fields[Field.EXIT_MSR_STORE_COUNT] == 0


def test_an_area_that_is_too_long_is_refused(refused):
    error = refused(OutOfRange, entry_msr_load=MsrArea.of_msrs([1] * 4097))
    assert "MSR area" in str(error)


def test_a_field_of_the_case_wins_over_the_structures(script_of):
    fields = {Field.EXIT_MSR_LOAD_COUNT: 7, Field.VIRTUAL_APIC_ADDRESS: 0x123, Field.TPR_THRESHOLD: 3}
    script = script_of(exit_msr_load=MsrArea([(1, 2)]), virtual_apic_page=VirtualApicPage(), fields=fields)
    assert {field: script.fields[field] for field in fields} == fields


def test_a_descriptor_is_laid_out_where_a_processor_has_it(compiled, read_script, target_for, processors):
    raw = dict(processors["skylake"].raw)
    for msr in (0x481, 0x48D):
        raw[msr] |= 1 << 39  # "process posted interrupts" may be 1
    target = replace(target_for("skylake"), capabilities=Capabilities(raw))
    descriptor = PostedInterruptDescriptor((0x41,), outstanding_notification=True)
    done = compiled(target=target, posted_interrupts=descriptor)
    assert done.fields[Field.PIN_BASED_CONTROLS] & PinControls.PROCESS_POSTED_INTERRUPTS
    address = done.fields[Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS]
    assert address == layout.POSTED_INTERRUPT_DESCRIPTOR
    script = read_script(b"".join(done.units))
    assert script.read()(address, 64) == descriptor.to_bytes()
    empty = compiled(target=target, enable=PinControls.PROCESS_POSTED_INTERRUPTS)
    assert empty.fields[Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS] == address
