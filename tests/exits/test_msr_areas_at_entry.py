"""The VM-entry MSR-load area: what L2 finds in its MSRs, and entries that make the VM entry fail.

SDM Vol. 3C, 25.8.2 (the area), 27.4 (loading MSRs), 27.8 (failures), 27.2.1.3 (checks on the area).
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    InstructionError,
    Limits,
    Msr,
    MsrArea,
    MsrBitmap,
    MsrEntry,
    OutcomeKind,
)
from vmxlab.cases.memory import DATA, machine_address
from vmxlab.cases.steps import ReportMemory
from vmxlab.image.layout import EXIT_MSR_STORE_AREA, FREE_PAGES
from vmxlab.structures.msr_area import ENTRY_BYTES

from .msr_area_cases import FREE, NOT_ALLOWED, OTHERS, VALUES, ZEROS, and_read, area, values_read

FAILED = 1 << 31 | ExitReason.ENTRY_FAILURE_MSR_LOADING
# RDMSR in L2 of a few, into memory.
READ_ALL = "lea rdi, [DATA];" + "".join(
    f"mov ecx, {int(msr):#x}; rdmsr; mov [rdi], eax; mov [rdi + 4], edx; add rdi, 8;" for msr in FREE
)


def read_by_l2(run) -> dict[Msr, int]:
    (data,) = run.memory.values()
    values = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return dict(zip(FREE, values, strict=True))


def case_that_reads(**more) -> Case:
    return Case(
        program=READ_ALL + "hlt",
        msr_bitmap=MsrBitmap.passthrough_all(),
        exit_msr_load=ZEROS,
        steps=(*and_read(), ReportMemory(machine_address(DATA), 8 * len(FREE))),
        **more,
    )


def test_l2_finds_the_values_of_the_area(vmxlab):
    """Vol. 3C, 27.4: each entry is loaded as WRMSR would load it, all bits of it."""
    run = vmxlab.run(case_that_reads(entry_msr_load=area(VALUES)))
    assert run.reasons == [ExitReason.HLT]
    assert read_by_l2(run) == VALUES


def test_entries_are_processed_in_order(vmxlab):
    """Vol. 3C, 27.4: of two entries for one MSR the later one stays."""
    both = MsrArea([*OTHERS.items(), *VALUES.items()])
    assert read_by_l2(vmxlab.run(case_that_reads(entry_msr_load=both))) == VALUES


def test_the_area_comes_after_the_guest_state(vmxlab):
    """Vol. 3C, 27.3.2.1 and 27.4: an MSR that the guest-state area loads too has the value of the MSR area.

    The exit saves what is in the MSR, not what the field held (28.3.1).
    """
    program = f"mov ecx, {Msr.IA32_SYSENTER_CS:#x}; rdmsr; hlt"
    case = Case(
        program=program,
        msr_bitmap=MsrBitmap.passthrough_all(),
        fields={Field.GUEST_IA32_SYSENTER_CS: 0x11, Field.GUEST_IA32_SYSENTER_ESP: 0x33},
        entry_msr_load=MsrArea([(Msr.IA32_SYSENTER_CS, 0x22)]),
        watch=[Field.GUEST_IA32_SYSENTER_CS, Field.GUEST_IA32_SYSENTER_ESP],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == 0x22
    assert list(run.exits[0].watched.values()) == [0x22, 0x33]


def test_as_many_entries_as_the_processor_recommends(vmxlab):
    """Vol. 3D, A.6: IA32_VMX_MISC[27:25] is N, and lists of 512 * (N + 1) entries work, to the last one."""
    count = vmxlab.capabilities.misc.recommended_msr_count
    entries = [(Msr.IA32_LSTAR, number) for number in range(count - len(FREE))]
    full = MsrArea([*entries, *VALUES.items()])
    assert len(full) == count
    run = vmxlab.run(case_that_reads(entry_msr_load=full, limits=Limits(seconds=60)))
    assert run.reasons == [ExitReason.HLT]
    assert read_by_l2(run) == VALUES


def test_an_area_longer_than_its_count_is_not_read_beyond_it(vmxlab):
    """Vol. 3C, 25.8.2: the count says how many entries there are, 0 too."""
    bad = MsrArea([*VALUES.items(), NOT_ALLOWED["FS base"]])
    run = vmxlab.run(case_that_reads(entry_msr_load=bad, fields={Field.ENTRY_MSR_LOAD_COUNT: len(VALUES)}))
    assert read_by_l2(run) == VALUES
    run = vmxlab.run(Case(entry_msr_load=bad, fields={Field.ENTRY_MSR_LOAD_COUNT: 0}))
    assert run.reasons == [ExitReason.HLT]


# --- entries that fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", NOT_ALLOWED.values(), ids=[name.replace(" ", "-") for name in NOT_ALLOWED])
def test_an_entry_that_may_not_be_loaded_fails_the_vm_entry(vmxlab, entry: MsrEntry):
    """Vol. 3C, 27.4 and 27.8: reason 34 with bit 31; L2 does not run."""
    run = vmxlab.run(Case(program="mov ecx, 1; hlt", entry_msr_load=MsrArea([entry])))
    assert [exit_.full_reason for exit_ in run.exits] == [FAILED]
    assert run.exits[0].raw_qualification == 1
    assert run.exits[0].registers["rcx"] == 0


def test_the_first_entry_that_fails_is_named(vmxlab):
    """Vol. 3C, 27.4 and 28.2.1: the qualification counts from 1; what is behind it is not looked at."""
    good, bad = MsrEntry(Msr.IA32_STAR), NOT_ALLOWED["bit 32 set"]
    areas = {
        1: [bad, bad],
        2: [good, bad, good],
        5: [*[good] * 4, bad, NOT_ALLOWED["FS base"]],
        300: [*[good] * 299, bad],
    }
    cases = [Case(entry_msr_load=MsrArea(entries)) for entries in areas.values()]
    for number, run in zip(areas, vmxlab.run_all(cases), strict=True):
        assert [exit_.full_reason for exit_ in run.exits] == [FAILED]
        assert run.exits[0].raw_qualification == number


def test_entries_before_the_one_that_fails_have_been_loaded(vmxlab):
    """Vol. 3C, 27.4: entries are processed in order, up to the one that fails; L1 finds what they loaded."""
    before, behind = MsrEntry(Msr.IA32_STAR, 0x5555), MsrEntry(Msr.IA32_LSTAR, 0x6666)
    steps = and_read(Msr.IA32_STAR, Msr.IA32_LSTAR)
    clean = Case(exit_msr_load=ZEROS)
    entries = MsrArea([before, NOT_ALLOWED["GS base"], behind])
    _, run, _ = vmxlab.run_all([clean, Case(entry_msr_load=entries, steps=steps), clean])
    assert [exit_.full_reason for exit_ in run.exits] == [FAILED]
    assert values_read(run) == {Msr.IA32_STAR: 0x5555, Msr.IA32_LSTAR: 0}


def test_a_failed_vm_entry_loads_msrs_as_an_exit_does_and_stores_none(vmxlab):
    """Vol. 3C, 27.8: the VM-exit MSR-load area is loaded; the VM-exit MSR-store area stays as it was."""
    case = Case(
        entry_msr_load=MsrArea([(Msr.IA32_STAR, 0x5555), NOT_ALLOWED["GS base"]]),
        exit_msr_load=ZEROS,
        exit_msr_store=MsrArea([(Msr.IA32_STAR, 0x7777)]),
        steps=(*and_read(Msr.IA32_STAR), ReportMemory(EXIT_MSR_STORE_AREA, ENTRY_BYTES)),
    )
    run = vmxlab.run(case)
    assert [exit_.full_reason for exit_ in run.exits] == [FAILED]
    assert values_read(run) == {Msr.IA32_STAR: 0}
    assert MsrArea.from_bytes(run.memory[EXIT_MSR_STORE_AREA]).values == (0x7777,)


# --- where an area may lie ---------------------------------------------------------------------------------

AREAS = {
    "entry-load": (Field.ENTRY_MSR_LOAD_ADDRESS, Field.ENTRY_MSR_LOAD_COUNT),
    "exit-store": (Field.EXIT_MSR_STORE_ADDRESS, Field.EXIT_MSR_STORE_COUNT),
    "exit-load": (Field.EXIT_MSR_LOAD_ADDRESS, Field.EXIT_MSR_LOAD_COUNT),
}


@pytest.mark.parametrize("fields", AREAS.values(), ids=list(AREAS))
def test_an_area_must_be_aligned_and_within_physical_addresses(vmxlab, fields):
    """Vol. 3C, 27.2.1.2 and 27.2.1.3: bits 3:0 are 0, no byte is beyond the width; else VMfail(7)."""
    address, count = fields
    limit = 1 << vmxlab.physical_address_width
    wrong = [(FREE_PAGES + offset, 1) for offset in (1, 2, 4, 8)]
    wrong += [(limit, 1), (limit - 16, 2), (limit - 0x1000, 0x101), (1 << 63, 1)]
    cases = [Case(fields={address: at, count: entries}) for at, entries in wrong]
    for case, run in zip(cases, vmxlab.run_all(cases), strict=True):
        assert run.entry is not None
        assert run.entry.kind is OutcomeKind.FAIL_VALID, case.fields
        assert run.entry.error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
        assert run.exits == ()


@pytest.mark.parametrize("fields", AREAS.values(), ids=list(AREAS))
def test_the_address_of_no_entries_does_not_matter(vmxlab, fields):
    """Vol. 3C, 27.2.1.2 and 27.2.1.3: the checks are for a count that is not 0."""
    address, count = fields
    for value in (FREE_PAGES + 8, 1 << 63 | 5):
        assert vmxlab.run(Case(fields={address: value, count: 0})).reasons == [ExitReason.HLT]
