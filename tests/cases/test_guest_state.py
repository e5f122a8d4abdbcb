"""L2's baseline: guest-state area, descriptor table and page tables, checked by the rules of the SDM."""

from __future__ import annotations

import pytest

from vmxlab import Field, Mode
from vmxlab.cases import memory
from vmxlab.cases.guest_state import guest_efer, guest_memory, guest_state
from vmxlab.sdm.fields import FieldType

LONG, PROTECTED, REAL = Mode.LONG, Mode.PROTECTED, Mode.REAL
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")

PE, ET, NE, PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
PSE, PAE, VMXE = 1 << 4, 1 << 5, 1 << 13

both_ways = pytest.mark.parametrize("with_ept", [True, False], ids=["ept", "no-ept"])
each_mode = pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.name)


def state_of(mode, capabilities, *, with_ept=True):
    return guest_state(mode, capabilities, with_ept=with_ept)


def segment(state, name):
    """(selector, base, limit, access rights)."""
    parts = ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")
    return tuple(state[Field[f"GUEST_{name}_{part}"]] for part in parts)


# --- fields -------------------------------------------------------------------------------------------------

# Fields of the guest-state area that not every processor with VMX has, or that only a control gives a meaning
# (SDM Vol. 3C, 25.4.1 and 25.4.2): the baseline leaves them alone.
OPTIONAL = """
    GUEST_INTERRUPT_STATUS PML_INDEX GUEST_UINV GUEST_IA32_PAT GUEST_IA32_EFER GUEST_IA32_PERF_GLOBAL_CTRL
    GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 GUEST_IA32_BNDCFGS GUEST_IA32_RTIT_CTL
    GUEST_IA32_LBR_CTL GUEST_IA32_PKRS GUEST_SMBASE VMX_PREEMPTION_TIMER_VALUE GUEST_IA32_S_CET GUEST_SSP
    GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR
"""


@each_mode
def test_every_guest_state_field_that_all_processors_have_is_written(mode, processors):
    optional = OPTIONAL.split()
    everywhere = {
        field
        for field in Field
        if field.type is FieldType.GUEST_STATE and field.name not in optional and "_FRED_" not in field.name
    }
    assert set(state_of(mode, processors["skylake"])) == everywhere


@each_mode
@both_ways
def test_every_value_fits_its_field(mode, with_ept, processor):
    for field, value in state_of(mode, processor, with_ept=with_ept).items():
        assert 0 <= value <= field.max, field.name


def test_the_state_is_shared_and_so_can_not_be_changed(processors):
    with pytest.raises(TypeError):
        state_of(LONG, processors["skylake"])[Field.GUEST_RIP] = 0
    with pytest.raises(TypeError):
        guest_memory(LONG, with_ept=True)[0] = b""


# --- control registers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_cr0_and_cr4_obey_the_fixed_bits(mode, processor):
    """Vol. 3C, 27.3.1.1: the bits that IA32_VMX_CR0_FIXED0 and FIXED1 report; so for CR4."""
    state = state_of(mode, processor)
    for field, fixed0, fixed1 in ((Field.GUEST_CR0, 0x486, 0x487), (Field.GUEST_CR4, 0x488, 0x489)):
        assert state[field] & processor.raw[fixed0] == processor.raw[fixed0]
        assert not state[field] & ~processor.raw[fixed1]


@each_mode
def test_paging_is_that_of_the_mode(mode, processors):
    state = state_of(mode, processors["skylake"])
    cr0, cr4 = state[Field.GUEST_CR0], state[Field.GUEST_CR4]
    paging = {LONG: PE | PG, PROTECTED: PE | PG, REAL: 0}[mode]
    assert cr0 & (PE | PG) == paging
    assert cr0 & (NE | ET) == NE | ET
    assert cr4 & (PAE | PSE) == {LONG: PAE, PROTECTED: PSE, REAL: 0}[mode]
    assert cr4 & VMXE, "CR4.VMXE is fixed to 1"
    assert guest_efer(mode) == (0x500 if mode is LONG else 0), "LME and LMA agree with IA-32e mode guest"


def test_real_mode_obeys_all_fixed_bits_but_pe_and_pg(processor):
    """Vol. 3C, 27.3.1.1: with "unrestricted guest" CR0 bits 0 and 31 are not checked."""
    cr0 = state_of(REAL, processor)[Field.GUEST_CR0]
    assert cr0 | PE | PG == cr0 | processor.raw[0x486] | PE | PG
    assert not cr0 & ~processor.raw[0x487]


def test_a_processor_whose_fixed_bits_say_more_gets_more(processors):
    raw = dict(processors["skylake"].raw)
    raw[0x486] |= 1 << 16  # CR0.WP must be 1
    raw[0x488] |= 1 << 9  # CR4.OSFXSR must be 1
    raw[0x487] &= ~ET  # CR0.ET must be 0
    state = state_of(LONG, type(processors["skylake"])(raw))
    assert state[Field.GUEST_CR0] & (1 << 16 | ET) == 1 << 16
    assert state[Field.GUEST_CR4] & 1 << 9


# --- segments -----------------------------------------------------------------------------------------------


@each_mode
def test_segments_pass_the_checks_of_vm_entry(mode, processors):
    """Vol. 3C, 27.3.1.2, for the bits of table 25-2: type, S, DPL, P, L, D/B, G."""
    state = state_of(mode, processors["skylake"])
    for name in SEGMENTS:
        selector, base, limit, rights = segment(state, name)
        kind = rights & 0xF
        assert kind == (0xB if name == "CS" else 0x3), "accessed code, or accessed writable data"
        assert rights >> 4 & 1, "S: code or data"
        assert rights >> 5 & 3 == selector & 3 == 0, "DPL 0, RPL 0"
        assert rights >> 7 & 1, "present"
        assert rights & 0xFFFE_0F00 == 0, "reserved bits, and the segment is usable"
        long, big, granular = rights >> 13 & 1, rights >> 14 & 1, rights >> 15 & 1
        assert long == (mode is LONG and name == "CS")
        assert not (long and big)
        assert limit & 0xFFF == 0xFFF or not granular
        assert limit >> 20 == 0 or granular
        assert base == 0 and selector & 4 == 0


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_the_task_register_holds_a_busy_tss_and_ldtr_is_unusable(mode, processors):
    state = state_of(mode, processors["skylake"])
    selector, base, limit, rights = segment(state, "TR")
    assert rights == 0x8B, "11: busy 32-bit or 64-bit TSS; present"
    assert limit >= 0x67
    assert base == memory.TSS
    assert selector & 4 == 0, "in the GDT"
    assert segment(state, "LDTR")[3] == 1 << 16


def test_real_mode_segments_start_at_0_with_64_kib(processors):
    state = state_of(REAL, processors["skylake"])
    for name in SEGMENTS:
        selector, base, limit, rights = segment(state, name)
        assert (selector, base, limit) == (0, 0, 0xFFFF)
        assert rights >> 13 & 7 == 0, "16-bit"
    assert (state[Field.GUEST_IDTR_BASE], state[Field.GUEST_IDTR_LIMIT]) == (0, 0x3FF)
    assert segment(state, "TR")[3] == 0x8B


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_each_selector_leads_to_a_descriptor_that_says_the_same(mode, processors):
    """Vol. 3A, 3.4.5: a guest program may load its segments again from the GDT it was given."""
    state = state_of(mode, processors["skylake"])
    gdt = guest_memory(mode, with_ept=True)[state[Field.GUEST_GDTR_BASE]]
    assert len(gdt) == state[Field.GUEST_GDTR_LIMIT] + 1
    assert gdt[:8] == bytes(8)
    for name in (*SEGMENTS, "TR"):
        selector, base, limit, rights = segment(state, name)
        raw = int.from_bytes(gdt[selector & ~7 :][:8], "little")
        in_gdt_limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
        if raw >> 55 & 1:
            in_gdt_limit = in_gdt_limit << 12 | 0xFFF
        in_gdt_base = raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000
        assert (in_gdt_base, in_gdt_limit, raw >> 40 & 0xF0FF) == (base, limit, rights), name


# --- the rest -----------------------------------------------------------------------------------------------


@each_mode
def test_the_program_starts_in_its_place_with_an_empty_stack(mode, processors):
    state = state_of(mode, processors["skylake"])
    assert state[Field.GUEST_RIP] == memory.PROGRAM
    assert state[Field.GUEST_RSP] == memory.STACK_TOP
    assert state[Field.GUEST_RFLAGS] == 1 << 1, "bit 1 is always 1; interrupts are off"
    assert state[Field.GUEST_DR7] == 0x400, "bit 10 is always 1"
    assert state[Field.GUEST_ACTIVITY_STATE] == state[Field.GUEST_INTERRUPTIBILITY_STATE] == 0
    assert state[Field.VMCS_LINK_POINTER] == (1 << 64) - 1


# --- page tables --------------------------------------------------------------------------------------------


def pages_of(page_walker, mode, capabilities, *, with_ept):
    """What L2's own tables map. Without EPT they lie in the machine's memory, and CR3 says where there."""
    base = 0 if with_ept else memory.L2_MEMORY
    content = guest_memory(mode, with_ept=with_ept)

    def read(address):
        return content[address - base].ljust(0x1000, b"\0")

    cr3 = guest_state(mode, capabilities, with_ept=with_ept)[Field.GUEST_CR3]
    assert cr3 % 0x1000 == 0
    levels, entry_bytes = (4, 8) if mode is LONG else (2, 4)
    return page_walker(read).pages(cr3, levels=levels, entry_bytes=entry_bytes)


@pytest.mark.parametrize(("mode", "size"), [(LONG, 2 << 20), (PROTECTED, 4 << 20)])
def test_with_ept_linear_addresses_are_guest_physical_ones_up_to_1_gib(page_walker, processors, mode, size):
    pages = pages_of(page_walker, mode, processors["skylake"], with_ept=True)
    mapped = [(page.linear, page.bytes, page.physical) for page in pages]
    assert mapped == [(a, size, a) for a in range(0, 1 << 30, size)]
    assert {page.entry for page in pages} == {0x83}, "present, writable, large"


@pytest.mark.parametrize("mode", [LONG, PROTECTED])
def test_without_ept_l2_reaches_its_own_128_kib_and_nothing_else(page_walker, processors, mode):
    pages = pages_of(page_walker, mode, processors["penryn"], with_ept=False)
    mapped = [(page.linear, page.bytes, page.physical) for page in pages]
    assert mapped == [(a, 0x1000, memory.L2_MEMORY + a) for a in range(0, memory.L2_MEMORY_BYTES, 0x1000)]
    assert {page.entry for page in pages} == {0x03}, "present, writable"


@both_ways
def test_real_mode_has_no_page_tables(with_ept, processors):
    assert list(guest_memory(REAL, with_ept=with_ept)) == [memory.GDT]
    assert state_of(REAL, processors["skylake"], with_ept=with_ept)[Field.GUEST_CR3] == 0


@each_mode
@both_ways
def test_tables_stay_in_their_place_in_l2s_memory(mode, with_ept):
    for address, content in guest_memory(mode, with_ept=with_ept).items():
        in_tables = memory.PAGE_TABLES <= address <= memory.PAGE_TABLES + 0x4000 - len(content)
        assert in_tables or address == memory.GDT
        assert len(content) <= 0x1000
