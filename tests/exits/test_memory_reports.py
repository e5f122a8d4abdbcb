"""Steps that report memory, and what becomes of one that can't."""

from vmxlab import Case, End, ExitReason, Verdict
from vmxlab.cases.steps import STANDARD, ReportMemory, Store
from vmxlab.image.layout import FREE_PAGES
from vmxlab.sdm.registers import Vector


def test_a_range_of_memory_comes_back_whole(vmxlab):
    """Records hold 256 bytes of memory each; the run puts a longer range together again."""
    content = bytes(range(256)) * 3 + b"end"
    steps = (Store(FREE_PAGES, content), ReportMemory(FREE_PAGES, len(content)), ReportMemory(FREE_PAGES, 4))
    run = vmxlab.run(Case(steps=steps[:2]))
    assert run.memory == {FREE_PAGES: content}
    again = vmxlab.run(Case(steps=steps))
    assert again.memory == {FREE_PAGES: content[:4]}


def test_reading_memory_that_l1_does_not_map_is_a_fault_that_the_monitor_survives(vmxlab):
    """SDM Vol. 3A, 6.15: L1 maps 4 GiB, beyond is #PF; the case ends with the fault, and the next runs."""
    run = vmxlab.run(Case(steps=(*STANDARD, ReportMemory(1 << 40, 8))))
    assert run.end is End.FAULT
    assert [(fault.vector, fault.error_code, fault.cr2) for fault in run.faults] == [(Vector.PF, 0, 1 << 40)]
    assert run.reasons == [ExitReason.HLT]
    assert run.verdict is Verdict.FAIL
    assert vmxlab.run(Case()).verdict is Verdict.PASS
