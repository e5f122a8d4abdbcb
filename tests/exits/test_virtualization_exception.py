"""Virtualization exceptions in place of EPT violations (SDM Vol. 3C, 26.5.7)."""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    EPTPointer,
    ExitReason,
    Field,
    InstructionError,
    Mode,
    OutcomeKind,
    PageSize,
    SecondaryControls,
    guest_ept,
)
from vmxlab.cases.memory import DATA, IDT, PAGE_TABLES, PROGRAM, STACK_TOP, UNMAPPED, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, Vector
from vmxlab.structures import EptpList, VmFunc
from vmxlab.structures import VirtualizationExceptionInformation as Information
from vmxlab.structures.ept_entry import SUPPRESS_VE
from vmxlab.structures.virtualization_exception import IN_USE

from .guest_setups import CODE_SELECTOR, frame, gate, handled, merged

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.EPT_VIOLATION_VE)

AREA = FREE_PAGES
AREA_IN_L2 = 0x40_0000
"""Where L2 may be given the information area, as a handler would want it."""
INDEX = 0x1234
PAGE = DATA + 0x8000
READ, WRITE, FETCH = "mov rbx, [rdi]", "mov [rdi], rbx", "jmp rdi"
BITS = {READ: 1 << 0, WRITE: 1 << 1, FETCH: 1 << 2}
LINEAR_VALID, TRANSLATED = 1 << 7, 1 << 8
DEFINED = 0x1BF | 1 << 12
"""Bits of the qualification that are defined without advanced information and mode-based execute control."""


def ve_case(program: str, *, area: Information | None = None, **more) -> Case:
    """#VE is on, and delivered by L2's IDT unless `fields` says otherwise; the area is reported."""
    parts = merged(
        handled(Vector.VE),
        {key: more.pop(key) for key in ("data", "fields") if key in more},
    )
    parts["fields"] = {
        Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: AREA,
        Field.EPTP_INDEX: INDEX,
        **parts["fields"],
    }
    content = Information() if area is None else area
    return Case(
        program=program,
        enable=(S.EPT_VIOLATION_VE, *more.pop("enable", ())),
        memory={AREA: content.to_bytes(), **more.pop("memory", {})},
        steps=(*STANDARD, ReportMemory(AREA, 0x1000)),
        **parts,
        **more,
    )


def area_of(run) -> Information:
    return Information.from_bytes(run.memory[AREA])


def check_area(
    run, *, kind: int, linear: int, physical: int, allowed: int = 0, translated: bool = True
) -> None:
    """Vol. 3C, Table 26-1: every field but the EPTP index, and nothing behind them."""
    area = area_of(run)
    assert area.exit_reason == ExitReason.EPT_VIOLATION
    assert area.in_use == IN_USE
    expected = kind | allowed << 3 | LINEAR_VALID | (TRANSLATED if translated else 0)
    assert area.raw_qualification & DEFINED == expected
    assert area.guest_linear_address == linear
    assert area.guest_physical_address == physical
    assert not any(run.memory[AREA][34:])


def check_delivered(run, *, rip: int) -> None:
    """L2's handler ran, and its frame is that of a fault at `rip` without error code."""
    assert run.reasons == [ExitReason.HLT], run.exits
    assert frame(run.exits[0].registers) == {
        "rip": rip,
        "cs": CODE_SELECTOR,
        "rflags": RFLAGS.RF | RFLAGS.FIXED1,
        "rsp": STACK_TOP,
        "ss": 0x10,
    }


# --- the exception and its information ---------------------------------------------------------------------


@pytest.mark.parametrize("access", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
def test_an_access_to_an_unmapped_page_is_a_virtualization_exception(vmxlab, access):
    """Vol. 3C, 26.5.7: no exit; L2's handler runs, and the area holds what the exit would have recorded."""
    address = UNMAPPED + 0x345
    run = vmxlab.run(ve_case(f"nop; {access}; hlt", registers={"rdi": address}))
    check_delivered(run, rip=address if access == FETCH else PROGRAM + 1)
    check_area(run, kind=BITS[access], linear=address, physical=address)


@pytest.mark.parametrize(("access", "rights"), [(WRITE, 0b101), (WRITE, 0b001), (FETCH, 0b011)])
def test_rights_that_a_page_lacks_are_a_virtualization_exception(vmxlab, access, rights):
    """Vol. 3C, 26.5.7.1: of an entry that maps a page bit 63 decides; here it is 0."""
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, write=bool(rights & 2), execute=bool(rights & 4))
    run = vmxlab.run(ve_case(f"nop; {access}; hlt", registers={"rdi": PAGE}, ept=ept))
    check_delivered(run, rip=PAGE if access == FETCH else PROGRAM + 1)
    check_area(run, kind=BITS[access], linear=PAGE, physical=PAGE, allowed=rights)


def test_a_violation_in_the_walk_of_l2s_paging_is_one_too(vmxlab):
    """Vol. 3C, 26.5.7.1: any EPT violation may be convertible; bit 8 of the qualification is clear here."""
    linear = 0x2000_0000_0000
    entry = PAGE_TABLES + 8 * (linear >> 39)
    run = vmxlab.run(
        ve_case(
            f"mov rax, {UNMAPPED | 3}; mov [{entry:#x}], rax; mov rdi, {linear}; mov rbx, [rdi]; hlt",
            registers={"rdi": linear},
        )
    )
    assert run.reasons == [ExitReason.HLT]
    check_area(run, kind=BITS[READ], linear=linear, physical=UNMAPPED, translated=False)


def test_a_handler_that_maps_the_page_and_releases_the_area_goes_on(vmxlab):
    """Vol. 3C, 26.5.7.1: with the 32 bits at offset 4 cleared the next violation is #VE again."""
    handler = 0x1B000
    # The handler counts, skips the access, and releases the area as software must.
    code = "48 ff c1 48 83 04 24 03 31 c0 89 04 25 04 00 40 00 48 cf"
    ept = guest_ept()
    ept.map(AREA_IN_L2, AREA)
    run = vmxlab.run(
        ve_case(
            "mov rbx, [rdi]; mov rbx, [rdi]; mov rbx, [rdi]; hlt",
            registers={"rdi": UNMAPPED},
            ept=ept,
            data={IDT + 16 * Vector.VE: gate(handler), handler: bytes.fromhex(code)},
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].rip == PROGRAM + 9
    assert run.exits[0].registers["rcx"] == 3
    assert area_of(run).in_use == 0


@pytest.mark.vmx_known_difference("ve-eptp-index-of-the-field")
def test_the_information_holds_the_eptp_index_of_the_vmcs(vmxlab):
    """Vol. 3C, 25.6.20 and Table 26-1: the 16 bits at offset 32 are those of the field EPTP index."""
    run = vmxlab.run(ve_case(READ, registers={"rdi": UNMAPPED}))
    check_delivered(run, rip=PROGRAM)
    assert area_of(run).eptp_index == INDEX


@pytest.mark.vmx_needs(S.ENABLE_VM_FUNCTIONS, VmFunc.eptp_switching)
def test_the_information_holds_the_eptp_index_of_the_last_switch(vmxlab):
    """Vol. 3C, 26.5.6.3: EPTP switching changes the EPTP index of the virtualization exceptions behind it."""
    eptp_list = AREA + 0x1000
    run = vmxlab.run(
        ve_case(
            f"mov ecx, 300; vmfunc; {READ}; hlt",
            registers={"rdi": UNMAPPED},
            enable=(S.ENABLE_VM_FUNCTIONS,),
            fields={Field.VM_FUNCTION_CONTROLS: 1, Field.EPTP_LIST_ADDRESS: eptp_list},
            memory={eptp_list: EptpList([0] * 300 + [EPTPointer(address=EPT_TABLES)]).to_bytes()},
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert frame(run.exits[0].registers)["rip"] == PROGRAM + 8
    assert area_of(run).eptp_index == 300


# --- what exits all the same -------------------------------------------------------------------------------


def check_violation(exit_, *, physical: int, rip: int) -> None:
    assert exit_.full_reason == ExitReason.EPT_VIOLATION, exit_
    assert exit_.guest_physical_address == physical
    assert exit_.rip == rip
    assert not exit_.interruption.valid


@pytest.mark.parametrize("in_use", [IN_USE, 1, 0x8000_0000])
def test_an_area_in_use_makes_violations_exit(vmxlab, in_use):
    """Vol. 3C, 26.5.7.1: only where the 32 bits at offset 4 are all 0 is it an exception; the area stays."""
    area = Information(in_use=in_use, guest_linear_address=0x77)
    run = vmxlab.run(ve_case("nop; mov rbx, [rdi]; hlt", area=area, registers={"rdi": UNMAPPED}))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], physical=UNMAPPED, rip=PROGRAM + 1)
    assert not run.exits[0].idt_vectoring.valid
    assert area_of(run) == area


def test_an_entry_that_is_not_present_may_suppress_the_exception(vmxlab):
    """Vol. 3C, 26.5.7.1: bit 63 of the entry that is not present is 1: an ordinary exit."""
    for level in (1, 2):
        ept = guest_ept()
        ept.map(UNMAPPED + 0x1000, machine_address(PAGE))
        target = UNMAPPED if level == 1 else 0x40_0000
        ept.set_raw_entry(target, level, SUPPRESS_VE)
        run = vmxlab.run(ve_case("nop; mov rbx, [rdi]; hlt", ept=ept, registers={"rdi": target}))
        assert run.reasons == [ExitReason.EPT_VIOLATION], level
        check_violation(run.exits[0], physical=target, rip=PROGRAM + 1)
        assert area_of(run) == Information()


@pytest.mark.parametrize("size", [PageSize.SIZE_4K, PageSize.SIZE_2M])
def test_a_page_may_suppress_the_exception(vmxlab, size):
    """Vol. 3C, 26.5.7.1: bit 63 of the entry that maps the page is 1: what it forbids exits."""
    if size is PageSize.SIZE_2M:
        vmxlab.require_ept("page_2m")
    far = 0x80_0000
    ept = guest_ept()
    ept.map(far, FREE_PAGES + 0x20_0000, size, write=False, suppress_ve=True)
    run = vmxlab.run(ve_case("nop; mov rbx, [rdi]; mov [rdi], rbx; hlt", ept=ept, registers={"rdi": far}))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], physical=far, rip=PROGRAM + 4)
    assert area_of(run) == Information()


def test_the_suppress_bit_of_an_entry_that_leads_to_a_table_is_not_used(vmxlab):
    """Vol. 3C, 26.5.7.1: bit 63 of such an entry has no say in what is below it."""
    ept = guest_ept()
    ept.map(UNMAPPED + 0x1000, machine_address(PAGE))
    ept.set_table_entry(UNMAPPED, 2, SUPPRESS_VE | 7)
    run = vmxlab.run(ve_case("nop; mov rbx, [rdi]; hlt", ept=ept, registers={"rdi": UNMAPPED}))
    check_delivered(run, rip=PROGRAM + 1)


def test_a_violation_in_the_delivery_of_an_event_exits(vmxlab):
    """Vol. 3C, 26.5.7.1: not while an event is delivered; here the stack is not mapped."""
    case = ve_case("nop; ud2", registers={"rsp": UNMAPPED + 0x800}, **handled(Vector.UD, Vector.VE))
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], physical=UNMAPPED + 0x7F8, rip=PROGRAM + 1)
    event = run.exits[0].idt_vectoring
    assert (event.vector, event.type) == (Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    assert area_of(run) == Information()


def test_a_virtualization_exception_that_can_not_be_delivered_is_the_vectored_event(vmxlab):
    """Vol. 3C, 26.5.7.3 and 28.2.4: a violation in the delivery of #VE exits, and names it."""
    case = ve_case("nop; mov rbx, [rdi]", registers={"rdi": UNMAPPED, "rsp": UNMAPPED + 0x800})
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], physical=UNMAPPED + 0x7F8, rip=PROGRAM + 1)
    event = run.exits[0].idt_vectoring
    assert (event.vector, event.type) == (Vector.VE, InterruptionType.HARDWARE_EXCEPTION)
    assert not event.error_code_valid
    check_area(run, kind=BITS[READ], linear=UNMAPPED, physical=UNMAPPED)


@pytest.mark.vmx_needs(S.UNRESTRICTED_GUEST)
def test_violations_in_real_mode_exit(vmxlab):
    """Vol. 3C, 26.5.7.1: there are no virtualization exceptions with CR0.PE = 0."""
    ept = guest_ept()
    ept.unmap(0x9000, 0x1000)
    run = vmxlab.run(
        Case(
            program="nop; mov al, [0x9123]; hlt",
            mode=Mode.REAL,
            ept=ept,
            enable=S.EPT_VIOLATION_VE,
            fields={
                Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: AREA,
                Field.EXCEPTION_BITMAP: 0xFFFF_FFFF,
            },
            memory={AREA: bytes(0x1000)},
        )
    )
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    check_violation(run.exits[0], physical=0x9123, rip=PROGRAM + 1)


def test_a_misconfiguration_is_no_virtualization_exception(vmxlab):
    """Vol. 3C, 26.5.7: EPT violations alone are converted."""
    ept = guest_ept()
    ept.map(UNMAPPED, machine_address(PAGE), read=False, write=True, execute=False)
    run = vmxlab.run(ve_case("nop; mov rbx, [rdi]; hlt", ept=ept, registers={"rdi": UNMAPPED}))
    assert run.reasons == [ExitReason.EPT_MISCONFIGURATION]
    assert area_of(run) == Information()


# --- the exception as an exit ------------------------------------------------------------------------------


def test_with_its_bit_in_the_exception_bitmap_it_exits_as_an_exception(vmxlab):
    """Vol. 3C, 26.5.7.3: with bit 20 an exit by exception, behind the write of the information."""
    case = ve_case(
        "nop; mov [rdi], rbx; hlt",
        registers={"rdi": UNMAPPED + 8},
        fields={Field.EXCEPTION_BITMAP: 0xFFFF_FFFF},
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    event = exit_.interruption
    assert (event.vector, event.type) == (Vector.VE, InterruptionType.HARDWARE_EXCEPTION)
    assert not event.error_code_valid
    assert exit_.raw_qualification == 0
    assert not exit_.idt_vectoring.valid
    assert exit_.rip == PROGRAM + 1
    check_area(run, kind=BITS[WRITE], linear=UNMAPPED + 8, physical=UNMAPPED + 8)


# --- VM entry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [AREA + 8, AREA | 1 << 62], ids=["misaligned", "too-wide"])
def test_vm_entry_checks_the_address_of_the_area(vmxlab, address):
    """Vol. 3C, 27.2.1.1: 4-KByte aligned, and within the physical-address width: else VMfail(7)."""
    case = ve_case("hlt", fields={Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS: address})
    run = vmxlab.run(case)
    assert not run.exits
    assert run.entry.kind is OutcomeKind.FAIL_VALID
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
