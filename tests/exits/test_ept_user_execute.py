"""Mode-based execute control for EPT: fetches at CPL 3 have a right of their own (SDM Vol. 3C, 29.3.3.2)."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, SecondaryControls, guest_ept
from vmxlab.cases.memory import DATA, PROGRAM

from .guest_setups import user_mode

CONTROL = SecondaryControls.MODE_BASED_EXECUTE_CONTROL_FOR_EPT
NEEDED = pytest.mark.vmx_needs(CONTROL, SecondaryControls.ENABLE_EPT)
PAGE = DATA + 0x4000
VMCALL = b"\x0f\x01\xc1"


def fetch_case(*, user: bool, execute: bool, user_execute: bool, **more) -> Case:
    ept = guest_ept()
    ept.protect(PAGE, 0x1000, execute=execute, user_execute=user_execute)
    parts = user_mode() if user else {"data": {}, "fields": {}}
    parts["data"][PAGE] = VMCALL
    return Case(program=f"mov edi, {PAGE}; jmp rdi", ept=ept, **parts, **more)


@NEEDED
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize(
    ("execute", "user_execute"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_each_mode_has_its_own_right(vmxlab, user, execute, user_execute):
    """Vol. 3C, 29.3.3.2 and Table 28-7: bit 2 for supervisor-mode addresses, bit 10 for user-mode ones."""
    run = vmxlab.run(fetch_case(user=user, execute=execute, user_execute=user_execute, enable=CONTROL))
    if user_execute if user else execute:
        assert run.exits[0].reason is ExitReason.VMCALL
        return
    assert run.exits[0].full_reason == ExitReason.EPT_VIOLATION
    q = run.exits[0].qualification
    assert (q.read, q.write, q.fetch) == (False, False, True)
    assert (q.readable, q.writable) == (True, True)
    assert (q.executable, q.user_executable) == (execute, user_execute)
    assert run.exits[0].guest_physical_address == PAGE
    assert run.exits[0].rip == PAGE


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("execute", [False, True])
def test_without_the_control_bit_10_is_ignored(vmxlab, user, execute):
    """Vol. 3C, 29.3.2: with "mode-based execute control for EPT" 0 bit 2 is for all fetches."""
    case = fetch_case(user=user, execute=execute, user_execute=not execute, disable=CONTROL)
    run = vmxlab.run(case)
    assert run.exits[0].reason is (ExitReason.VMCALL if execute else ExitReason.EPT_VIOLATION)
    assert run.exits[0].rip == PAGE
    if not execute:
        assert not run.exits[0].qualification.executable


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_the_program_itself_may_be_executed(vmxlab):
    """Vol. 3C, 29.3.2: the default EPT grants both rights, so that a case may set the control or not."""
    assert vmxlab.run(Case(disable=CONTROL)).exits[0].rip == PROGRAM
