"""Instructions of L2 that exit: always, or by their control; and what each exit says of the instruction.

SDM Vol. 3C, 26.1.2 (unconditionally), 26.1.3 (by control), 28.2.1 (exit qualification), 28.2.5 (instruction
length and information).
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    Exit,
    ExitReason,
    Field,
    Mode,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    on,
)
from vmxlab.cases.case import Limits
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.registers import CR4, GENERAL_REGISTERS, RFLAGS, ActivityState, Vector

P = PrimaryControls
S = SecondaryControls

REGISTERS = {name: 0x0101_0101_0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)}
REGISTERS["rsp"] = 0x7000
FLAGS = RFLAGS.CF | RFLAGS.SF | RFLAGS.FIXED1 | RFLAGS.OF


def check_exit(exit_: Exit, reason: ExitReason, *, rip: int, length: int, qualification: int = 0) -> None:
    """All that is recorded for any exit due to an instruction, and that no event has to do with it."""
    assert exit_.full_reason == reason, exit_
    assert exit_.rip == rip, exit_
    assert exit_.instruction_length == length, exit_
    assert exit_.raw_qualification == qualification, exit_
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def check_undefined(exit_: Exit, rip: int) -> None:
    """An invalid-opcode exception at `rip`."""
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.interruption.vector == Vector.UD
    assert not exit_.interruption.error_code_valid
    assert exit_.rip == rip


# --- exits that hold nothing but the instruction's length --------------------------------------------------

UNCONDITIONAL = {
    "cpuid": ExitReason.CPUID,
    "invd": ExitReason.INVD,
    "vmcall": ExitReason.VMCALL,
    "vmlaunch": ExitReason.VMLAUNCH,
    "vmresume": ExitReason.VMRESUME,
    "vmxoff": ExitReason.VMXOFF,
}
BY_CONTROL = {
    "hlt": (ExitReason.HLT, P.HLT_EXITING),
    "rdtsc": (ExitReason.RDTSC, P.RDTSC_EXITING),
    "rdpmc": (ExitReason.RDPMC, P.RDPMC_EXITING),
    "pause": (ExitReason.PAUSE, P.PAUSE_EXITING),
    "wbinvd": (ExitReason.WBINVD, S.WBINVD_EXITING),
}
LENGTHS = {
    "cpuid": 2,
    "hlt": 1,
    "invd": 2,
    "pause": 2,
    "rdpmc": 2,
    "rdtsc": 2,
    "rdtscp": 3,
    "vmcall": 3,
    "vmlaunch": 3,
    "vmresume": 3,
    "vmxoff": 3,
    "wbinvd": 2,
}


@pytest.mark.parametrize("instruction", UNCONDITIONAL)
def test_instructions_that_exit_unconditionally(vmxlab, instruction):
    """Vol. 3C, 26.1.2: these exit in VMX non-root operation whatever the controls are."""
    run = vmxlab.run(Case(program=f"nop; {instruction}; hlt", registers=REGISTERS))
    assert run.reasons == [UNCONDITIONAL[instruction], ExitReason.HLT]
    check_exit(run.exits[0], UNCONDITIONAL[instruction], rip=PROGRAM + 1, length=LENGTHS[instruction])


@pytest.mark.parametrize("instruction", BY_CONTROL)
def test_instructions_that_exit_by_their_control(vmxlab, instruction):
    """Vol. 3C, 26.1.3: with its control set the instruction exits, and has had no effect."""
    reason, control = BY_CONTROL[instruction]
    run = vmxlab.run(Case(program=f"nop; {instruction}; vmcall", registers=REGISTERS, enable=control))
    check_exit(run.exits[0], reason, rip=PROGRAM + 1, length=LENGTHS[instruction])
    assert run.exits[0].registers == REGISTERS


@pytest.mark.parametrize("instruction", [name for name in BY_CONTROL if name not in ("hlt", "rdpmc")])
def test_instructions_that_do_not_exit_without_their_control(vmxlab, instruction):
    """Vol. 3C, 26.1.3: with its control clear the instruction is executed in L2."""
    control = BY_CONTROL[instruction][1]
    case = Case(program=f"{instruction}; hlt", disable=control, registers={"rcx": 0})
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


def check_counter_was_read(exit_: Exit, rip: int) -> None:
    """What follows RDPMC at `rip` that was executed: HLT, or #GP(0) for want of the counter (Vol. 2B)."""
    if exit_.reason is ExitReason.HLT:
        assert exit_.rip == rip + LENGTHS["rdpmc"]
        return
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.interruption.vector == Vector.GP
    assert exit_.interruption_error_code == 0
    assert exit_.rip == rip


def test_rdpmc_does_not_exit_without_its_control(vmxlab):
    """Vol. 3C, 26.1.3: it is executed in L2, where a processor without counters has a fault of its own."""
    run = vmxlab.run(Case(program="rdpmc; hlt", disable=P.RDPMC_EXITING, registers={"rcx": 0}))
    assert len(run.exits) == 1
    check_counter_was_read(run.exits[0], PROGRAM)


@pytest.mark.parametrize("instruction", ["cpuid", "vmcall", "invd", "vmxoff"])
def test_a_skipped_instruction_changes_neither_registers_nor_flags(vmxlab, instruction):
    """Vol. 3C, 28.1: these exits are fault-like: nothing has been done yet; the skip moves RIP alone."""
    case = Case(program=f"{instruction}; hlt", registers=REGISTERS, fields={Field.GUEST_RFLAGS: int(FLAGS)})
    run = vmxlab.run(case)
    for exit_ in run.exits:
        assert exit_.registers == REGISTERS
        assert exit_.rflags & ~RFLAGS.RF == FLAGS
    assert run.exits[1].rip == PROGRAM + LENGTHS[instruction]


@pytest.mark.parametrize("instruction", ["cpuid", "vmcall", "hlt", "in al, 0x60", "mov cr3, rax", "vmlaunch"])
def test_an_instruction_that_exits_saves_the_resume_flag_as_0(vmxlab, instruction):
    """Vol. 3C, 28.3.3: RFLAGS.RF is saved as 0 by exits due to an instruction, though it was 1 at entry."""
    fields = {Field.GUEST_RFLAGS: int(RFLAGS.RF | RFLAGS.FIXED1)}
    run = vmxlab.run(Case(program=instruction, fields=fields, enable=P.CR3_LOAD_EXITING))
    assert run.exits[0].rip == PROGRAM
    assert run.exits[0].rflags == RFLAGS.FIXED1


@pytest.mark.vmx_known_difference("exception-exit-rf-clear")
def test_a_fault_that_exits_saves_the_resume_flag_as_1(vmxlab):
    """Vol. 3C, 28.3.3: RF as delivery would have pushed it, which is 1 for a fault (Vol. 3B, 18.3.1.1)."""
    run = vmxlab.run(Case(program="ud2"))
    check_undefined(run.exits[0], PROGRAM)
    assert run.exits[0].rflags == RFLAGS.RF | RFLAGS.FIXED1


@pytest.mark.parametrize(("prefixes", "mode"), [(b"\x40", Mode.LONG), (b"\x3e\x2e", Mode.PROTECTED)])
def test_prefixes_count_into_the_instruction_length(vmxlab, prefixes, mode):
    """Vol. 3C, 28.2.5: the length is that of the whole instruction, prefixes included."""
    run = vmxlab.run(Case(program=prefixes + b"\x0f\xa2\xf4", mode=mode))
    check_exit(run.exits[0], ExitReason.CPUID, rip=PROGRAM, length=len(prefixes) + 2)
    assert run.exits[1].rip == PROGRAM + len(prefixes) + 2


# --- HLT ---------------------------------------------------------------------------------------------------


@pytest.mark.vmx_needs(PinControls.ACTIVATE_PREEMPTION_TIMER)
def test_hlt_without_exiting_halts_l2(vmxlab):
    """Vol. 3C, 26.1.3 and 28.3.4: HLT then enters the HLT state, which the next exit saves, RIP behind it."""
    run = vmxlab.run(
        Case(
            program="nop; hlt; vmcall",
            disable=P.HLT_EXITING,
            limits=Limits(l2_tsc=10_000_000),  # a hypervisor below may need some of it to enter L2
            watch=[Field.GUEST_ACTIVITY_STATE],
        )
    )
    assert run.reasons == [ExitReason.PREEMPTION_TIMER]
    assert run.exits[0].watched[Field.GUEST_ACTIVITY_STATE] == ActivityState.HLT
    assert run.exits[0].rip == PROGRAM + 2


def test_an_exit_from_the_active_state_saves_the_active_state(vmxlab):
    """Vol. 3C, 28.3.4: HLT that exits does not halt; the activity state saved is active."""
    run = vmxlab.run(Case(watch=[Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_STATE]))
    assert run.exits[0].watched == {
        Field.GUEST_ACTIVITY_STATE: ActivityState.ACTIVE,
        Field.GUEST_INTERRUPTIBILITY_STATE: 0,
    }


# --- instructions that the processor or a control may lack -------------------------------------------------


@pytest.mark.vmx_needs(S.ENABLE_RDTSCP)
def test_rdtscp_exits_by_rdtsc_exiting(vmxlab):
    """Vol. 3C, 26.1.3: with "enable RDTSCP" it exits where "RDTSC exiting" is 1, with a reason of its own."""
    run = vmxlab.run(Case(program="rdtscp; hlt", enable=(S.ENABLE_RDTSCP, P.RDTSC_EXITING)))
    assert run.reasons == [ExitReason.RDTSCP, ExitReason.HLT]
    check_exit(run.exits[0], ExitReason.RDTSCP, rip=PROGRAM, length=LENGTHS["rdtscp"])
    case = Case(program="rdtscp; hlt", enable=S.ENABLE_RDTSCP, disable=P.RDTSC_EXITING)
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


@pytest.mark.parametrize("exiting", [False, True])
def test_rdtscp_is_undefined_without_enable_rdtscp(vmxlab, exiting):
    """Vol. 3C, 26.3: with "enable RDTSCP" 0 it is #UD, which takes priority over "RDTSC exiting"."""
    run = vmxlab.run(Case(program="rdtscp; hlt", enable=P.RDTSC_EXITING if exiting else ()))
    check_undefined(run.exits[0], PROGRAM)


@pytest.mark.parametrize("exiting", [False, True])
def test_invpcid_is_undefined_without_enable_invpcid(vmxlab, exiting):
    """Vol. 3C, 26.3: with "enable INVPCID" 0 it is #UD, which takes priority over "INVLPG exiting"."""
    run = vmxlab.run(Case(program="invpcid rax, [DATA]; hlt", enable=P.INVLPG_EXITING if exiting else ()))
    check_undefined(run.exits[0], PROGRAM)


def xsetbv_case(vmxlab, *, osxsave: bool, xcr0: int = 1) -> Case:
    wanted = CR4.PAE | vmxlab.capabilities.cr4_fixed0
    if osxsave:
        vmxlab.require(CR4.OSXSAVE)
        wanted |= CR4.OSXSAVE
    fields = {Field.GUEST_CR4: int(wanted)}
    return Case(program="xsetbv; hlt", registers={"rax": xcr0, "rdx": 0, "rcx": 0}, fields=fields)


@pytest.mark.parametrize("xcr0", [1, 0], ids=["valid", "invalid"])
def test_xsetbv_exits_unconditionally(vmxlab, xcr0):
    """Vol. 3C, 26.1.1 and 26.1.2: XSETBV exits, and before the #GP(0) that a bad value would be."""
    run = vmxlab.run(xsetbv_case(vmxlab, osxsave=True, xcr0=xcr0))
    assert run.reasons == [ExitReason.XSETBV, ExitReason.HLT]
    check_exit(run.exits[0], ExitReason.XSETBV, rip=PROGRAM, length=3)


def test_xsetbv_without_osxsave_is_undefined(vmxlab):
    """Vol. 3C, 26.1.1: invalid-opcode exceptions come before exits: CR4.OSXSAVE 0 makes XSETBV #UD."""
    run = vmxlab.run(xsetbv_case(vmxlab, osxsave=False))
    check_undefined(run.exits[0], PROGRAM)


def test_getsec_without_smxe_is_undefined(vmxlab):
    """Vol. 3C, 26.1.2, note: GETSEC exits only if CR4.SMXE is 1; else it is #UD."""
    check_undefined(vmxlab.run(Case(program="getsec; hlt")).exits[0], PROGRAM)


def test_getsec_with_smxe_exits(vmxlab):
    """Vol. 3C, 26.1.2, note: with CR4.SMXE set GETSEC exits whatever EAX says."""
    vmxlab.require(CR4.SMXE)
    cr4 = CR4.PAE | CR4.SMXE | vmxlab.capabilities.cr4_fixed0
    run = vmxlab.run(Case(program="getsec; hlt", fields={Field.GUEST_CR4: int(cr4)}))
    assert run.reasons == [ExitReason.GETSEC, ExitReason.HLT]
    check_exit(run.exits[0], ExitReason.GETSEC, rip=PROGRAM, length=2)


def test_rsm_outside_smm_is_undefined(vmxlab):
    """Vol. 3C, 26.1.2: RSM exits in SMM alone; outside it is #UD."""
    check_undefined(vmxlab.run(Case(program="rsm; hlt")).exits[0], PROGRAM)


def test_vmfunc_is_undefined_without_its_control(vmxlab):
    """Vol. 3C, 26.5.6.2: with "enable VM functions" 0 VMFUNC is #UD."""
    check_undefined(vmxlab.run(Case(program="vmfunc; hlt")).exits[0], PROGRAM)


# --- MONITOR and MWAIT -------------------------------------------------------------------------------------


def run_monitor(vmxlab, case: Case):
    """Skips where MONITOR is #UD, which is how a processor without CPUID.1:ECX.MONITOR[3] answers."""
    run = vmxlab.run(case)
    if run.exits[0].interruption.valid and run.exits[0].interruption.vector == Vector.UD:
        pytest.skip("the processor lacks MONITOR and MWAIT (they are #UD)")
    return run


def test_monitor_and_mwait_exit_by_their_controls(vmxlab):
    """Vol. 3C, 26.1.3: MONITOR exits by "MONITOR exiting", MWAIT by "MWAIT exiting"."""
    controls = (P.MONITOR_EXITING, P.MWAIT_EXITING)
    case = Case(program="monitor; mwait; hlt", registers={"rax": 0x10000}, enable=controls)
    run = run_monitor(vmxlab, case)
    assert run.reasons == [ExitReason.MONITOR, ExitReason.MWAIT, ExitReason.HLT]
    check_exit(run.exits[0], ExitReason.MONITOR, rip=PROGRAM, length=3)
    check_exit(run.exits[1], ExitReason.MWAIT, rip=PROGRAM + 3, length=3)
    assert run.exits[1].qualification.armed is False  # 27.3.3: VM entry clears address-range monitoring


def test_monitor_without_exiting_is_executed(vmxlab):
    """Vol. 3C, 26.1.3 and 28.2.1: MWAIT's qualification is 1 where monitoring is armed, else 0.

    The SDM lets a processor not arm it (Vol. 2B, MWAIT), so both are right.
    """
    case = Case(
        program="monitor; mwait; hlt",
        registers={"rax": 0x10000},
        enable=P.MWAIT_EXITING,
        disable=P.MONITOR_EXITING,
    )
    run = run_monitor(vmxlab, case)
    assert run.reasons == [ExitReason.MWAIT, ExitReason.HLT]
    armed = run.exits[0].qualification.armed
    check_exit(run.exits[0], ExitReason.MWAIT, rip=PROGRAM + 3, length=3, qualification=int(armed))


# --- INVLPG ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "operand_text", "address"),
    [
        (Mode.LONG, "[rbx + 0x345]", 0x1234_5678_9345),
        (Mode.LONG, "[ebx + 0x345]", 0x5678_9345),
        (Mode.LONG, "fs:[rbx]", 0x1234_5678_9000 + 0x2_0000_0000),
        (Mode.PROTECTED, "[ebx + 0x345]", 0x5678_9345),
        (Mode.PROTECTED, "fs:[ebx]", 0x5678_9000),
    ],
)
def test_invlpg_exits_with_its_linear_address(vmxlab, mode, operand_text, address):
    """Vol. 3C, 28.2.1: the qualification of INVLPG is its linear address, 32 bits outside 64-bit mode."""
    fields = {Field.GUEST_FS_BASE: 0x2_0000_0000} if mode is Mode.LONG else {}
    case = Case(
        program=f"invlpg {operand_text}; hlt",
        mode=mode,
        registers={"rbx": 0x1234_5678_9000},
        enable=P.INVLPG_EXITING,
        fields=fields,
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.INVLPG, ExitReason.HLT]
    length = run.exits[1].rip - PROGRAM
    check_exit(run.exits[0], ExitReason.INVLPG, rip=PROGRAM, length=length, qualification=address)
    assert run.exits[0].qualification.linear_address == address


def test_invlpg_without_exiting_is_executed(vmxlab):
    """Vol. 3C, 26.1.3: INVLPG exits only with "INVLPG exiting"."""
    case = Case(program="invlpg [0x12345]; hlt", disable=P.INVLPG_EXITING)
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


# --- privilege ---------------------------------------------------------------------------------------------


USER_PAGES = {0x14000: 0x15007, 0x15000: 0x16007, 0x16000: 0x87}
"""Page tables of L2 that map its memory for CPL 3, by their addresses."""


def at_privilege_3(program: str) -> Case:
    """A case whose program runs with CPL 3."""
    fields = {Field.GUEST_CR3: 0x14000, Field.GUEST_CS_SELECTOR: 0x0B, Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB}
    for name in ("SS", "DS", "ES", "FS", "GS"):
        fields[Field[f"GUEST_{name}_SELECTOR"]] = 0x13
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
    tables = {at: entry.to_bytes(8, "little") for at, entry in USER_PAGES.items()}
    return Case(program=program, fields=fields, data=tables)


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.parametrize("instruction", ["hlt", "invd", "clts", "mov rax, cr3", "rdmsr", "invlpg [rax]"])
def test_privilege_faults_come_before_exits(vmxlab, instruction):
    """Vol. 3C, 26.1.1: faults based on privilege level take priority over exits: #GP(0) at CPL 3."""
    run = vmxlab.run(at_privilege_3(f"nop; {instruction}"))
    exit_ = run.exits[0]
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    assert exit_.interruption.vector == Vector.GP
    assert exit_.interruption_error_code == 0
    assert exit_.rip == PROGRAM + 1


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("cpuid", ExitReason.CPUID),
        ("vmcall", ExitReason.VMCALL),
        ("vmxoff", ExitReason.VMXOFF),
        ("vmread rax, rcx", ExitReason.VMREAD),
        ("vmclear [rax]", ExitReason.VMCLEAR),
    ],
)
def test_cpuid_and_vmx_instructions_exit_at_any_privilege(vmxlab, instruction, reason):
    """Vol. 3C, 31.3: in VMX non-root operation VMX instructions exit before their CPL is looked at."""
    run = vmxlab.run(at_privilege_3(f"nop; {instruction}"))
    assert run.exits[0].full_reason == reason
    assert run.exits[0].rip == PROGRAM + 1


def test_a_control_is_not_taken_for_another_with_the_same_bit(vmxlab):
    """Vol. 3C, 25.6.2: "RDPMC exiting" and "RDRAND exiting" are bit 11 of two different sets."""
    vmxlab.require(S.RDRAND_EXITING)
    program = "rdrand rax; rdpmc; hlt"
    rdpmc_exits = vmxlab.run(Case(program=program, enable=P.RDPMC_EXITING, disable=S.RDRAND_EXITING))
    assert rdpmc_exits.reasons == [ExitReason.RDPMC, ExitReason.HLT]
    rdrand_exits = vmxlab.run(Case(program=program, enable=S.RDRAND_EXITING, disable=P.RDPMC_EXITING))
    assert rdrand_exits.reasons[0] is ExitReason.RDRAND
    assert len(rdrand_exits.exits) == 2
    check_counter_was_read(rdrand_exits.exits[1], PROGRAM + len(b"\x48\x0f\xc7\xf0"))


def test_an_exit_reason_can_be_answered_in_l2s_registers(vmxlab):
    """What a hypervisor does with CPUID: its own answer in the registers, and on behind it."""
    answer = on(ExitReason.CPUID).set("rax", 0x16).set("rbx", 0x756E_6547).skip()
    run = vmxlab.run(Case(program="xor eax, eax; cpuid; hlt", reactions=[answer]))
    assert run.exits[-1].registers["rax"] == 0x16
    assert run.exits[-1].registers["rbx"] == 0x756E_6547
