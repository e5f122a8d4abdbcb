"""The live machine on a processor, and on KVM's nested VMX: changed structures, steps, snapshots."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Skip
from vmxlab.cases.memory import PROGRAM, UNMAPPED
from vmxlab.errors import EntryFailed
from vmxlab.image.layout import FREE_PAGES

pytestmark = pytest.mark.vmx_also_on("kvm-in-bochs")


def test_a_session_of_changes_steps_and_failures(vmxlab):
    with vmxlab.live() as vm:
        vm.io_bitmap.set_intercept(0x60, True)
        exit_ = vm.enter(f"in al, 0x60; inc rbx; mov rax, [{UNMAPPED:#x}]")
        assert (exit_.reason, exit_.qualification.port) == (ExitReason.IO_INSTRUCTION, 0x60)
        vm.skip()
        assert vm.step().exit.rip == PROGRAM + 5
        assert vm.changes.of("rbx").after == vm.registers["rbx"] == 1
        exit_ = vm.resume()
        assert (exit_.reason, exit_.guest_physical_address) == (ExitReason.EPT_VIOLATION, UNMAPPED)
        vm.ept.map(UNMAPPED, FREE_PAGES)
        vm.memory.write_u64(FREE_PAGES, 0x1122)
        assert vm.resume().registers["rax"] == 0x1122
        before = vm.snapshot()
        vm.vmwrite(Field.HOST_CR0, 0)
        with pytest.raises(EntryFailed, match="host-cr0-fixed"):
            vm.resume()
        vm.vmwrite(Field.HOST_CR0, before[Field.HOST_CR0])
        exits = vm.enter("cpuid; hlt", handler=lambda e, _: Skip if e.reason is ExitReason.CPUID else None)
        assert [e.reason for e in exits] == [ExitReason.CPUID, ExitReason.HLT]
    assert vmxlab.run(Case()).reasons == [ExitReason.HLT]
