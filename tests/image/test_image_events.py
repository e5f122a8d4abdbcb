"""Cases that send interrupts: their script says so, and what the second processor runs."""

from __future__ import annotations

import pytest

from vmxlab import ExitReason, MemoryType, guest_ept, on
from vmxlab.cases.memory import DATA, machine_address
from vmxlab.cases.steps import STANDARD, ApicRead, ApicWrite, Store
from vmxlab.errors import OutOfRange, OverlappingPages
from vmxlab.image import layout
from vmxlab.sdm.apic import APIC_DEFAULT_BASE, ApicRegister

EOI = ApicRegister.EOI


def ept_with_apic(length: int = 0x1000):
    """L2's own memory, and at 1 GiB a page of `length` with the local APIC in it."""
    ept = guest_ept()
    size = {0x1000: 0, 1 << 21: 1, 1 << 30: 2}[length]
    from vmxlab import PageSize

    ept.map(1 << 30, APIC_DEFAULT_BASE & -length, tuple(PageSize)[size], memory_type=MemoryType.UC)
    return ept


ENTRY = (APIC_DEFAULT_BASE | 7).to_bytes(8, "little")

USERS = {
    "step-writes": {"steps": (ApicWrite(EOI, 0), *STANDARD)},
    "step-reads": {"steps": (ApicRead(EOI), *STANDARD)},
    "reaction": {"reactions": [on(ExitReason.CPUID).apic_write(EOI, 0)]},
    "ept-4k": {"ept": ept_with_apic()},
    "ept-2m": {"ept": ept_with_apic(1 << 21)},
    "ept-1g": {"ept": ept_with_apic(1 << 30)},
    "tables-of-its-own": {"memory": {layout.FREE_PAGES: bytes(16) + ENTRY}},
    "tables-of-l2": {"data": {DATA: ENTRY}},
    "reaction-maps-it": {"reactions": [on(ExitReason.CPUID).write(layout.FREE_PAGES, ENTRY)]},
    "step-maps-it": {"steps": (Store(layout.FREE_PAGES, ENTRY), *STANDARD)},
    "second-processor": {"second_program": "nop"},
}


@pytest.mark.parametrize("case", USERS.values(), ids=USERS)
def test_a_case_that_may_reach_the_apic_says_so_before_its_steps(script_of, case):
    names = script_of(**case).names
    assert names.count("APIC_USED") == 1
    assert names.index("APIC_USED") < names.index("VMXON")


@pytest.mark.parametrize("case", [{}, {"ept": guest_ept()}, {"reactions": [on(ExitReason.CPUID).skip()]}])
def test_other_cases_leave_the_apic_alone(script_of, case):
    assert "APIC_USED" not in script_of(**case).names


def test_the_second_processors_program_is_32_bit_code_and_knows_the_machines_addresses(script_of):
    script = script_of(second_program="mov eax, [DATA]; mov [APIC + 0xb0], eax")
    assert script.one("SECOND_PROCESSOR")["program"] == layout.SECOND_PROGRAM
    load = b"\xa1" + machine_address(DATA).to_bytes(4, "little")
    store = b"\xa3" + (APIC_DEFAULT_BASE + 0xB0).to_bytes(4, "little")
    halt_for_ever = b"\xf4\xeb\xfd"
    code = load + store + halt_for_ever
    assert script.read()(layout.SECOND_PROGRAM, len(code)) == code


def test_the_second_processor_starts_when_memory_is_laid_out_and_before_the_first_step(script_of):
    script = script_of(second_program=b"\xf4", memory={layout.FREE_PAGES: b"x"})
    names = [operation.name for operation in script.operations]
    start = names.index("SECOND_PROCESSOR")
    assert max(i for i, name in enumerate(names) if name in ("DATA", "FILL", "SEQUENCE")) < start
    assert start < names.index("VMXON")


def test_the_second_processors_program_has_a_place_of_its_own(refused):
    error = refused(OverlappingPages, second_program="nop", memory={layout.SECOND_PROGRAM: b"x"})
    assert "second processor's program" in error.message


def test_a_case_says_how_many_processors_it_needs(compiled):
    assert compiled().case.processors == 1
    assert compiled(second_program="").case.processors == 2


@pytest.mark.parametrize("offset", [-16, 0x1000, 0x301])
def test_what_is_no_register_of_the_apic_is_refused(offset):
    for use in (lambda: ApicRead(offset), lambda: ApicWrite(offset, 0)):
        with pytest.raises(OutOfRange):
            use()
    with pytest.raises(OutOfRange):
        on(ExitReason.CPUID).apic_write(offset, 0)


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_apic_registers_have_32_bits(value):
    with pytest.raises(OutOfRange):
        ApicWrite(EOI, value)
    with pytest.raises(OutOfRange):
        on(ExitReason.CPUID).apic_write(EOI, value)
