"""A case's virtual APIC and MSR areas: their bytes, where they lie, and the fields that say so.

SDM Vol. 3C, 25.6.8 (APIC virtualization), 25.7.2 and 25.8.2 (MSR areas). The fields exist only on processors
with the controls that use them, so they are written only with those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmxlab.cases.case import Case
from vmxlab.errors import OutOfRange
from vmxlab.image import layout
from vmxlab.sdm.controls import ControlSet, PinControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.structures import MsrArea, PostedInterruptDescriptor, VirtualApicPage


@dataclass(frozen=True, slots=True)
class Areas:
    """Memory to fill, as (address, bytes, what it is), and VMCS fields."""

    memory: list[tuple[int, bytes, str]] = field(default_factory=list)
    fields: dict[Field, int] = field(default_factory=dict)


def areas_of(case: Case, controls: Mapping[ControlSet, int], secondary: int) -> Areas:
    """What `case` needs with these controls. A structure that is used and not given is all zeros."""
    areas = Areas()
    _add_virtual_apic(areas, case, controls, secondary)
    _add_posted_interrupts(areas, case, controls)
    for area, (base, address, count) in zip(
        (case.entry_msr_load, case.exit_msr_store, case.exit_msr_load), _MSR_AREAS, strict=True
    ):
        if area is not None:
            _add_msr_area(areas, area, base)
            areas.fields.update({address: base, count: len(area)})
    return areas


def _add_virtual_apic(areas: Areas, case: Case, controls: Mapping[ControlSet, int], secondary: int) -> None:
    page = case.virtual_apic_page
    if page is None and controls[ControlSet.PRIMARY] & PrimaryControls.USE_TPR_SHADOW:
        page = VirtualApicPage()
    if page is not None:
        areas.memory.append((layout.VIRTUAL_APIC_PAGE, page.to_bytes(), "virtual-APIC page"))
        areas.fields.update({Field.VIRTUAL_APIC_ADDRESS: layout.VIRTUAL_APIC_PAGE, Field.TPR_THRESHOLD: 0})
    if secondary & SecondaryControls.VIRTUALIZE_APIC_ACCESSES:
        areas.memory.append((layout.APIC_ACCESS_PAGE, bytes(4096), "APIC-access page"))
        areas.fields[Field.APIC_ACCESS_ADDRESS] = layout.APIC_ACCESS_PAGE
    if secondary & SecondaryControls.VIRTUAL_INTERRUPT_DELIVERY:
        areas.fields.update(dict.fromkeys(_EOI_EXIT_BITMAPS, 0))
        areas.fields[Field.GUEST_INTERRUPT_STATUS] = 0


def _add_posted_interrupts(areas: Areas, case: Case, controls: Mapping[ControlSet, int]) -> None:
    descriptor = case.posted_interrupts
    if descriptor is None and controls[ControlSet.PIN] & PinControls.PROCESS_POSTED_INTERRUPTS:
        descriptor = PostedInterruptDescriptor()
    if descriptor is not None:
        base = layout.POSTED_INTERRUPT_DESCRIPTOR
        areas.memory.append((base, descriptor.to_bytes(), "posted-interrupt descriptor"))
        areas.fields[Field.POSTED_INTERRUPT_DESCRIPTOR_ADDRESS] = base


def _add_msr_area(areas: Areas, area: MsrArea, base: int) -> None:
    content = area.to_bytes()
    if len(content) > layout.MSR_AREA_BYTES:
        raise OutOfRange(
            "length of an MSR area", len(content), f"there is room for {layout.MSR_AREA_BYTES:#x} bytes"
        )
    if content:
        areas.memory.append((base, content, "MSR area"))


_MSR_AREAS = (
    (layout.ENTRY_MSR_LOAD_AREA, Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT),
    (layout.EXIT_MSR_STORE_AREA, Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT),
    (layout.EXIT_MSR_LOAD_AREA, Field.EXIT_MSR_LOAD_ADDRESS, Field.EXIT_MSR_LOAD_COUNT),
)

_EOI_EXIT_BITMAPS = (
    Field.EOI_EXIT_BITMAP_0,
    Field.EOI_EXIT_BITMAP_1,
    Field.EOI_EXIT_BITMAP_2,
    Field.EOI_EXIT_BITMAP_3,
)
