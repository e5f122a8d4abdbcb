"""EPT violations: which accesses exit, and what the exit records (SDM Vol. 3C, 28.2.1 and 29.3.3.2)."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, EPTPointer, ExitReason, Field, Mode, PrimaryControls, SecondaryControls, guest_ept
from vmxlab.cases.memory import DATA, PROGRAM, UNMAPPED, machine_address
from vmxlab.image.layout import EPT_TABLES
from vmxlab.sdm.registers import CR0, CR4, RFLAGS

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)

PAGE = DATA + 0x8000
"""The page that is accessed."""
END_OF_MEMORY = 0x20000
"""The first guest-physical address that the default EPT does not map."""

# Each with its address in RDI, behind one NOP: a data access has RIP at PROGRAM + 1, a fetch at its target.
READ, WRITE, FETCH = "mov rbx, [rdi]", "mov [rdi], rbx", "jmp rdi"
ACCESSES = pytest.mark.parametrize("access", [READ, WRITE, FETCH], ids=["read", "write", "fetch"])
HLT = b"\xf4"
RBX = 0x1122334455667788
WITH_FLAGS = EPTPointer.from_table_phys(EPT_TABLES, accessed_dirty=True)
"""The EPTP of a case's EPT, with accessed and dirty flags enabled."""

# L2's own paging, with accessed and dirty flags set, so that nothing but the access itself is a write.

_P_RW_A, _P_RW_A_D, _USER, _LARGE = 0x23, 0x63, 0x04, 0x80
PML4, PDPT, DIRECTORY, FAR_DIRECTORY = (DATA + 0x1000 * n for n in range(4))
WALK_PDPT, WALK_DIRECTORY, WALK_TABLE = (DATA + 0x1000 * n for n in range(4, 7))
FAR = 0x4000_0000 + 5 * 0x20_0000 + 3 * 0x1000
"""A guest-physical (and linear) address whose EPT PDPTE, PDE and PTE translate nothing else that L2 uses."""
WALKED = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12
"""A linear address that L2's paging translates to PAGE, by entries 1, 2, 3 and 4 of its paging structures."""
WALK = {4: PML4 + 8 * 1, 3: WALK_PDPT + 8 * 2, 2: WALK_DIRECTORY + 8 * 3, 1: WALK_TABLE + 8 * 4}
"""By level: where the entries that translate WALKED lie."""


def entries(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def guest_paging(walked_pte: int = PAGE | _P_RW_A_D) -> dict[int, bytes]:
    """Linear addresses 0 to 2 GiB one to one by pages of 2 MiB, and WALKED to PAGE by one of 4 KiB."""
    identity = [n << 21 | _P_RW_A_D | _LARGE for n in range(1024)]
    return {
        PML4: entries(PDPT | _P_RW_A, WALK_PDPT | _P_RW_A | _USER),
        PDPT: entries(DIRECTORY | _P_RW_A, FAR_DIRECTORY | _P_RW_A),
        DIRECTORY: entries(*identity[:512]),
        FAR_DIRECTORY: entries(*identity[512:]),
        WALK[3]: entries(WALK_DIRECTORY | _P_RW_A | _USER),
        WALK[2]: entries(WALK_TABLE | _P_RW_A | _USER),
        WALK[1]: entries(walked_pte),
    }


def own_paging(walked_pte: int = PAGE | _P_RW_A_D, **fields: int) -> dict[str, dict]:
    more = {Field[name]: value for name, value in fields.items()}
    return {"data": guest_paging(walked_pte), "fields": {Field.GUEST_CR3: PML4, **more}}


# --- cases, and what is said of their exits ----------------------------------------------------------------


def access_case(access: str, address: int, **more) -> Case:
    return Case(program=f"nop; {access}; hlt", registers={"rdi": address, "rbx": RBX}, **more)


def rights_of(text: str) -> dict[str, bool]:
    return {"read": text[0] == "r", "write": text[1] == "w", "execute": text[2] == "x"}


def table_bits(text: str) -> int:
    return sum(1 << n for n, letter in enumerate(text) if letter != "-")


def the_violation(run):
    """The one exit of this run: an EPT violation that came with no event."""
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    (violation,) = run.exits
    assert violation.full_reason == ExitReason.EPT_VIOLATION
    assert not violation.interruption.valid  # 28.2.2
    assert not violation.idt_vectoring.valid  # 28.2.4
    q = violation.qualification
    assert q.raw >> 17 == 0
    assert (q.shadow_stack, q.guest_paging_verification, q.asynchronous) == (False, False, False)
    return violation


def kind_of(violation) -> tuple[bool, bool, bool]:
    q = violation.qualification
    return q.read, q.write, q.fetch


def allowed_by(violation) -> str:
    q = violation.qualification
    shown = zip("rwx", (q.readable, q.writable, q.executable), strict=True)
    return "".join(letter if holds else "-" for letter, holds in shown)


def assert_addresses(violation, linear: int, physical: int, *, translated: bool) -> None:
    q = violation.qualification
    assert (q.guest_linear_valid, q.translated) == (True, translated)
    addresses = violation.guest_linear_address, violation.guest_physical_address
    assert [hex(address) for address in addresses] == [hex(linear), hex(physical)]


def assert_translated(violation, *, linear: int, physical: int) -> None:
    """The access was to the translation of a linear address."""
    assert_addresses(violation, linear, physical, translated=True)


def assert_walk(violation, *, linear: int, entry: int) -> None:
    """The access was to a paging-structure entry on the way to that translation."""
    assert_addresses(violation, linear, entry, translated=False)


def assert_not_executed(violation, access: str, address: int) -> None:
    """RIP is at the instruction whose access faulted, and it has changed no register."""
    assert violation.rip == (address if access == FETCH else PROGRAM + 1)
    others = {name: value for name, value in violation.registers.items() if name not in ("rdi", "rsp")}
    assert others == {**dict.fromkeys(others, 0), "rbx": RBX}


KIND = {READ: (True, False, False), WRITE: (False, True, False), FETCH: (False, False, True)}


# --- the access and the rights -----------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@ACCESSES
@pytest.mark.parametrize("offset", [0, 0x7, 0x345, 0xFF8])
def test_access_to_an_unmapped_page_exits(vmxlab, access, offset):
    """Vol. 3C, Table 28-7: bits 2:0 name the access; with an entry not present bits 5:3 are clear."""
    address = UNMAPPED + offset
    violation = the_violation(vmxlab.run(access_case(access, address, ept=guest_ept())))
    assert kind_of(violation) == KIND[access]
    assert allowed_by(violation) == "---"
    assert_translated(violation, linear=address, physical=address)
    assert_not_executed(violation, access, address)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@ACCESSES
@pytest.mark.parametrize("rights", ["rwx", "rw-", "r-x", "r--", "--x"])
def test_access_exits_where_the_page_does_not_grant_it(vmxlab, access, rights):
    """Vol. 3C, 29.3.3.2: a read, write or fetch needs bit 0, 1 or 2; Table 28-7: bits 5:3 show them."""
    vmxlab.require_ept(*["execute_only"] * (rights == "--x"))
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, **rights_of(rights))
    run = vmxlab.run(access_case(access, PAGE + 0x120, ept=ept, data={PAGE + 0x120: HLT}))
    if {READ: "r", WRITE: "w", FETCH: "x"}[access] in rights:
        assert run.reasons == [ExitReason.HLT]
        return
    violation = the_violation(run)
    assert kind_of(violation) == KIND[access]
    assert allowed_by(violation) == rights
    assert_translated(violation, linear=PAGE + 0x120, physical=PAGE + 0x120)
    assert_not_executed(violation, access, PAGE + 0x120)


@pytest.mark.parametrize(
    ("access", "by_level", "granted"),
    [
        (READ, {1: "--x"}, "--x"),
        (READ, {2: "--x"}, "--x"),
        (READ, {3: "--x"}, "--x"),
        (WRITE, {1: "r-x"}, "r-x"),
        (WRITE, {2: "r-x"}, "r-x"),
        (WRITE, {3: "r-x"}, "r-x"),
        (WRITE, {4: "r-x"}, "r-x"),
        (FETCH, {1: "rw-"}, "rw-"),
        (FETCH, {2: "rw-"}, "rw-"),
        (FETCH, {3: "rw-"}, "rw-"),
        (WRITE, {1: "rw-", 2: "r-x"}, "r--"),
        (FETCH, {1: "r-x", 3: "rw-"}, "r--"),
        (WRITE, {1: "rw-", 2: "--x"}, "---"),
        (READ, {1: "--x", 2: "r-x", 3: "rw-"}, "---"),
    ],
)
def test_rights_are_those_of_all_entries_of_the_walk(vmxlab, access, by_level, granted):
    """Vol. 3C, Table 28-7: bits 5:3 are each the AND of one bit of all EPT entries used."""
    vmxlab.require_ept(*["execute_only"] * ("--x" in by_level.values()))
    ept = guest_ept()
    ept.map(FAR, machine_address(PAGE))
    for level, rights in by_level.items():
        if level == 1:
            ept.protect(FAR, 0x1000, **rights_of(rights))
        else:
            ept.set_table_entry(FAR, level, table_bits(rights))
    violation = the_violation(vmxlab.run(access_case(access, FAR + 0x18, ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[access]
    assert allowed_by(violation) == granted
    assert_translated(violation, linear=FAR + 0x18, physical=FAR + 0x18)
    assert_not_executed(violation, access, FAR + 0x18)


def test_fetch_exits_at_once_where_the_pml4_entry_denies_it(vmxlab):
    """Vol. 3C, 29.3.3.2: bit 2 of the EPT PML4E counts for every fetch: L2's first one exits."""
    ept = guest_ept()
    ept.set_table_entry(0, 4, table_bits("rw-"))
    violation = the_violation(vmxlab.run(Case(ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[FETCH]
    assert allowed_by(violation) == "rw-"
    assert_translated(violation, linear=PROGRAM, physical=PROGRAM)
    assert violation.rip == PROGRAM


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_right_is_shown_whichever_entry_is_not_present(vmxlab, level):
    """Vol. 3C, Table 28-7: bits 5:3 are clear if any entry used is not present."""
    ept = guest_ept()
    neighbour = {1: FAR + 0x1000, 2: FAR + 0x20_0000}.get(level)
    if neighbour is not None:
        ept.map(neighbour, machine_address(PAGE))
    violation = the_violation(vmxlab.run(access_case(READ, FAR, ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[READ]
    assert allowed_by(violation) == "---"
    assert_translated(violation, linear=FAR, physical=FAR)


# --- addresses ---------------------------------------------------------------------------------------------


@ACCESSES
def test_linear_and_physical_address_differ_where_the_guest_maps_them_so(vmxlab, access):
    """Vol. 3C, 28.2.1: one field gets the linear address, the other that of the access behind L2's paging."""
    ept = guest_ept()
    ept.unmap(PAGE, 0x1000)
    violation = the_violation(vmxlab.run(access_case(access, WALKED + 0x234, ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[access]
    assert_translated(violation, linear=WALKED + 0x234, physical=PAGE + 0x234)
    assert_not_executed(violation, access, WALKED + 0x234)


@pytest.mark.parametrize("access", [READ, WRITE], ids=["read", "write"])
@pytest.mark.parametrize("missing", ["first", "second"])
@pytest.mark.parametrize("bytes_in_first", [1, 4, 7])
def test_access_across_pages_names_the_page_that_faults(vmxlab, access, missing, bytes_in_first):
    """Vol. 3C, 28.2.1: the guest-physical address is the one that caused the violation."""
    edge = UNMAPPED + 0x1000
    ept = guest_ept()
    ept.map(edge if missing == "first" else edge - 0x1000, machine_address(PAGE))
    address = edge - bytes_in_first
    violation = the_violation(vmxlab.run(access_case(access, address, ept=ept)))
    assert kind_of(violation) == KIND[access]
    assert allowed_by(violation) == "---"
    faulted = address if missing == "first" else edge
    assert_translated(violation, linear=faulted, physical=faulted)
    assert_not_executed(violation, access, address)


def test_instruction_across_pages_faults_in_the_second(vmxlab):
    """Vol. 3C, 28.2.1: RIP is at the instruction; the address is where the fetch of its end faults."""
    start = END_OF_MEMORY - 2
    run = vmxlab.run(Case(program=f"mov rax, {start}; jmp rax", data={start: b"\x48\xb8"}))  # mov rax, imm64
    violation = the_violation(run)
    assert kind_of(violation) == KIND[FETCH]
    assert_translated(violation, linear=END_OF_MEMORY, physical=END_OF_MEMORY)
    assert violation.rip == start


@pytest.mark.parametrize(
    "instruction",
    [
        "inc qword ptr [rdi]",
        "lock add [rdi], rbx",
        "xchg [rdi], rbx",
        "lock cmpxchg [rdi], rbx",
        "bts [rdi], rbx",
    ],
)
@pytest.mark.parametrize("rights", ["---", "r--"])
def test_read_modify_write_is_a_write(vmxlab, instruction, rights):
    """Vol. 3C, 28.2.1: a read-modify-write sets bit 1; whether bit 0 as well is up to the processor."""
    ept = guest_ept()
    if rights == "---":
        ept.unmap(PAGE, 0x1000)
    else:
        ept.protect(PAGE, 0x1000, **rights_of(rights))
    case = Case(program=f"nop; {instruction}; hlt", registers={"rdi": PAGE, "rbx": 3}, ept=ept)
    violation = the_violation(vmxlab.run(case))
    assert violation.qualification.write
    assert not violation.qualification.fetch
    assert allowed_by(violation) == rights
    assert_translated(violation, linear=PAGE, physical=PAGE)
    assert violation.rip == PROGRAM + 1
    assert violation.registers["rbx"] == 3
    assert violation.rflags & ~RFLAGS.RF == 2


def test_push_that_faults_leaves_the_stack_pointer(vmxlab):
    """Vol. 3C, 28.3.3: state is saved as before the instruction whose access faulted."""
    violation = the_violation(
        vmxlab.run(Case(program="nop; push rax; hlt", registers={"rsp": UNMAPPED + 0x800}))
    )
    assert kind_of(violation) == KIND[WRITE]
    assert_translated(violation, linear=UNMAPPED + 0x7F8, physical=UNMAPPED + 0x7F8)
    assert (violation.rip, violation.registers["rsp"]) == (PROGRAM + 1, UNMAPPED + 0x800)


def test_string_instruction_has_done_the_iterations_before_the_one_that_faults(vmxlab):
    """Vol. 2B, REP: a fault shows the count and the pointer as the last completed iteration left them."""
    registers = {"rdi": END_OF_MEMORY - 0x18, "rcx": 8, "rax": RBX}
    violation = the_violation(vmxlab.run(Case(program="nop; rep stosq; hlt", registers=registers)))
    assert kind_of(violation) == KIND[WRITE]
    assert_translated(violation, linear=END_OF_MEMORY, physical=END_OF_MEMORY)
    assert violation.rip == PROGRAM + 1
    assert (violation.registers["rdi"], violation.registers["rcx"]) == (END_OF_MEMORY, 5)


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.REAL])
def test_violation_outside_64_bit_mode(vmxlab, mode):
    """Vol. 3C, 28.2.1: the guest-linear address is valid without 64-bit mode, and without paging as well."""
    ept = guest_ept()
    ept.unmap(0x9000, 0x1000)
    violation = the_violation(vmxlab.run(Case(program="nop; mov al, [0x9123]; hlt", mode=mode, ept=ept)))
    assert kind_of(violation) == KIND[READ]
    assert allowed_by(violation) == "---"
    assert_translated(violation, linear=0x9123, physical=0x9123)
    assert violation.rip == PROGRAM + 1


# --- L2's paging structures --------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@ACCESSES
@pytest.mark.parametrize("level", [3, 2, 1])
def test_walk_of_an_unmapped_paging_structure_is_a_read_of_its_entry(vmxlab, access, level):
    """Vol. 3C, Table 28-7: whatever is accessed, the walk reads; bit 8 is clear for it."""
    ept = guest_ept()
    ept.unmap(WALK[level] & ~0xFFF, 0x1000)
    violation = the_violation(vmxlab.run(access_case(access, WALKED + 0x234, ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[READ]
    assert allowed_by(violation) == "---"
    assert_walk(violation, linear=WALKED + 0x234, entry=WALK[level])
    assert_not_executed(violation, access, WALKED + 0x234)


def test_first_fetch_reads_the_top_paging_structure(vmxlab):
    """Vol. 3C, 29.3.1: CR3 holds a guest-physical address: the entry read there first may fault."""
    ept = guest_ept()
    ept.unmap(PML4, 0x1000)
    violation = the_violation(vmxlab.run(Case(ept=ept, **own_paging())))
    assert kind_of(violation) == KIND[READ]
    assert_walk(violation, linear=PROGRAM, entry=PML4)
    assert violation.rip == PROGRAM


def test_mov_to_cr3_accesses_nothing_until_the_next_fetch(vmxlab):
    """Vol. 3C, 29.3.3: an unmapped address in CR3 faults when a paging structure is read there."""
    case = Case(
        program="mov cr3, rdi; hlt", registers={"rdi": UNMAPPED}, disable=PrimaryControls.CR3_LOAD_EXITING
    )
    violation = the_violation(vmxlab.run(case))
    assert kind_of(violation) == KIND[READ]
    assert_walk(violation, linear=PROGRAM + 3, entry=UNMAPPED)
    assert violation.rip == PROGRAM + 3


@ACCESSES
def test_read_only_paging_structures_do_where_no_flag_is_written(vmxlab, access):
    """Vol. 3C, 29.3.3.2: without accessed and dirty flags for EPT a walk is no write."""
    ept = guest_ept()
    for table in (PML4, WALK_PDPT, WALK_DIRECTORY, WALK_TABLE):
        ept.protect(table, 0x1000, write=False)
    case = own_paging()
    case["data"][PAGE] = HLT
    assert vmxlab.run(access_case(access, WALKED, ept=ept, **case)).reasons == [ExitReason.HLT]


@pytest.mark.vmx_known_difference("ept-guest-flag-update-not-checked")
def test_writing_the_guest_accessed_flag_needs_write_access(vmxlab):
    """Vol. 3C, 29.3.3.2: the write of an accessed flag in L2's paging structures is a data write."""
    ept = guest_ept()
    ept.protect(WALK_TABLE, 0x1000, write=False)
    without_flags = PAGE | 0x3
    violation = the_violation(vmxlab.run(access_case(READ, WALKED, ept=ept, **own_paging(without_flags))))
    assert violation.qualification.write
    assert allowed_by(violation) == "r-x"
    assert_walk(violation, linear=WALKED, entry=WALK[1])


@pytest.mark.parametrize("rights", ["---", "r-x"])
@pytest.mark.parametrize("level", [3, 2, 1])
def test_with_accessed_and_dirty_flags_a_walk_is_a_write(vmxlab, level, rights):
    """Vol. 3C, 29.3.3.2: with EPTP bit 6 every access to L2's paging structures needs write access."""
    vmxlab.require_ept("accessed_dirty")
    ept = guest_ept()
    if rights == "---":
        ept.unmap(WALK[level] & ~0xFFF, 0x1000)
    else:
        ept.protect(WALK[level] & ~0xFFF, 0x1000, **rights_of(rights))
    run = vmxlab.run(access_case(READ, WALKED, ept=ept, eptp=WITH_FLAGS, **own_paging()))
    violation = the_violation(run)
    assert violation.qualification.write
    assert not violation.qualification.fetch
    assert allowed_by(violation) == rights
    assert_walk(violation, linear=WALKED, entry=WALK[level])
    assert_not_executed(violation, READ, WALKED)


@pytest.mark.vmx_known_difference("ept-ad-walk-without-read-bit")
def test_with_accessed_and_dirty_flags_a_walk_sets_the_read_bit_too(vmxlab):
    """Vol. 3C, Table 28-7, note 1: such an access sets both bit 0 and bit 1."""
    vmxlab.require_ept("accessed_dirty")
    ept = guest_ept()
    ept.protect(WALK_TABLE, 0x1000, write=False)
    run = vmxlab.run(access_case(READ, WALKED, ept=ept, eptp=WITH_FLAGS, **own_paging()))
    assert kind_of(the_violation(run)) == (True, True, False)


def pae_case(vmxlab, cr3: int, **more) -> Case:
    """32-bit code with PAE paging, which loads CR3 from EAX; L2's PDPTEs come from the VMCS."""
    fields = {
        Field.GUEST_CR4: int(CR4.PAE) | vmxlab.capabilities.cr4_fixed0,
        Field.GUEST_CR3: DATA + 0x1000,
        Field.GUEST_PDPTE0: DATA | 1,
        Field.GUEST_PDPTE1: 0,
        Field.GUEST_PDPTE2: 0,
        Field.GUEST_PDPTE3: 0,
    }
    return Case(
        program="mov cr3, eax; hlt",
        mode=Mode.PROTECTED,
        registers={"rax": cr3},
        fields=fields,
        data={DATA: entries(_P_RW_A_D | _LARGE), PAGE: entries(DATA | 1, 0, 0, 0)},
        disable=PrimaryControls.CR3_LOAD_EXITING,
        **more,
    )


def test_load_of_the_pdptes_has_no_linear_address(vmxlab):
    """Vol. 3C, Table 28-7: bit 7 is clear only where MOV to CR loads PDPTEs; the address is theirs."""
    violation = the_violation(vmxlab.run(pae_case(vmxlab, UNMAPPED + 0x20, ept=guest_ept())))
    assert kind_of(violation) == KIND[READ]
    assert allowed_by(violation) == "---"
    assert not violation.qualification.guest_linear_valid
    assert violation.guest_physical_address & ~0x1F == UNMAPPED + 0x20
    assert violation.rip == PROGRAM


def test_load_of_the_pdptes_is_no_write_even_with_accessed_and_dirty_flags(vmxlab):
    """Vol. 3C, 29.3.3.2: the PDPTEs that MOV to CR3 loads are read, so that a read-only page serves."""
    vmxlab.require_ept("accessed_dirty")
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, write=False)
    assert vmxlab.run(pae_case(vmxlab, PAGE, ept=ept, eptp=WITH_FLAGS)).reasons == [ExitReason.HLT]


# --- a page fault of L2's own comes first ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pte", "error_code"), [(PAGE, 0b10), (PAGE | 0x61, 0b11)], ids=["not-present", "read-only"]
)
def test_page_fault_comes_before_the_violation_of_the_page(vmxlab, pte, error_code):
    """Vol. 3C, 29.3.3.3: what L2's paging forbids is not accessed, so that EPT is not asked."""
    ept = guest_ept()
    ept.unmap(PAGE, 0x1000)
    cr0 = int(CR0.PG | CR0.WP | CR0.NE | CR0.ET | CR0.PE) | vmxlab.capabilities.cr0_fixed0
    run = vmxlab.run(access_case(WRITE, WALKED, ept=ept, **own_paging(pte, GUEST_CR0=cr0)))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert (run.exits[0].interruption.vector, run.exits[0].interruption_error_code) == (14, error_code)
    assert run.exits[0].qualification.linear_address == WALKED


# --- more information ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pte", "user", "writable"),
    [(PAGE | 0x63, False, True), (PAGE | 0x61, False, False), (PAGE | 0x67, True, True)],
)
def test_advanced_information_tells_what_the_guest_paging_allows(vmxlab, pte, user, writable):
    """Vol. 3C, Table 28-7: bits 9 to 11 are rights by L2's own paging, from all its entries together."""
    vmxlab.require_ept("advanced_exit_information")
    ept = guest_ept()
    ept.unmap(PAGE, 0x1000)
    q = the_violation(vmxlab.run(access_case(READ, WALKED, ept=ept, **own_paging(pte)))).qualification
    assert (q.user_linear_address, q.read_write_linear, q.execute_disable_linear) == (user, writable, False)
