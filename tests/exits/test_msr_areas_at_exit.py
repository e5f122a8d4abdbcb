"""The MSR areas of VM exits: what is stored of L2, what L1 finds, and the VMX aborts.

SDM Vol. 3C, 25.7.2 (the areas), 28.4 (saving MSRs), 28.6 (loading MSRs), 28.7 (VMX aborts).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, End, ExitReason, Field, Limits, Msr, MsrArea, MsrBitmap, MsrEntry, Verdict, on
from vmxlab.cases.steps import ReportMemory
from vmxlab.errors import MachineDied
from vmxlab.image.layout import EXIT_MSR_STORE_AREA
from vmxlab.structures.msr_area import ENTRY_BYTES

from .msr_area_cases import FREE, NOT_ALLOWED, OTHERS, VALUES, ZEROS, and_read, area, values_read

WRITE_ONE = "mov ecx, {:#x}; mov eax, {:#x}; mov edx, {:#x}; wrmsr;"


def writes(values: dict[Msr, int]) -> str:
    """WRMSR in L2 of each."""
    return "".join(WRITE_ONE.format(int(msr), v & 0xFFFF_FFFF, v >> 32) for msr, v in values.items())


def report(count: int, first: int = 0) -> ReportMemory:
    return ReportMemory(EXIT_MSR_STORE_AREA + first * ENTRY_BYTES, count * ENTRY_BYTES)


def stored(run, first: int = 0) -> MsrArea:
    return MsrArea.from_bytes(run.memory[EXIT_MSR_STORE_AREA + first * ENTRY_BYTES])


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_an_exit_stores_what_l2_left_and_loads_what_l1_wants(vmxlab):
    """Vol. 3C, 28.4 and 28.6: first all is stored, as RDMSR would read it, then all loaded."""
    case = Case(
        program=writes(VALUES) + "hlt",
        msr_bitmap=MsrBitmap.passthrough_all(),
        exit_msr_store=MsrArea((msr, 0xDEAD) for msr in FREE),
        exit_msr_load=area(OTHERS),
        steps=(*and_read(*FREE), report(len(FREE))),
    )
    clean = Case(exit_msr_load=ZEROS, steps=and_read(*FREE))
    run, after = vmxlab.run_all([case, clean])
    assert run.reasons == [ExitReason.HLT]
    assert stored(run) == area(VALUES)
    assert values_read(run) == OTHERS
    assert values_read(after) == dict.fromkeys(FREE, 0)


def test_each_exit_stores(vmxlab):
    """Vol. 3C, 28.4: the area holds what the last exit stored; a VM entry does not load it."""
    first, second = {Msr.IA32_STAR: 0x11}, {Msr.IA32_STAR: 0x22}
    copied = Case(
        program=writes(first) + "vmcall;" + writes(second) + "hlt",
        msr_bitmap=MsrBitmap.passthrough_all(),
        exit_msr_store=MsrArea.of_msrs([Msr.IA32_STAR, Msr.IA32_LSTAR, Msr.IA32_STAR]),
        exit_msr_load=ZEROS,
        steps=(*and_read(Msr.IA32_STAR), report(3)),
        reactions=[on(ExitReason.VMCALL).skip()],
    )
    run = vmxlab.run(copied)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert stored(run).values == (0x22, 0, 0x22)
    assert values_read(run) == {Msr.IA32_STAR: 0}


def test_exit_loads_are_processed_in_order(vmxlab):
    """Vol. 3C, 28.6: of two entries for one MSR the later one stays."""
    loads = MsrArea([*VALUES.items(), *OTHERS.items()])
    run, _ = vmxlab.run_all([Case(exit_msr_load=loads, steps=and_read(*FREE)), Case(exit_msr_load=ZEROS)])
    assert values_read(run) == OTHERS


def test_the_exits_area_comes_after_the_host_state(vmxlab):
    """Vol. 3C, 28.5.1 and 28.6: an MSR that the host-state area loads too has the value of the MSR area."""
    case = Case(
        fields={Field.HOST_IA32_SYSENTER_CS: 0x11, Field.HOST_IA32_SYSENTER_ESP: 0x33},
        exit_msr_load=MsrArea([(Msr.IA32_SYSENTER_CS, 0x22)]),
        steps=and_read(Msr.IA32_SYSENTER_CS, Msr.IA32_SYSENTER_ESP),
    )
    assert values_read(vmxlab.run(case)) == {Msr.IA32_SYSENTER_CS: 0x22, Msr.IA32_SYSENTER_ESP: 0x33}


def test_as_many_entries_as_the_processor_recommends(vmxlab):
    """Vol. 3D, A.6: lists of 512 * (N + 1) entries are stored and loaded in full."""
    count = vmxlab.capabilities.misc.recommended_msr_count
    loads = [(Msr.IA32_LSTAR, number) for number in range(count - len(FREE))]
    case = Case(
        program=writes({Msr.IA32_STAR: 0x1234_5678_9ABC}) + "hlt",
        msr_bitmap=MsrBitmap.passthrough_all(),
        exit_msr_store=MsrArea.of_msrs([Msr.IA32_STAR] * count),
        exit_msr_load=MsrArea([*loads, *OTHERS.items()]),
        limits=Limits(seconds=60),
        steps=(*and_read(*FREE), report(1), report(1, count // 2), report(1, count - 1), report(1, count)),
    )
    run, _ = vmxlab.run_all([case, Case(exit_msr_load=ZEROS)])
    assert run.reasons == [ExitReason.HLT]
    for number in (0, count // 2, count - 1):
        assert stored(run, number) == MsrArea([(Msr.IA32_STAR, 0x1234_5678_9ABC)])
    assert values_read(run) == OTHERS


# --- VMX aborts --------------------------------------------------------------------------------------------


def check_abort(vmxlab, **areas: MsrArea) -> None:
    """The machine is dead, and said nothing of an exit; the next case runs on another."""
    with pytest.raises(MachineDied) as caught:
        vmxlab.run(Case(**areas))
    run = caught.value.run
    assert run is not None
    assert (run.end, run.verdict) == (End.DIED, Verdict.CRASH)
    assert run.exits == ()
    assert vmxlab.run(Case()).reasons == [ExitReason.HLT]


NOT_STORED = {
    "bit 32 set": MsrEntry(Msr.IA32_STAR, reserved=1),
    "last of x2APIC": MsrEntry(0x8FF),
}


@pytest.mark.parametrize("entry", NOT_STORED.values(), ids=[name.replace(" ", "-") for name in NOT_STORED])
def test_an_entry_that_may_not_be_stored_is_a_vmx_abort(vmxlab, entry):
    """Vol. 3C, 28.4 and 28.7: abort 1: the processor is in the shutdown state."""
    check_abort(vmxlab, exit_msr_store=MsrArea([MsrEntry(Msr.IA32_STAR), entry]))


@pytest.mark.parametrize("name", ["GS base", "address not canonical"])
def test_an_entry_that_may_not_be_loaded_at_an_exit_is_a_vmx_abort(vmxlab, name):
    """Vol. 3C, 28.6 and 28.7: abort 4; what fails at VM entry fails here, but there is no way back."""
    check_abort(vmxlab, exit_msr_load=MsrArea([MsrEntry(Msr.IA32_STAR), NOT_ALLOWED[name]]))
