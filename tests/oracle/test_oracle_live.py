"""The oracle beside a machine: cases of each family, predicted to their end, and seen as predicted.

Each is checked as `pytest --vmx-oracle` checks the whole suite: only known differences of the engine are let
through. That each single value can make a check fail is shown without a machine, in test_oracle_check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from vmxlab import (
    Case,
    ExitReason,
    Field,
    IOBitmap,
    Mode,
    MsrBitmap,
    PrimaryControls,
    SecondaryControls,
    VirtualApicPage,
    guest_ept,
    on,
)
from vmxlab.cases.memory import DATA, machine_address
from vmxlab.cases.steps import STANDARD, Enter, ReportMemory, Vmread, Vmwrite
from vmxlab.console.check import compare
from vmxlab.console.known import explain
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.registers import CR0

P, S, E = PrimaryControls, SecondaryControls, ExitReason


def instructions() -> Case:
    return Case(
        program="cpuid; invd; rdtsc; pause; wbinvd; invlpg [DATA]; mov rax, cr3; vmcall; vmptrst [rbx]; hlt",
        enable=(P.RDTSC_EXITING, P.PAUSE_EXITING, S.WBINVD_EXITING, P.INVLPG_EXITING, P.CR3_STORE_EXITING),
    )


def io() -> Case:
    bitmap = IOBitmap()
    for port in (0x60, 0x1234):
        bitmap.set_intercept(port, True)
    program = "in al, 0x60; mov dx, 0x1233; out dx, ax; mov dx, 0x80; out dx, al; mov dx, 0x1234; outsb; hlt"
    return Case(program=program, io_bitmap=bitmap, registers={"rsi": DATA})


def msrs() -> Case:
    bitmap = MsrBitmap()
    bitmap.set_write_intercept(0x174, True)
    program = "mov ecx, 0x174; mov eax, 0x33; rdmsr; wrmsr; mov ecx, 0xc0000100; wrmsr; rdmsr; hlt"
    return Case(program=program, msr_bitmap=bitmap, watch=[Field.GUEST_FS_BASE])


def control_registers() -> Case:
    return Case(
        program="clts; lmsw ax; smsw ebx; mov rcx, cr0; mov rdx, cr4; or rcx, 8; mov cr0, rcx; hlt",
        fields={Field.CR0_GUEST_HOST_MASK: int(CR0.TS), Field.CR0_READ_SHADOW: int(CR0.TS)},
        registers={"rax": 1},
        watch=[Field.GUEST_CR0],
    )


def debug_registers() -> Case:
    return Case(program="mov rax, dr7; mov dr0, rbx; hlt", enable=P.MOV_DR_EXITING)


def descriptor_tables() -> Case:
    return Case(program="sgdt [DATA]; sldt eax; ltr [DATA]; hlt", enable=S.DESCRIPTOR_TABLE_EXITING)


def exceptions() -> Case:
    """#BP, and a #GP(0) by an address that is not canonical."""
    breakpoint_ = on(E.EXCEPTION_OR_NMI, times=1).skip()
    return Case(program="int3; mov rax, [rbx]; hlt", registers={"rbx": 1 << 63}, reactions=[breakpoint_])


def ept() -> Case:
    ept = guest_ept()
    ept.protect(DATA + 0x1000, 0x1000, write=False)
    return Case(program="mov rax, [DATA + 0x1000]; mov [DATA + 0x1008], rax; hlt", ept=ept)


def injection() -> Case:
    """It meets an IDT that is too short."""
    return Case(fields={Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0030, Field.GUEST_RFLAGS: 0x202})


def entry_failure() -> Case:
    return Case(program="cpuid; hlt", reactions=[on(E.CPUID).vmwrite("GUEST_RFLAGS", 0).skip()])


def entry_refused() -> Case:
    steps = (*STANDARD[:-1], Enter(go_on=True), Vmread(Field.VM_INSTRUCTION_ERROR))
    return Case(fields={Field.CR3_TARGET_COUNT: 9}, steps=steps)


def root_operation() -> Case:
    first = (Vmread(0x7FFE, go_on=True), Vmwrite(Field.GUEST_RSP, 0x7000), Vmread(Field.GUEST_RSP))
    return Case(steps=(*STANDARD[:-1], *first, Enter(resume=True, go_on=True), Enter()))


def task_priority() -> Case:
    return Case(
        program="mov eax, 7; mov cr8, rax; mov rbx, cr8; mov al, 2; mov cr8, rax; hlt",
        fields={Field.TPR_THRESHOLD: 3},
        reactions=[on(E.TPR_BELOW_THRESHOLD).vmwrite(Field.TPR_THRESHOLD, 2).resume()],
        virtual_apic_page=VirtualApicPage({ApicRegister.TASK_PRIORITY: 0x50}),
    )


def threshold_above_task_priority() -> Case:
    """The second VM entry fails by what L2 has written to VTPR."""
    reactions = [on(E.TPR_BELOW_THRESHOLD).resume()]
    return dataclasses.replace(task_priority(), reactions=reactions)


def arithmetic() -> Case:
    program = "mov ecx, 5; 1: add eax, ecx; imul ebx, eax, 3; push rbx; loop 1b; mov [DATA], rax; hlt"
    return Case(program=program, steps=(*STANDARD, ReportMemory(machine_address(DATA), 8)))


def windows() -> Case:
    again = on(E.INTERRUPT_WINDOW).vmwrite("GUEST_RFLAGS", 2).resume()
    return Case(program="nop; sti; nop; nop; hlt", enable=P.INTERRUPT_WINDOW_EXITING, reactions=[again])


def protected_mode() -> Case:
    return Case(mode=Mode.PROTECTED, program="mov eax, 0x1234; push eax; pop ebx; in al, 0x70; cpuid; hlt")


def real_mode() -> Case:
    return Case(mode=Mode.REAL, program="mov ax, 0x1234; push ax; pop bx; in al, 0x70; cpuid; hlt")


FAMILIES: dict[Callable[[], Case], list[ExitReason]] = {
    instructions: [
        E.CPUID,
        E.INVD,
        E.RDTSC,
        E.PAUSE,
        E.WBINVD,
        E.INVLPG,
        E.CONTROL_REGISTER_ACCESS,
        E.VMCALL,
        E.VMPTRST,
        E.HLT,
    ],
    io: [E.IO_INSTRUCTION] * 3 + [E.HLT],
    msrs: [E.WRMSR, E.HLT],
    control_registers: [E.CONTROL_REGISTER_ACCESS] * 2 + [E.HLT],
    debug_registers: [E.MOV_DR] * 2 + [E.HLT],
    descriptor_tables: [E.GDTR_IDTR_ACCESS, E.LDTR_TR_ACCESS, E.LDTR_TR_ACCESS, E.HLT],
    exceptions: [E.EXCEPTION_OR_NMI] * 2,
    ept: [E.EPT_VIOLATION],
    injection: [E.EXCEPTION_OR_NMI],
    entry_failure: [E.CPUID, E.ENTRY_FAILURE_GUEST_STATE],
    entry_refused: [],
    root_operation: [E.HLT],
    task_priority: [E.TPR_BELOW_THRESHOLD, E.HLT],
    threshold_above_task_priority: [E.TPR_BELOW_THRESHOLD],
    arithmetic: [E.HLT],
    windows: [E.INTERRUPT_WINDOW, E.HLT],
    protected_mode: [E.IO_INSTRUCTION, E.CPUID, E.HLT],
    real_mode: [E.IO_INSTRUCTION, E.CPUID, E.HLT],
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_case_is_predicted_whole_and_runs_as_predicted(vmxlab, family):
    run = vmxlab.run(family())
    comparison = compare(run)
    assert run.reasons == FAMILIES[family]
    assert comparison.prediction.complete, comparison.prediction.unknown
    assert (comparison.exits_predicted, comparison.exits_unknown) == (len(run.exits), 0)
    info = vmxlab.lab.info_of(run)
    explained = explain(comparison.differences, info.name, info.version)
    assert [str(difference) for difference, key in explained if key is None] == []


def test_a_run_that_is_not_as_predicted_is_found(vmxlab):
    """The same machine, and a case that is not the one that ran."""
    run = vmxlab.run(Case(program="cpuid; hlt", registers={"rbx": 1}))
    assert run.check() == ()
    other = vmxlab.run(Case(program="cpuid; hlt", registers={"rbx": 3}))
    (difference, *_) = dataclasses.replace(run, exits=other.exits).check()
    assert difference.where == "exit 0: rbx"
