"""Non-maskable interrupts: as exits, through L2's IDT, virtual NMIs, and what blocks and unblocks them.

SDM Vol. 3C, 26.2, 26.3 (IRET), 27.7.1 (blocking after entry), 28.1, 28.2.2 (bit 12), 28.3.4; Vol. 3A, 6.7.1.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, PinControls, SecondaryControls, on
from vmxlab.cases.memory import PROGRAM, STACK_TOP
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import InterruptibilityState, Vector

from .conftest import IRET
from .events import LENGTH_OF_SENDING, NMI, delivered, frame, handlers, sends, with_apic

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)

NMI_EXITING = PinControls.NMI_EXITING
VIRTUAL_NMIS = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS)
NO_NMI_CONTROLS = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS)
BLOCKING = Field.GUEST_INTERRUPTIBILITY_STATE
BY_NMI = int(InterruptibilityState.BLOCKING_BY_NMI)
BY_MOV_SS = int(InterruptibilityState.BLOCKING_BY_MOV_SS)

AN_NMI = 1 << 31 | InterruptionType.NMI << 8 | Vector.NMI
SEND = sends(NMI)
BEHIND = PROGRAM + LENGTH_OF_SENDING


def check_nmi(exit_, rip: int) -> None:
    """Everything that an exit by NMI records but the blocking: 28.2.1, 28.2.2, 28.2.4, 28.3.3."""
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.raw_interruption_information == AN_NMI
    assert exit_.raw_qualification == 0
    assert not exit_.idt_vectoring.valid
    assert exit_.rip == rip
    assert exit_.rflags == 2
    assert exit_.watched.get(Field.GUEST_ACTIVITY_STATE, 0) == 0


# --- NMI exiting -------------------------------------------------------------------------------------------


def test_an_nmi_exits_with_its_type_and_vector(vmxlab):
    """Vol. 3C, 26.2 and 28.2.2: type 2, vector 2, no error code; RIP is the return pointer."""
    watch = [Field.GUEST_ACTIVITY_STATE]
    run = vmxlab.run(Case(program=f"{SEND}; hlt", ept=with_apic(), enable=NMI_EXITING, watch=watch))
    assert len(run.exits) == 1
    check_nmi(run.exits[0], BEHIND)


@pytest.mark.vmx_known_difference("nmi-exit-saves-its-own-blocking")
def test_the_nmi_that_exits_blocks_others_only_after_the_exit(vmxlab):
    """Vol. 3C, 28.1: so "blocking by NMI" is saved as it was before, 0."""
    run = vmxlab.run(Case(program=f"{SEND}; hlt", ept=with_apic(), enable=NMI_EXITING, watch=[BLOCKING]))
    assert run.exits[0].watched[BLOCKING] == 0


@pytest.mark.vmx_known_difference("nmi-blocking-outlives-vm-entry")
@pytest.mark.parametrize(("blocking", "executed"), [(0, 0), (BY_MOV_SS, 1)], ids=["none", "by-mov-ss"])
def test_an_nmi_that_is_pending_at_vm_entry_exits_when_nothing_blocks_it(vmxlab, blocking, executed):
    """Vol. 3C, 28.1 and 27.7.1: an exit by NMI blocks NMIs in L1; the entry unblocks them for L2.

    MOV SS holds them back for one instruction more (Vol. 3A, 6.8.3).
    """
    again = (
        on(ExitReason.EXCEPTION_OR_NMI, times=1)
        .apic_write(ApicRegister.INTERRUPT_COMMAND_LOW, int(NMI))
        .vmwrite(BLOCKING, blocking)
        .resume()
    )
    case = Case(program=f"{SEND}; nop; hlt", ept=with_apic(), enable=NMI_EXITING, reactions=[again])
    run = vmxlab.run(case)
    assert len(run.exits) == 2
    check_nmi(run.exits[0], BEHIND)
    check_nmi(run.exits[1], BEHIND + executed)


@pytest.mark.vmx_known_difference("kvm-blocking-by-nmi-with-nmi-exiting")
def test_blocking_by_nmi_holds_for_all_of_l2_with_nmi_exiting(vmxlab):
    """Vol. 3C, 27.7.1 and 26.3: without virtual NMIs it stays while L2 runs; IRET does not end it."""
    case = Case(
        program=f"{SEND}; nop; {IRET}",
        ept=with_apic(),
        enable=NMI_EXITING,
        disable=PinControls.VIRTUAL_NMIS,
        fields={BLOCKING: BY_NMI},
        watch=[BLOCKING],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[BLOCKING] == BY_NMI


# --- virtual NMIs ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
@pytest.mark.parametrize("blocking", [0, BY_NMI])
def test_virtual_nmi_blocking_does_not_block_nmis(vmxlab, blocking):
    """Vol. 3C, 27.7.1 and 28.3.4: with "virtual NMIs" bit 3 is no blocking of NMIs, and saved as it was."""
    case = Case(
        program=f"{SEND}; hlt",
        ept=with_apic(),
        enable=VIRTUAL_NMIS,
        fields={BLOCKING: blocking},
        watch=[BLOCKING],
    )
    run = vmxlab.run(case)
    assert len(run.exits) == 1
    check_nmi(run.exits[0], BEHIND)
    assert run.exits[0].watched[BLOCKING] == blocking


def test_iret_ends_virtual_nmi_blocking(vmxlab):
    """Vol. 3C, 26.3, IRET: with "virtual NMIs" it removes virtual-NMI blocking."""
    case = Case(program=f"vmcall; {IRET}", enable=VIRTUAL_NMIS, fields={BLOCKING: BY_NMI}, watch=[BLOCKING])
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert [exit_.watched[BLOCKING] for exit_ in run.exits] == [BY_NMI, 0]


# --- without exiting ---------------------------------------------------------------------------------------


def test_without_exiting_an_nmi_goes_through_the_idt_of_l2_and_blocks_others(vmxlab):
    """Vol. 3C, 26.2, and Vol. 3A, 6.7.1: vector 2; the next one waits for IRET."""
    case = Case(
        **handlers(f"{SEND}; hlt", [Vector.NMI], ept=with_apic()),
        disable=NO_NMI_CONTROLS,
        watch=[BLOCKING],
        reactions=[
            # While the handler runs, a second one is sent.
            on(ExitReason.VMCALL, times=1).apic_write(ApicRegister.INTERRUPT_COMMAND_LOW, int(NMI)).skip()
        ],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.VMCALL, ExitReason.HLT]
    for exit_ in run.exits[:2]:
        assert delivered(exit_) == Vector.NMI
        assert frame(exit_)[:5] == [BEHIND, 0x08, 2, STACK_TOP, 0x10]
        assert exit_.watched[BLOCKING] == BY_NMI
    assert run.exits[2].watched[BLOCKING] == 0


@pytest.mark.parametrize(
    "between",
    [
        "nop",
        pytest.param("vmcall", marks=pytest.mark.vmx_known_difference("kvm-nmi-pending-over-an-exit")),
    ],
)
def test_without_exiting_blocking_by_nmi_lasts_until_iret(vmxlab, between):
    """Vol. 3C, 27.7.1: blocking that VM entry establishes is ended by IRET, and what was pending comes."""
    case = Case(
        **handlers(
            f"{SEND}; nop; {between}; {IRET}", [Vector.NMI], ept=with_apic(), fields={BLOCKING: BY_NMI}
        ),
        disable=NO_NMI_CONTROLS,
        watch=[BLOCKING],
    )
    run = vmxlab.run(case)
    *own, in_handler, end = run.exits
    if between == "vmcall":
        assert [exit_.rip for exit_ in own] == [BEHIND + 1]  # with the NMI still pending
    assert delivered(in_handler) == Vector.NMI
    assert end.reason == ExitReason.HLT
    assert [exit_.watched[BLOCKING] for exit_ in run.exits] == [*[BY_NMI] * len(own), BY_NMI, 0]


# --- IRET that faults --------------------------------------------------------------------------------------

CONTROLS = {
    "no-nmi-controls": {"disable": NO_NMI_CONTROLS},
    "virtual-nmis": {"enable": VIRTUAL_NMIS},
}


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
@pytest.mark.parametrize("controls", CONTROLS.values(), ids=CONTROLS)
@pytest.mark.parametrize("blocking", [0, BY_NMI])
@pytest.mark.parametrize(
    ("instruction", "vector"),
    [("iretq", Vector.GP), ("mov ds, ecx", Vector.GP), ("ud2", Vector.UD)],
    ids=["iret", "mov-ds", "ud2"],
)
def test_a_fault_of_iret_says_that_nmis_were_blocked_before(vmxlab, instruction, vector, blocking, controls):
    """Vol. 3C, 28.2.2 and 28.1: bit 12 is set for IRET alone, whose unblocking has happened nevertheless."""
    bad_frame = "push 0; push 0; push 2; push 0x88; push 0; mov ecx, 0x88"
    case = Case(
        program=f"{bad_frame}; {instruction}; hlt", fields={BLOCKING: blocking}, watch=[BLOCKING], **controls
    )
    run = vmxlab.run(case)
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert exit_.interruption.vector == vector
    unblocked = bool(blocking) and instruction == "iretq"
    assert exit_.interruption.nmi_unblocking is unblocked
    if not unblocked:
        assert exit_.watched[BLOCKING] == blocking
    if vector is Vector.GP:
        assert exit_.interruption_error_code == 0x88


def test_a_page_fault_of_iret_unblocks_too(vmxlab):
    """Vol. 3C, 28.2.2: the stack of the IRET is not present in L2's page tables."""
    absent = 1 << 30
    case = Case(
        program=f"mov rsp, {absent:#x}; iretq",
        fields={BLOCKING: BY_NMI},
        watch=[BLOCKING],
        disable=NO_NMI_CONTROLS,
    )
    (exit_,) = vmxlab.run(case).exits
    assert exit_.interruption.vector == Vector.PF
    assert exit_.interruption.nmi_unblocking
    assert absent <= exit_.qualification.linear_address < absent + 5 * 8  # any of the five that it pops


@pytest.mark.usefixtures("virtual_nmis_unblocked_after")
@pytest.mark.vmx_known_difference("kvm-fault-of-iret")
@pytest.mark.parametrize("controls", CONTROLS.values(), ids=CONTROLS)
def test_an_iret_that_faults_has_ended_the_blocking(vmxlab, controls):
    """Vol. 3C, 28.1: the blocking is cleared before the exit."""
    case = Case(program="push 0x88; push 0; iretq", fields={BLOCKING: BY_NMI}, watch=[BLOCKING], **controls)
    (exit_,) = vmxlab.run(case).exits
    assert exit_.interruption.vector == Vector.GP
    assert exit_.watched[BLOCKING] == 0
