"""#CP in L2: indirect-branch tracking, as an exit and delivered (SDM Vol. 3A, 6.15, and Vol. 1, 17.3)."""

from __future__ import annotations

from vmxlab import Case, ExitReason, Field, MsrBitmap
from vmxlab.cases.memory import PROGRAM
from vmxlab.cases.steps import STANDARD, Wrmsr
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4, Vector

from .guest_setups import frame, handled, merged

ENDBR_EN = 1 << 2
MISSING_ENDBRANCH = 3
TRACKED = (
    f"mov ecx, {int(Msr.IA32_S_CET):#x}; mov eax, {ENDBR_EN}; xor edx, edx; wrmsr; "
    "mov ebx, offset 1f; jmp rbx; "
)
TARGET = PROGRAM + 5 + 5 + 2 + 2 + 5 + 2


def tracking_case(vmxlab, target: str, **parts) -> Case:
    """L2 enables tracking of its indirect branches at CPL 0, and jumps to `target`."""
    vmxlab.require(CR4.CET)
    capabilities = vmxlab.capabilities
    fields = {
        Field.GUEST_CR0: int(CR0.PE | CR0.PG | CR0.ET | CR0.NE | CR0.WP | capabilities.cr0_fixed0),
        Field.GUEST_CR4: int(CR4.PAE | CR4.CET | capabilities.cr4_fixed0),
    }
    return Case(
        program=f"{TRACKED}1: {target}; hlt",
        msr_bitmap=MsrBitmap.passthrough_all(),
        steps=(*STANDARD, Wrmsr(Msr.IA32_S_CET, 0)),
        **merged(parts, fields=fields),
    )


def test_a_branch_to_endbranch_is_executed(vmxlab):
    """Vol. 1, 17.3.1: ENDBR64 at the target of an indirect jump."""
    run = vmxlab.run(tracking_case(vmxlab, "endbr64"))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].rip == TARGET + 4


def test_a_branch_to_anything_else_exits_by_the_exception_bitmap(vmxlab):
    """Vol. 3A, 6.15 and Vol. 3C, 28.2.2: vector 21, error code 3 (ENDBRANCH), RIP at the target."""
    run = vmxlab.run(tracking_case(vmxlab, "nop"))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    event = exit_.interruption
    assert (event.vector, event.type) == (Vector.CP, InterruptionType.HARDWARE_EXCEPTION)
    assert event.error_code_valid
    assert exit_.interruption_error_code == MISSING_ENDBRANCH
    assert exit_.raw_qualification == 0
    assert exit_.rip == TARGET


def test_it_is_delivered_where_its_bit_is_0(vmxlab):
    """Vol. 3C, 25.6.3: L2's handler gets it with its error code."""
    parts = handled(Vector.CP)
    handler = max(parts["data"])
    parts["data"][handler] = bytes.fromhex("f3 0f 1e fa") + parts["data"][handler]
    run = vmxlab.run(tracking_case(vmxlab, "nop", **parts))
    assert run.reasons == [ExitReason.HLT]
    seen = frame(run.exits[0].registers, error_code=True)
    assert (seen["error_code"], seen["rip"]) == (MISSING_ENDBRANCH, TARGET)
