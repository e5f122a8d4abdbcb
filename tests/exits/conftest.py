"""What tests of exits share as fixtures."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, PinControls
from vmxlab.cases.steps import STANDARD, Vmxoff

IRET = "mov rcx, rsp; mov eax, ss; push rax; push rcx; pushfq; mov eax, cs; push rax; call 1f; hlt; 1: iretq"
"""Returns behind its CALL, to HLT."""


@pytest.fixture
def virtual_nmis_unblocked_after(vmxlab):
    """No virtual-NMI blocking is left to the tests that follow, where VM entry does not end it by itself."""
    yield
    case = Case(
        program=IRET,
        enable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS),
        # VMXOFF outside VMX operation faults in L1, whose handler returns by IRET; then there is one in L2.
        steps=(Vmxoff(go_on=True), *STANDARD),
    )
    assert vmxlab.run(case).reasons == [ExitReason.HLT]
