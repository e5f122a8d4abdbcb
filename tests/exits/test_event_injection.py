"""Event injection: each type of event, delivered through L2's IDT in 64-bit, 32-bit and real mode.

SDM Vol. 3C, 27.6.1 (vectored-event injection), 27.6.2 (pending MTF); Vol. 3A, 6.12 and 6.13 (what delivery
pushes).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, InstructionError, Mode, PrimaryControls, SecondaryControls, on
from vmxlab.cases.memory import PROGRAM, STACK_TOP
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import RFLAGS, Vector

from .events import delivered, frame, handlers, injected

INFORMATION = Field.ENTRY_INTERRUPTION_INFORMATION
ERROR_CODE = Field.ENTRY_EXCEPTION_ERROR_CODE
LENGTH = Field.ENTRY_INSTRUCTION_LENGTH

MODES = pytest.mark.parametrize(
    "mode",
    [
        Mode.LONG,
        Mode.PROTECTED,
        pytest.param(Mode.REAL, marks=pytest.mark.vmx_needs(SecondaryControls.UNRESTRICTED_GUEST)),
    ],
    ids=lambda mode: mode.name.lower(),
)

TYPE = InterruptionType
FLAGS = int(RFLAGS.IF) | 2


def inject(
    mode: Mode, vector: int, type_: InterruptionType, *, error_code: int | None = None, length=None, **more
):
    """L2 starts with the event; behind its handler's IRET it executes the program."""
    fields = {
        Field.GUEST_RFLAGS: FLAGS,
        INFORMATION: injected(vector, type_, error_code=error_code is not None),
        **more.pop("fields", {}),
    }
    if error_code is not None:
        fields[ERROR_CODE] = error_code
    if length is not None:
        fields[LENGTH] = length
    return Case(
        **handlers(more.pop("program", "nop; nop; nop; nop; hlt"), [vector], mode=mode, fields=fields, **more)
    )


def pushed(mode: Mode, rip: int) -> list[int]:
    """What delivery without an error code pushes, lowest address first (Vol. 3A, figures 6-4 and 6-9)."""
    if mode is Mode.REAL:
        return [rip, 0, FLAGS]
    return [rip, 0x08, FLAGS] + ([STACK_TOP, 0x10] if mode is Mode.LONG else [])


def stack_of(exit_, mode: Mode, *, error_code: bool = False) -> list[int]:
    words = frame(exit_, mode)
    return words[: (6 if error_code else 5) if mode is Mode.LONG else 4 if error_code else 3]


WITHOUT_ERROR_CODE = [
    pytest.param(0x30, TYPE.EXTERNAL_INTERRUPT, id="external-interrupt"),
    pytest.param(0xFF, TYPE.EXTERNAL_INTERRUPT, id="external-interrupt-ff"),
    pytest.param(Vector.NMI, TYPE.NMI, id="nmi"),
    pytest.param(Vector.DE, TYPE.HARDWARE_EXCEPTION, id="de"),
    pytest.param(Vector.UD, TYPE.HARDWARE_EXCEPTION, id="ud"),
    pytest.param(Vector.MC, TYPE.HARDWARE_EXCEPTION, id="mc"),
]


@MODES
@pytest.mark.parametrize(("vector", "type_"), WITHOUT_ERROR_CODE)
def test_an_event_without_error_code_goes_through_the_idt(vmxlab, mode, vector, type_):
    """Vol. 3C, 27.6.1.1: delivered as if it came before the instruction at RIP; IF is cleared by the gate."""
    run = vmxlab.run(inject(mode, vector, type_))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    first, last = run.exits
    assert delivered(first) == vector
    assert stack_of(first, mode) == pushed(mode, PROGRAM)
    assert first.rflags & ~RFLAGS.RF == 2
    assert (last.rip, last.rflags) == (PROGRAM + 4, FLAGS)


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.PROTECTED], ids=["long", "protected"])
@pytest.mark.parametrize(
    ("vector", "error_code"),
    [
        (Vector.DF, 0),
        (Vector.TS, 0x1234),
        (Vector.NP, 0x18),
        (Vector.SS, 0xFFF8),
        (Vector.GP, 0x7FFF),
        (Vector.PF, 0x15),
        (Vector.AC, 0),
    ],
    ids=lambda value: value.name.lower() if isinstance(value, Vector) else hex(value),
)
def test_an_exception_delivers_its_error_code(vmxlab, mode, vector, error_code):
    """Vol. 3C, 27.6.1.1: bit 11 set: the VM-entry exception error code is pushed last."""
    stop = on(ExitReason.VMCALL).stop()  # the handler's IRET would take the error code for RIP
    case = inject(mode, vector, TYPE.HARDWARE_EXCEPTION, error_code=error_code, reactions=[stop])
    run = vmxlab.run(case)
    assert run.reasons[0] == ExitReason.VMCALL
    assert delivered(run.exits[0]) == vector
    assert stack_of(run.exits[0], mode, error_code=True) == [error_code, *pushed(mode, PROGRAM)]


SOFTWARE = [
    pytest.param(0x80, TYPE.SOFTWARE_INTERRUPT, 2, id="int-n"),
    pytest.param(0x0D, TYPE.SOFTWARE_INTERRUPT, 2, id="int-0d"),
    pytest.param(
        Vector.DB,
        TYPE.PRIVILEGED_SOFTWARE_EXCEPTION,
        1,
        id="int1",
        marks=pytest.mark.vmx_known_difference("kvm-injected-int1-is-lost"),
    ),
    pytest.param(Vector.BP, TYPE.SOFTWARE_EXCEPTION, 1, id="int3"),
    pytest.param(Vector.OF, TYPE.SOFTWARE_EXCEPTION, 1, id="into"),
    pytest.param(0x80, TYPE.SOFTWARE_INTERRUPT, 4, id="int-n-with-prefixes"),
]


@MODES
@pytest.mark.parametrize(("vector", "type_", "length"), SOFTWARE)
def test_a_software_event_returns_behind_its_instruction(vmxlab, mode, vector, type_, length):
    """Vol. 3C, 27.6.1.1: the pushed RIP is RIP plus the VM-entry instruction length; no error code."""
    run = vmxlab.run(inject(mode, vector, type_, length=length))
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert delivered(run.exits[0]) == vector
    assert stack_of(run.exits[0], mode) == pushed(mode, PROGRAM + length)
    assert run.exits[1].rip == PROGRAM + 4


def test_an_injected_page_fault_leaves_cr2_alone(vmxlab):
    """Vol. 3C, 27.6.1.1: CR2 is not modified."""
    event = injected(Vector.PF, TYPE.HARDWARE_EXCEPTION, error_code=True)
    case = Case(
        **handlers("mov eax, 0x1230; mov cr2, rax; vmcall; hlt; mov rbp, cr2; hlt", [Vector.PF]),
        reactions=[
            on(ExitReason.VMCALL, times=1).inject(event, error_code=2).skip(),
            # In the handler: on to where CR2 is read.
            on(ExitReason.VMCALL).vmwrite(Field.GUEST_RIP, PROGRAM + 5 + 3 + 3 + 1).resume(),
        ],
    )
    run = vmxlab.run(case)
    assert delivered(run.exits[1]) == Vector.PF
    assert run.exits[2].registers["rbp"] == 0x1230


def test_the_valid_bit_is_cleared_by_the_exit(vmxlab):
    """Vol. 3C, 25.8.3: an exit clears bit 31 of the VM-entry interruption information, and that alone."""
    case = inject(Mode.LONG, 0x30, TYPE.EXTERNAL_INTERRUPT)
    run = vmxlab.run(Case(**{**as_arguments(case), "watch": [INFORMATION]}))
    assert [exit_.watched[INFORMATION] for exit_ in run.exits] == [0x30, 0x30]


def as_arguments(case: Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in ("program", "mode", "data", "fields", "reactions")}


def test_injection_ends_blocking_by_sti_and_mov_ss(vmxlab):
    """Vol. 3C, 27.7.1: behind a vectoring VM entry neither blocks."""
    fields = {Field.GUEST_INTERRUPTIBILITY_STATE: 2}
    case = inject(Mode.LONG, Vector.UD, TYPE.HARDWARE_EXCEPTION, fields=fields)
    run = vmxlab.run(Case(**as_arguments(case), watch=[Field.GUEST_INTERRUPTIBILITY_STATE]))
    assert [exit_.watched[Field.GUEST_INTERRUPTIBILITY_STATE] for exit_ in run.exits] == [0, 0]


# --- pending MTF -------------------------------------------------------------------------------------------


@pytest.mark.vmx_needs(PrimaryControls.MONITOR_TRAP_FLAG)
def test_a_pending_mtf_exit_comes_before_the_first_instruction(vmxlab):
    """Vol. 3C, 27.6.2: type 7, vector 0: an MTF exit right after entry, though the control is 0."""
    (exit_,) = vmxlab.run(Case(fields={INFORMATION: injected(0, TYPE.OTHER_EVENT)})).exits
    assert exit_.full_reason == ExitReason.MONITOR_TRAP_FLAG
    assert exit_.raw_qualification == 0
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert (exit_.rip, exit_.rflags) == (PROGRAM, 2)


@pytest.mark.vmx_known_difference("injection-of-a-pending-mtf-without-mtf")
def test_without_the_monitor_trap_flag_there_is_no_such_event(vmxlab):
    """Vol. 3C, 27.2.1.3: type 7 is only for processors that support the control; else VMfailValid(7)."""
    if vmxlab.capabilities.supports(PrimaryControls.MONITOR_TRAP_FLAG):
        pytest.skip("the processor has the monitor trap flag")
    run = vmxlab.run(Case(fields={INFORMATION: injected(0, TYPE.OTHER_EVENT)}))
    assert run.exits == ()
    assert run.outcome("vmlaunch").error == InstructionError.ENTRY_INVALID_CONTROL_FIELDS
