"""The example of the README."""

import pytest

from vmxlab import Case, ExitReason, IOBitmap


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_port_0x60_exits(vmxlab):
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    run = vmxlab.run(Case(io_bitmap=bitmap, program="in al, 0x60; in al, 0x61; hlt"))
    assert [e.reason for e in run.exits] == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert run.exits[0].qualification.port == 0x60
