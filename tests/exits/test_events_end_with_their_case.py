"""What a case leaves of interrupts, NMIs, an INIT, timer and setup of the APIC: the next sees none of it."""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, PinControls, SecondaryControls
from vmxlab.cases.second_processor import HALT
from vmxlab.cases.steps import ApicRead, ApicWrite
from vmxlab.sdm.apic import ApicRegister, ApicTimerDivide, LocalVectorFlags
from vmxlab.sdm.registers import RFLAGS

from .events import INIT, NMI, SWITCH_ON, before_entry, handlers, interrupt, sends, with_apic

R = ApicRegister

EXITING = (PinControls.EXTERNAL_INTERRUPT_EXITING, PinControls.NMI_EXITING)

SETUP = (
    R.TASK_PRIORITY,
    R.LOGICAL_DESTINATION,
    R.DESTINATION_FORMAT,
    R.SPURIOUS_INTERRUPT_VECTOR,
    R.LVT_TIMER,
    R.LVT_LINT0,
    R.LVT_ERROR,
    R.DIVIDE_CONFIGURATION,
    R.INITIAL_COUNT,
)
EMPTY = [register for register in R if register.name.startswith(("IN_SERVICE_", "INTERRUPT_REQUEST_"))]


def seen(vmxlab, second_program: bytes | None = None) -> tuple[list[int], list[int]]:
    """What a case finds that L2 spends with interrupts and NMIs exiting: (setup, IRR and ISR) of the APIC."""
    reads = tuple(ApicRead(register) for register in (*SETUP, *EMPTY))
    case = Case(
        program="mov ecx, 1000; again: loop again; hlt",
        fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2},
        enable=EXITING,
        steps=(*before_entry(), *reads),
        second_program=second_program,
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.faults == ()
    values = [outcome.value for outcome in run.outcomes if outcome.operation == "apic-read"]
    assert [o.register for o in run.outcomes if o.operation == "apic-read"] == [*SETUP, *EMPTY]
    return values[: len(SETUP)], values[len(SETUP) :]


def leaves_pending() -> Case:
    return Case(steps=(SWITCH_ON, *before_entry(*[interrupt(v) for v in (0x20, 0x55, 0x91, 0xFE)])))


def leaves_in_service() -> Case:
    vectors = (0x45, 0x77)
    return Case(
        **handlers("nop; hlt", vectors, fields={Field.GUEST_RFLAGS: int(RFLAGS.IF) | 2}),
        disable=PinControls.EXTERNAL_INTERRUPT_EXITING,
        steps=(SWITCH_ON, *before_entry(*map(interrupt, vectors), interrupt(0x44))),
    )


def leaves_a_setup() -> Case:
    writes = {
        R.TASK_PRIORITY: 0x90,
        R.LOGICAL_DESTINATION: 0x0100_0000,
        R.LVT_LINT0: LocalVectorFlags.MASKED | 0x40,
        R.LVT_ERROR: LocalVectorFlags.MASKED | 0x41,
    }
    writes_ = (ApicWrite(register, int(value)) for register, value in writes.items())
    return Case(steps=(SWITCH_ON, *before_entry(*writes_, interrupt(0x33))))


def leaves_a_timer() -> Case:
    return Case(
        steps=(
            SWITCH_ON,
            ApicWrite(R.DIVIDE_CONFIGURATION, ApicTimerDivide.BY_128),
            ApicWrite(R.LVT_TIMER, int(LocalVectorFlags.TIMER_PERIODIC) | 0x66),
            ApicWrite(R.INITIAL_COUNT, 100),
            *before_entry(),
        )
    )


def leaves_an_nmi() -> Case:
    # In the handler NMIs are blocked, so the second one is pending when the case ends.
    case = handlers(f"{sends(NMI)}; hlt", [2], ept=with_apic())
    program = str(case.pop("program")).replace("vmcall", f"{sends(NMI)}; hlt")
    return Case(program=program, **case, disable=(PinControls.NMI_EXITING, PinControls.VIRTUAL_NMIS))


def leaves_two_nmis_and_a_blocking() -> Case:
    return Case(program=f"{sends(NMI)}; hlt", ept=with_apic(), enable=PinControls.NMI_EXITING)


def leaves_an_init() -> Case:
    return Case(program=f"{sends(INIT)}; hlt", ept=with_apic())


def leaves_a_second_processor_at_work() -> Case:
    command = 1 << 14 | 0x99
    sent = f"mov dword ptr [APIC + 0x310], 0; again: mov dword ptr [APIC + 0x300], {command:#x}; jmp again"
    return Case(
        program="mov ecx, 1000; 1: loop 1b; hlt", second_program=sent, steps=(SWITCH_ON, *before_entry())
    )


WITH_EPT = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)


@pytest.mark.parametrize(
    "leaves",
    [
        leaves_pending,
        leaves_in_service,
        leaves_a_setup,
        leaves_a_timer,
        pytest.param(leaves_an_nmi, marks=WITH_EPT),
        pytest.param(leaves_two_nmis_and_a_blocking, marks=WITH_EPT),
        pytest.param(leaves_an_init, marks=WITH_EPT),
        leaves_a_second_processor_at_work,
    ],
)
def test_the_next_case_sees_nothing_of_it(vmxlab, leaves):
    case = leaves()
    second_program = None if case.second_program is None else HALT  # or it would be another machine
    setup, _ = seen(vmxlab, second_program)
    assert vmxlab.run(case).exits
    assert seen(vmxlab, second_program) == (setup, [0] * len(EMPTY))
