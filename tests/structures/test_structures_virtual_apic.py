"""The virtual-APIC page and the posted-interrupt descriptor, with the manual's offsets written out."""

from __future__ import annotations

import pytest

from vmxlab.errors import Misaligned, OutOfRange
from vmxlab.sdm.apic import ApicRegister
from vmxlab.structures import PAGE_SIZE, PostedInterruptDescriptor, VirtualApicPage, x2apic_msr


def test_a_fresh_page_is_all_zeros() -> None:
    assert VirtualApicPage().to_bytes() == bytes(PAGE_SIZE)


@pytest.mark.parametrize("offset", [0x000, 0x020, 0x080, 0x084, 0x3F0, 0xFFC])
def test_a_register_is_a_little_endian_word(offset: int) -> None:
    page = VirtualApicPage({offset: 0x1234_5678})
    assert page.to_bytes()[offset : offset + 4] == b"\x78\x56\x34\x12"
    assert page[offset] == 0x1234_5678
    page[offset] = 0
    assert page == VirtualApicPage()


# SDM Vol. 3C, 30.1.1: bit x of a register is bit x & 1FH at offset first | (x & E0H) >> 1.
@pytest.mark.parametrize(
    ("name", "first"), [("requests", 0x200), ("in_service", 0x100), ("level_triggered", 0x180)]
)
def test_every_vector_has_its_own_bit(name: str, first: int) -> None:
    for vector in range(256):
        page = VirtualApicPage(**{name: [vector]})
        data = bytearray(PAGE_SIZE)
        data[(first | (vector & 0xE0) >> 1) + (vector & 0x1F) // 8] = 1 << vector % 8
        assert page.to_bytes() == data, hex(vector)
        assert getattr(page, name) == (vector,)


def test_vectors_are_set_and_cleared_one_by_one() -> None:
    page = VirtualApicPage(requests=[0x41, 0x31], in_service=[0xFE], level_triggered=[0x41])
    page.set_request(0x41, False)
    page.set_request(0x52, True)
    page.set_in_service(0xFE, False)
    page.set_in_service(0x10, True)
    page.set_level_triggered(0x41, False)
    assert (page.requests, page.in_service, page.level_triggered) == ((0x31, 0x52), (0x10,), ())


def test_a_page_survives_its_bytes() -> None:
    data = bytes(range(251)) * 17
    page = VirtualApicPage.from_bytes(data[:PAGE_SIZE])
    assert page.to_bytes() == data[:PAGE_SIZE]
    copy = page.copy()
    copy[0] = 0xFFFF_FFFF
    assert page.to_bytes() == data[:PAGE_SIZE]
    assert copy != page


@pytest.mark.parametrize("offset", [-4, 0x1000, 0xFFE])
def test_an_offset_outside_of_the_page_is_refused(offset: int) -> None:
    with pytest.raises(OutOfRange):
        VirtualApicPage()[offset]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Misaligned):
        VirtualApicPage({0x81: 0})
    with pytest.raises(OutOfRange):
        VirtualApicPage({0x80: 1 << 32})
    with pytest.raises(OutOfRange):
        VirtualApicPage(requests=[256])
    with pytest.raises(OutOfRange):
        VirtualApicPage.from_bytes(bytes(4095))
    with pytest.raises(Misaligned):
        VirtualApicPage().phys_addr(0x10)


def test_a_page_is_laid_out_and_shown() -> None:
    page = VirtualApicPage({ApicRegister.TASK_PRIORITY: 0x30, 0x404: 1})
    assert page.pages(0x5000) == [(0x5000, page.to_bytes())]
    assert repr(page) == "<VirtualApicPage: TASK_PRIORITY=0x30, 0x404=0x1>"
    assert repr(VirtualApicPage()) == "<VirtualApicPage: all zero>"


def test_registers_have_msrs_in_x2apic_mode() -> None:
    """SDM Vol. 3A, 11.12.1.2."""
    assert [x2apic_msr(offset) for offset in (0x020, 0x080, 0x0B0, 0x300, 0x3F0)] == [
        *(0x802, 0x808, 0x80B, 0x830, 0x83F)
    ]
    with pytest.raises(Misaligned):
        x2apic_msr(0x84)


def test_a_posted_interrupt_descriptor() -> None:
    """SDM Vol. 3C, table 30-1: requests in 255:0, outstanding notification in 256, software's rest."""
    for vector in range(256):
        data = bytearray(64)
        data[vector // 8] = 1 << vector % 8
        assert PostedInterruptDescriptor((vector,)).to_bytes() == data
    assert PostedInterruptDescriptor(outstanding_notification=True).to_bytes()[32] == 1
    assert PostedInterruptDescriptor(software=1 << 254 | 1).to_bytes()[32:] == b"\x02" + bytes(30) + b"\x80"
    full = PostedInterruptDescriptor((3, 1, 3, 200), True, 0x55)
    assert full.requests == (1, 3, 200)
    assert PostedInterruptDescriptor.from_bytes(full.to_bytes()) == full


def test_what_no_descriptor_can_hold_is_refused() -> None:
    for wrong in ({"requests": (256,)}, {"software": 1 << 255}):
        with pytest.raises(OutOfRange):
            PostedInterruptDescriptor(**wrong)
    with pytest.raises(OutOfRange):
        PostedInterruptDescriptor.from_bytes(bytes(63))
    assert PostedInterruptDescriptor().phys_addr(0x1040) == 0x1040
    with pytest.raises(Misaligned):
        PostedInterruptDescriptor().phys_addr(0x1020)
    with pytest.raises(OutOfRange):
        PostedInterruptDescriptor().phys_addr(1 << 40, width=40)
