"""EPT violations while an event is delivered, and what an EPT violation saves of RF and of NMI blocking."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, ExitReason, Field, PinControls, SecondaryControls, on
from vmxlab.cases.memory import DATA, PROGRAM, STACK_TOP, UNMAPPED
from vmxlab.cases.steps import STANDARD, Vmxoff
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)


def the_violation(run, *, in_delivery: bool):
    """The one exit of this run, an EPT violation; `in_delivery`: the IDT-vectoring fields hold an event."""
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    (violation,) = run.exits
    assert not violation.entry_failed
    assert not violation.interruption.valid  # 28.2.2: no event caused the exit itself
    assert violation.idt_vectoring.valid is in_delivery  # 28.2.4
    return violation


# --- the event ---------------------------------------------------------------------------------------------

_UD, _GP, _BP = 6, 13, 3
_SELECTOR_BEYOND_THE_GDT = 0x88
LOAD_BAD_SELECTOR = f"mov eax, {_SELECTOR_BEYOND_THE_GDT}; nop; mov ds, ax"
NO_IDT = {Field.EXCEPTION_BITMAP: 0, Field.GUEST_IDTR_BASE: UNMAPPED, Field.GUEST_IDTR_LIMIT: 0xFFF}


def assert_in_gate(violation, vector: int) -> None:
    """The access was to the gate of 16 bytes; in which order its parts are read the manual leaves open."""
    address = violation.guest_linear_address
    assert address & ~0xF == UNMAPPED + 16 * vector
    assert violation.guest_physical_address == address
    q = violation.qualification
    assert (q.read, q.write, q.fetch) == (True, False, False)
    assert (q.readable, q.writable, q.executable) == (False, False, False)
    assert (q.guest_linear_valid, q.translated, q.asynchronous) == (True, True, False)


@pytest.mark.parametrize(
    ("program", "vector", "type_", "error_code", "rip", "length"),
    [
        ("nop; ud2", _UD, InterruptionType.HARDWARE_EXCEPTION, None, PROGRAM + 1, None),
        (LOAD_BAD_SELECTOR, _GP, InterruptionType.HARDWARE_EXCEPTION, 0x88, PROGRAM + 6, None),
        ("nop; int 0x30", 0x30, InterruptionType.SOFTWARE_INTERRUPT, None, PROGRAM + 1, 2),
        ("nop; int3", _BP, InterruptionType.SOFTWARE_EXCEPTION, None, PROGRAM + 1, 1),
    ],
    ids=["ud", "gp", "int-n", "int3"],
)
def test_violation_while_an_event_is_delivered_says_which(
    vmxlab, program, vector, type_, error_code, rip, length
):
    """Vol. 3C, 28.2.4, 28.2.5: the IDT-vectoring fields hold the event, and the length a software event's."""
    violation = the_violation(vmxlab.run(Case(program=program, fields=NO_IDT)), in_delivery=True)
    assert_in_gate(violation, vector)
    event = violation.idt_vectoring
    assert (event.vector, event.type, event.error_code_valid) == (vector, type_, error_code is not None)
    if error_code is not None:
        assert violation.idt_vectoring_error_code == error_code
    if length is not None:
        assert violation.instruction_length == length
    assert violation.rip == rip


def test_violation_while_an_injected_event_is_delivered_is_no_failed_entry(vmxlab):
    """Vol. 3C, 27.6.1.2, 28.2.4: an injected event that meets a violation is in the IDT-vectoring fields."""
    injected = 1 << 31 | InterruptionType.HARDWARE_EXCEPTION << 8 | _UD
    fields = NO_IDT | {Field.ENTRY_INTERRUPTION_INFORMATION: injected}
    violation = the_violation(vmxlab.run(Case(fields=fields)), in_delivery=True)
    assert violation.raw_idt_vectoring_information & ~(1 << 12) == injected
    assert_in_gate(violation, _UD)
    assert violation.rip == PROGRAM


def with_idt(handler: int, **more) -> Case:
    """L2 executes UD2; the IDT in its data has a gate for that, to `handler`."""
    gate = struct.pack("<HHBBHII", handler & 0xFFFF, 0x08, 0, 0x8E, handler >> 16 & 0xFFFF, handler >> 32, 0)
    fields = NO_IDT | {Field.GUEST_IDTR_BASE: DATA}
    return Case(program="nop; ud2", fields=fields, data={DATA + 16 * _UD: gate}, **more)


def test_unmapped_stack_faults_while_the_event_is_delivered(vmxlab):
    """Vol. 3C, 28.2.4: the frame's write faults in the delivery; the stack pointer is as before."""
    run = vmxlab.run(with_idt(PROGRAM, registers={"rsp": UNMAPPED + 0x800}))
    violation = the_violation(run, in_delivery=True)
    assert violation.qualification.write
    assert UNMAPPED + 0x7D8 <= violation.guest_physical_address < UNMAPPED + 0x800
    assert violation.idt_vectoring.vector == _UD
    assert (violation.rip, violation.registers["rsp"]) == (PROGRAM + 1, UNMAPPED + 0x800)


def test_first_fetch_of_the_handler_is_no_delivery(vmxlab):
    """Vol. 3C, 28.2.4: an exit by fetching the handler's first instruction came after the delivery."""
    violation = the_violation(vmxlab.run(with_idt(UNMAPPED)), in_delivery=False)
    assert violation.qualification.fetch
    assert (violation.rip, violation.guest_physical_address) == (UNMAPPED, UNMAPPED)
    assert violation.registers["rsp"] == STACK_TOP - 0x28


# --- the flags beside --------------------------------------------------------------------------------------


@pytest.mark.vmx_known_difference("ept-exit-rf-clear")
def test_violation_saves_the_resume_flag_as_1(vmxlab):
    """Vol. 3C, 28.3.3: RF is saved as 1 if no event was being delivered."""
    run = vmxlab.run(Case(program="nop; mov rax, [UNMAPPED]; hlt"))
    violation = the_violation(run, in_delivery=False)
    assert violation.rflags == RFLAGS.RF | 2


@pytest.mark.parametrize(("program", "resume"), [("ud2", RFLAGS.RF), ("int 0x30", 0)], ids=["fault", "int-n"])
def test_violation_in_a_delivery_saves_the_resume_flag_of_the_event(vmxlab, program, resume):
    """Vol. 3C, 28.3.3: RF is saved as the event would have pushed it: 1 by a fault, 0 by INT n."""
    violation = the_violation(vmxlab.run(Case(program=program, fields=NO_IDT)), in_delivery=True)
    assert violation.rflags == resume | 2


VIRTUAL_NMIS = (PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS)
IRET = "mov rcx, rsp; mov eax, ss; push rax; push rcx; pushfq; mov eax, cs; push rax; call 1f; hlt; 1: iretq"
"""Returns behind its CALL, to HLT."""


@pytest.fixture
def unblocked_after(vmxlab):
    """No blocking of NMIs is left to the tests that follow, where the engine does not end it by itself."""
    yield
    # VMXOFF outside VMX operation faults in L1, whose handler returns by IRET; then there is one in L2.
    steps = (Vmxoff(go_on=True), *STANDARD)
    run = vmxlab.run(Case(program=IRET, enable=VIRTUAL_NMIS, steps=steps))
    assert run.reasons == [ExitReason.HLT]


def blocking_case(instruction: str, *, blocking: bool, **more) -> Case:
    """`instruction` uses a stack that is not mapped, with or without virtual-NMI blocking."""
    return Case(
        program=f"nop; {instruction}; hlt",
        registers={"rsp": UNMAPPED},
        enable=VIRTUAL_NMIS,
        fields={Field.GUEST_INTERRUPTIBILITY_STATE: 8 if blocking else 0},
        watch=[Field.GUEST_INTERRUPTIBILITY_STATE],
        **more,
    )


@pytest.mark.usefixtures("unblocked_after")
@pytest.mark.parametrize(
    ("instruction", "blocking"),
    [
        ("iretq", False),
        pytest.param("iretq", True, marks=pytest.mark.vmx_known_difference("kvm-ept-violation-by-iret")),
        ("pop rax", False),
        ("pop rax", True),
    ],
)
def test_nmi_unblocking_is_shown_for_iret_only(vmxlab, instruction, blocking):
    """Vol. 3C, 28.2.1: bit 12 is set if IRET faulted and virtual-NMI blocking was in effect before it."""
    run = vmxlab.run(blocking_case(instruction, blocking=blocking))
    violation = the_violation(run, in_delivery=False)
    assert violation.qualification.nmi_unblocking is (blocking and instruction == "iretq")
    # 28.1: an IRET that faults ends the blocking before the exit; what else faults does not.
    still_blocked = blocking and instruction != "iretq"
    assert violation.watched[Field.GUEST_INTERRUPTIBILITY_STATE] == (8 if still_blocked else 0)


@pytest.mark.usefixtures("unblocked_after")
@pytest.mark.vmx_known_difference("virtual-nmi-blocking-outlives-vm-entry")
def test_vm_entry_ends_virtual_nmi_blocking(vmxlab):
    """Vol. 3C, 27.7.1 and 28.3.4: blocking is what the field said at this entry, not at the one before."""
    violation = on(ExitReason.EPT_VIOLATION, times=1)
    unblock = violation.vmwrite(Field.GUEST_INTERRUPTIBILITY_STATE, 0).resume()
    run = vmxlab.run(blocking_case("pop rax", blocking=True, reactions=[unblock]))
    assert run.reasons == [ExitReason.EPT_VIOLATION] * 2
    saved = [exit_.watched[Field.GUEST_INTERRUPTIBILITY_STATE] for exit_ in run.exits]
    assert saved == [8, 0]
