"""Page-modification logging (SDM Vol. 3C, 29.3.6): what is logged, in what order, and the full log."""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    EPTPointer,
    ExitReason,
    Field,
    InstructionError,
    PageSize,
    PinControls,
    SecondaryControls,
    guest_ept,
    on,
)
from vmxlab.cases.memory import DATA, GDT, IDT, L2_MEMORY_BYTES, PAGE_TABLES, PROGRAM, STACK_TOP
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import EPT_TABLES, FREE_PAGES
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, InterruptibilityState, Vector
from vmxlab.structures import PageModificationLog
from vmxlab.structures.ept_entry import ACCESSED, REFERENCE

from .guest_setups import handled

S = SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.ENABLE_PML)

LOG = FREE_PAGES
LARGE_PAGE = FREE_PAGES + 0x20_0000
WITH_FLAGS = EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=True)
PAGES = [DATA + 0x1000 * n for n in range(8)]
FAR = 0x80_0000
"""A guest-physical address that the tests map by a large page."""
CODE_LENGTH = 7
"""Of each access in these programs: MOV with a 32-bit address."""


def clean(*pages: int, accessed: bool = True):
    """The default EPT with accessed and dirty flags set in all entries, but dirty clear in these pages."""
    ept = guest_ept()
    ept.protect(0, L2_MEMORY_BYTES, accessed=True, dirty=True)
    for level in (4, 3, 2):
        ept.set_table_entry(0, level, REFERENCE | ACCESSED)
    for page in pages:
        ept.protect(page, 0x1000, accessed=accessed, dirty=False)
    return ept


def log_case(program: str, ept, *, index: int = 511, eptp=WITH_FLAGS, **more) -> Case:
    fields = {Field.PML_ADDRESS: LOG, Field.PML_INDEX: index, **more.pop("fields", {})}
    return Case(
        program=program,
        ept=ept,
        eptp=eptp,
        enable=(S.ENABLE_PML, *more.pop("enable", ())),
        fields=fields,
        memory={LOG: bytes(0x1000), **more.pop("memory", {})},
        watch=[Field.PML_INDEX, *more.pop("watch", ())],
        steps=(*STANDARD, ReportMemory(LOG, 0x1000)),
        **more,
    )


def index_of(exit_) -> int:
    return exit_.watched[Field.PML_INDEX]


def log_of(run) -> PageModificationLog:
    return PageModificationLog.from_bytes(run.memory[LOG])


def logged(run, first: int = 511) -> list[int]:
    """What was written; and nothing was written to any other entry."""
    log, index = log_of(run), index_of(run.exits[-1])
    entries = list(log.logged(index, first))
    assert [entry for entry in log.entries if entry] == entries[::-1]
    return entries


def store(address: int) -> str:
    return f"mov [{address:#x}], eax"


# --- what is logged ----------------------------------------------------------------------------------------


def test_pages_are_logged_in_the_order_of_the_writes(vmxlab):
    """Vol. 3C, 29.3.6: each write that sets a dirty flag writes an entry and decrements the PML index."""
    order = [PAGES[5], PAGES[0], PAGES[7], PAGES[2]]
    run = vmxlab.run(log_case("; ".join(map(store, order)) + "; hlt", clean(*PAGES)))
    assert run.reasons == [ExitReason.HLT]
    assert index_of(run.exits[0]) == 511 - len(order)
    assert logged(run) == order


@pytest.mark.vmx_known_difference("pml-entry-low-bits")
def test_an_entry_is_the_address_of_the_page(vmxlab):
    """Vol. 3C, 29.3.6: bits 11:0 of an entry are 0, wherever in the page the access was."""
    program = "; ".join(store(page + 0x123 * (n + 1)) for n, page in enumerate(PAGES)) + "; hlt"
    run = vmxlab.run(log_case(program, clean(*PAGES)))
    assert logged(run) == PAGES


def test_only_the_write_that_sets_the_dirty_flag_is_logged(vmxlab):
    """Vol. 3C, 29.3.6: a page that is dirty already, or only read, is not logged (again)."""
    program = "; ".join(
        [
            store(PAGES[0]),
            store(PAGES[0] + 8),
            store(PAGES[1]),
            f"mov ebx, [{PAGES[2]:#x}]",
            store(PAGES[0]),
            "hlt",
        ]
    )
    run = vmxlab.run(log_case(program, clean(PAGES[0], PAGES[2])))
    assert run.reasons == [ExitReason.HLT]
    assert logged(run) == [PAGES[0]]


def test_setting_an_accessed_flag_is_not_logged(vmxlab):
    """Vol. 3C, 29.3.6: an entry is written where a dirty flag was changed from 0 to 1, and only there."""
    program = f"mov ebx, [{PAGES[0]:#x}]; {store(PAGES[1])}; hlt"
    run = vmxlab.run(log_case(program, clean(*PAGES[:2], accessed=False)))
    assert run.reasons == [ExitReason.HLT]
    assert logged(run) == [PAGES[1]]


def test_the_log_goes_on_from_the_index_that_it_is_given(vmxlab):
    """Vol. 3C, 29.3.6: the entry is at the PML address plus 8 times the PML index, and 0 becomes FFFFH."""
    program = "; ".join(map(store, PAGES[:3])) + "; hlt"
    run = vmxlab.run(log_case(program, clean(*PAGES), index=2))
    assert run.reasons == [ExitReason.HLT]
    assert index_of(run.exits[0]) == 0xFFFF
    assert log_of(run).entries[:4] == (PAGES[2], PAGES[1], PAGES[0], 0)


def test_an_access_across_pages_logs_both(vmxlab):
    """Vol. 3C, 29.3.6: a write to two pages sets two dirty flags, each with its entry."""
    run = vmxlab.run(log_case(f"mov [{PAGES[1] - 3:#x}], rax; hlt", clean(*PAGES)))
    assert sorted(entry & ~0xFFF for entry in logged(run)) == [PAGES[0], PAGES[1]]


@pytest.mark.parametrize(("size", "feature"), [(PageSize.SIZE_2M, "page_2m"), (PageSize.SIZE_1G, "page_1g")])
def test_a_write_to_a_large_page_logs_the_4_kib_of_the_access(vmxlab, size, feature):
    """Vol. 3C, 29.3.6: the guest-physical address of the access, whatever the size of the page; once."""
    vmxlab.require_ept(feature)
    base = FAR if size is PageSize.SIZE_2M else 1 << 30
    ept = clean()
    ept.map(base, LARGE_PAGE if size is PageSize.SIZE_2M else 0, size)
    address = base + (0x5000 if size is PageSize.SIZE_2M else LARGE_PAGE + 0x5000)
    # L2's page tables map 1 GiB; its second GiB needs one of its own.
    pdpt = PAGE_TABLES + 0x1000
    tables = f"mov qword ptr [{pdpt + 8}], 0x40000083; " if size is PageSize.SIZE_1G else ""
    run = vmxlab.run(
        log_case(f"{tables}mov rdi, {address}; mov [rdi], eax; mov [rdi + 0x2000], eax; hlt", ept)
    )
    if run.exits[0].reason is ExitReason.EXCEPTION_OR_NMI:
        pytest.skip("the processor lacks 1-GByte pages in ordinary paging")
    assert run.reasons == [ExitReason.HLT]
    assert logged(run) == [address]


def test_the_walk_of_l2s_paging_structures_is_logged(vmxlab):
    """Vol. 3C, 29.3.5 and 29.3.6: with EPTP bit 6 accesses to paging structures are treated as writes."""
    structures = [PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000]
    run = vmxlab.run(log_case(f"{store(PAGES[0])}; hlt", clean(*structures, PAGES[0])))
    assert run.reasons == [ExitReason.HLT]
    entries = logged(run)
    assert sorted(entries[:-1]) == structures
    assert entries[-1] == PAGES[0]


def test_nothing_is_logged_without_the_control(vmxlab):
    """Vol. 3C, 29.3.6: with "enable PML" 0 a dirty flag is set as ever, and neither log nor index changes."""
    case = log_case(f"{store(PAGES[0])}; hlt", clean(*PAGES))
    run = vmxlab.run(
        Case(
            program=case.program,
            ept=case.ept,
            eptp=case.eptp,
            disable=S.ENABLE_PML,
            fields=case.fields,
            memory=case.memory,
            watch=case.watch,
            steps=case.steps,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert index_of(run.exits[0]) == 511
    assert not any(log_of(run).entries)


def test_nothing_is_logged_without_accessed_and_dirty_flags(vmxlab):
    """Vol. 3C, 29.3.6: logging is of updates of dirty flags, which EPTP bit 6 enables."""
    eptp = EPTPointer(address=EPT_TABLES, accessed_dirty=False)
    run = vmxlab.run(log_case(f"{store(PAGES[0])}; hlt", clean(*PAGES), eptp=eptp))
    assert run.reasons == [ExitReason.HLT]
    assert logged(run) == []


# --- the log is full ---------------------------------------------------------------------------------------


def check_full(exit_, *, in_delivery: bool = False, nmi_unblocking: bool = False) -> None:
    assert exit_.full_reason == ExitReason.PML_FULL, exit_
    assert not exit_.interruption.valid
    assert exit_.idt_vectoring.valid is in_delivery
    q = exit_.qualification
    assert q.nmi_unblocking is nmi_unblocking
    assert q.asynchronous is False


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_a_full_log_exits_before_the_write(vmxlab):
    """Vol. 3C, 29.3.6: beyond index 511 the access does not occur, and no flag is set; RIP is there."""
    program = "; ".join(map(store, PAGES[:3])) + f"; mov ebx, [{PAGES[2]:#x}]; hlt"
    full = on(ExitReason.PML_FULL, times=1).vmwrite(Field.PML_INDEX, 511).resume()
    run = vmxlab.run(log_case(program, clean(*PAGES), index=1, registers={"rax": 0x5A5A}, reactions=[full]))
    assert run.reasons == [ExitReason.PML_FULL, ExitReason.HLT]
    check_full(run.exits[0])
    assert run.exits[0].rip == PROGRAM + 2 * CODE_LENGTH
    assert index_of(run.exits[0]) == 0xFFFF
    assert index_of(run.exits[1]) == 510
    assert run.exits[1].registers["rbx"] == 0x5A5A
    entries = log_of(run).entries
    assert (entries[1], entries[0], entries[511]) == tuple(PAGES[:3])


@pytest.mark.vmx_known_difference("pml-full-without-a-flag-to-set")
@pytest.mark.parametrize("index", [512, 0x1FF0, 0xFFFF])
def test_any_index_over_511_is_a_full_log(vmxlab, index):
    """Vol. 3C, 29.3.6: VM entry takes any index; the first flag to be set finds the log full."""
    run = vmxlab.run(log_case(f"nop; {store(PAGES[0])}; hlt", clean(PAGES[0]), index=index))
    assert run.reasons == [ExitReason.PML_FULL]
    check_full(run.exits[0])
    assert run.exits[0].rip == PROGRAM + 1
    assert index_of(run.exits[0]) == index
    assert not any(log_of(run).entries)


@pytest.mark.vmx_known_difference("pml-full-without-a-flag-to-set")
def test_a_full_log_is_no_matter_where_no_flag_is_set(vmxlab):
    """Vol. 3C, 29.3.6: the index is looked at when a flag has to be set; here all of them are."""
    run = vmxlab.run(log_case(f"{store(PAGES[0])}; hlt", clean(), index=0xFFFF))
    assert run.reasons == [ExitReason.HLT]


READ_TABLES = f"mov ebx, [{IDT:#x}]; mov ebx, [{GDT:#x}]; "
"""So that the delivery of an event needs no new translation for them."""


def filled(program: str, *pages: int, accessed: bool = True, before: str = "", **more) -> Case:
    """A case whose program fills the log by its first store, and goes on with a full one."""
    ept = clean(PAGES[7])
    for page in pages:
        ept.protect(page, 0x1000, accessed=accessed, dirty=False)
    return log_case(f"{before}{store(PAGES[7])}; {program}; hlt", ept, index=0, **more)


@pytest.mark.vmx_known_difference("kvm-pml-full-for-accessed-flags")
def test_setting_an_accessed_flag_finds_the_log_full_too(vmxlab):
    """Vol. 3C, 29.3.6: the index is examined before an accessed or a dirty flag is set."""
    run = vmxlab.run(filled(f"mov ebx, [{PAGES[0]:#x}]", PAGES[0], accessed=False))
    assert run.reasons == [ExitReason.PML_FULL]
    check_full(run.exits[0])
    assert run.exits[0].rip == PROGRAM + CODE_LENGTH
    assert index_of(run.exits[0]) == 0xFFFF


@pytest.mark.vmx_known_difference("ept-exit-rf-clear")
def test_a_full_log_saves_the_resume_flag_as_1(vmxlab):
    """Vol. 3C, 28.3.3: RF is saved as 1 if no event was being delivered."""
    run = vmxlab.run(filled(store(PAGES[0]), PAGES[0]))
    assert run.exits[0].rflags == RFLAGS.RF | 2


def test_a_full_log_while_an_event_is_delivered(vmxlab):
    """Vol. 3C, 28.2.4: the event is in the IDT-vectoring fields, as it is with an EPT violation."""
    run = vmxlab.run(filled("ud2", STACK_TOP & ~0xFFF, before=READ_TABLES, **handled(Vector.UD)))
    assert run.reasons == [ExitReason.PML_FULL]
    check_full(run.exits[0], in_delivery=True)
    event = run.exits[0].idt_vectoring
    assert (event.vector, event.type) == (Vector.UD, InterruptionType.HARDWARE_EXCEPTION)
    assert not event.error_code_valid
    assert run.exits[0].rip == PROGRAM + 3 * CODE_LENGTH
    assert run.exits[0].registers["rsp"] == STACK_TOP


@pytest.mark.vmx_known_difference("kvm-pml-full-for-accessed-flags")
def test_a_full_log_by_an_iret_that_unblocks_nmis(vmxlab):
    """Vol. 3C, 28.2.1: bit 12 is set where IRET, which ended virtual-NMI blocking, found the log full."""
    stack = PAGES[0]
    run = vmxlab.run(
        filled(
            f"mov esp, {stack}; iretq",
            stack,
            accessed=False,
            enable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS),
            fields={Field.GUEST_INTERRUPTIBILITY_STATE: int(InterruptibilityState.BLOCKING_BY_NMI)},
            watch=[Field.GUEST_INTERRUPTIBILITY_STATE],
        )
    )
    assert run.reasons == [ExitReason.PML_FULL]
    check_full(run.exits[0], nmi_unblocking=True)


# --- VM entry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [LOG + 8, LOG | 1 << 62], ids=["misaligned", "too-wide"])
def test_vm_entry_checks_the_address_of_the_log(vmxlab, address):
    """Vol. 3C, 27.2.1.1: 4-KByte aligned, and within the physical-address width: else VMfail(7)."""
    run = vmxlab.run(log_case("hlt", clean(), fields={Field.PML_ADDRESS: address}))
    assert not run.exits
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS


def test_page_modification_logging_needs_ept(vmxlab):
    """Vol. 3C, 27.2.1.1: with "enable PML", "enable EPT" must be 1."""
    run = vmxlab.run(
        Case(enable=S.ENABLE_PML, disable=S.ENABLE_EPT, fields={Field.PML_ADDRESS: LOG, Field.PML_INDEX: 511})
    )
    assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
