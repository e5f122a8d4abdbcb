"""Accesses of L2 to the debug registers: with and without "MOV-DR exiting".

SDM Vol. 3C, 26.1.3 (MOV DR, and what it takes priority over), 28.2.1 with table 28-4 (exit qualification),
28.3.1 (what an exit saves); Vol. 3B, 18.2 (the registers themselves).
"""

from __future__ import annotations

import pytest

from vmxlab import (
    Case,
    EntryControls,
    Exit,
    ExitControls,
    ExitReason,
    Field,
    PrimaryControls,
    SecondaryControls,
)
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.registers import CR4, DR7, GENERAL_REGISTERS, Vector

EXITING = PrimaryControls.MOV_DR_EXITING

REGISTERS = {name: 0x0101_0101_0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)}
REGISTERS["rsp"] = 0x7000

DEBUG_REGISTERS = (0, 1, 2, 3, 6, 7)


def check_access(exit_: Exit, dr: int, register: str, *, reads: bool) -> None:
    """The whole of a MOV DR exit: nothing is set in the qualification but what table 28-4 names."""
    index = GENERAL_REGISTERS.index(register)
    assert exit_.full_reason == ExitReason.MOV_DR, exit_
    qualification = exit_.qualification
    assert (qualification.dr, qualification.from_dr, qualification.register) == (dr, reads, index)
    assert exit_.raw_qualification == dr | reads << 4 | index << 8
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


@pytest.mark.parametrize("reads", [False, True], ids=["to", "from"])
@pytest.mark.parametrize("dr", DEBUG_REGISTERS)
def test_mov_dr_exits_and_names_its_registers(vmxlab, dr, reads):
    """Vol. 3C, 26.1.3 and table 28-4: debug and general register, direction; nothing has been done yet."""
    template = "mov {register}, dr{dr}" if reads else "mov dr{dr}, {register}"
    program = "; ".join(template.format(register=name, dr=dr) for name in GENERAL_REGISTERS)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS, enable=EXITING))
    assert run.reasons == [ExitReason.MOV_DR] * 16 + [ExitReason.HLT]
    for register, exit_, following in zip(GENERAL_REGISTERS, run.exits, run.exits[1:], strict=False):
        check_access(exit_, dr, register, reads=reads)
        assert exit_.instruction_length == (4 if register in GENERAL_REGISTERS[8:] else 3)
        assert following.rip == exit_.rip + exit_.instruction_length
        assert exit_.registers == REGISTERS


def test_an_access_that_exits_changes_no_debug_register(vmxlab):
    """Vol. 3C, 28.1: the exit is fault-like; skipped, DR7 is what it was."""
    case = Case(program="mov eax, 0x455; mov dr7, rax; hlt", enable=EXITING, watch=[Field.GUEST_DR7])
    run = vmxlab.run(case)
    assert [exit_.watched[Field.GUEST_DR7] for exit_ in run.exits] == [0x400, 0x400]


# --- without exiting ---------------------------------------------------------------------------------------


def test_without_exiting_l2_reads_what_it_wrote(vmxlab):
    """Vol. 3C, 26.1.3: with "MOV-DR exiting" 0 the registers are L2's own."""
    values = {0: 0x1234_5678, 1: 0x7FFF_0000_1111, 2: 0xFFFF_8000_0000_2222, 3: 0x3333}
    writes = "; ".join(f"mov rax, {value:#x}; mov dr{dr}, rax" for dr, value in values.items())
    reads = "; ".join(f"mov r{8 + dr}, dr{dr}" for dr in values)
    run = vmxlab.run(Case(program=f"{writes}; {reads}; hlt", disable=EXITING))
    assert run.reasons == [ExitReason.HLT]
    assert {dr: run.exits[0].registers[f"r{8 + dr}"] for dr in values} == values


@pytest.mark.vmx_needs(EntryControls.LOAD_DEBUG_CONTROLS, ExitControls.SAVE_DEBUG_CONTROLS)
def test_dr7_is_loaded_at_entry_and_saved_at_exit(vmxlab):
    """Vol. 3C, 27.3.2.1 and 28.3.1: with the debug controls loaded and saved, DR7 is L2's own."""
    loaded = int(DR7.FIXED1 | DR7.G1)
    written = int(DR7.FIXED1 | DR7.L0 | DR7.GE)
    case = Case(
        program=f"mov rax, dr7; mov ebx, {written:#x}; mov dr7, rbx; vmcall; mov rcx, dr7; hlt",
        fields={Field.GUEST_DR7: loaded},
        disable=EXITING,
        watch=[Field.GUEST_DR7],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.VMCALL, ExitReason.HLT]
    assert run.exits[1].registers["rax"] == loaded
    assert run.exits[1].registers["rcx"] == written
    assert [exit_.watched[Field.GUEST_DR7] for exit_ in run.exits] == [written, written]


def test_without_saved_debug_controls_dr7_stays_as_it_was_in_the_vmcs(vmxlab):
    """Vol. 3C, 28.3.1: DR7 is saved only if the "save debug controls" VM-exit control is 1."""
    case = Case(
        program="mov ebx, 0x401; mov dr7, rbx; hlt",
        disable=(EXITING, ExitControls.SAVE_DEBUG_CONTROLS),
        watch=[Field.GUEST_DR7],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[Field.GUEST_DR7] == 0x400


# --- priority ----------------------------------------------------------------------------------------------


def check_fault(exit_: Exit, vector: Vector) -> None:
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.interruption.vector == vector
    assert exit_.rip == PROGRAM


@pytest.mark.parametrize("dr", [4, 5])
@pytest.mark.parametrize("exiting", [False, True])
def test_dr4_and_dr5_with_debugging_extensions(vmxlab, dr, exiting):
    """Vol. 3C, 26.1.3: with CR4.DE set DR4 and DR5 are #UD, but the exit takes priority over that."""
    cr4 = CR4.PAE | CR4.DE | vmxlab.capabilities.cr4_fixed0
    control = {"enable": EXITING} if exiting else {"disable": EXITING}
    run = vmxlab.run(Case(program=f"mov rdx, dr{dr}; hlt", fields={Field.GUEST_CR4: int(cr4)}, **control))
    if exiting:
        check_access(run.exits[0], dr, "rdx", reads=True)
    else:
        check_fault(run.exits[0], Vector.UD)


def test_dr4_and_dr5_without_debugging_extensions_are_dr6_and_dr7(vmxlab):
    """Vol. 3B, 18.2.2: with CR4.DE clear DR4 and DR5 are aliases of DR6 and DR7."""
    program = "mov rax, dr4; mov rbx, dr6; mov rcx, dr5; mov rdx, dr7; hlt"
    run = vmxlab.run(Case(program=program, disable=EXITING))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert (registers["rax"], registers["rcx"]) == (registers["rbx"], registers["rdx"])


@pytest.mark.vmx_needs(EntryControls.LOAD_DEBUG_CONTROLS)
@pytest.mark.parametrize("exiting", [False, True])
def test_general_detect(vmxlab, exiting):
    """Vol. 3C, 26.1.1 and 28.2.1: with DR7.GD set MOV DR is #DB (BD, bit 13), but an exit comes first."""
    fields = {Field.GUEST_DR7: int(DR7.FIXED1 | DR7.GD)}
    control = {"enable": EXITING} if exiting else {"disable": EXITING}
    run = vmxlab.run(Case(program="mov rax, dr0; hlt", fields=fields, **control))
    if exiting:
        check_access(run.exits[0], 0, "rax", reads=True)
    else:
        check_fault(run.exits[0], Vector.DB)
        assert run.exits[0].raw_qualification == 1 << 13


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("exiting", [False, True])
def test_mov_dr_at_privilege_level_3(vmxlab, exiting):
    """Vol. 3C, 26.1.3: at CPL 3 MOV DR is #GP(0), but, other than most, this exit takes priority over it."""
    fields = {Field.GUEST_CR3: 0x14000, Field.GUEST_CS_SELECTOR: 0x0B, Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB}
    for name in ("SS", "DS", "ES", "FS", "GS"):
        fields[Field[f"GUEST_{name}_SELECTOR"]] = 0x13
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
    tables = {0x14000: 0x15007, 0x15000: 0x16007, 0x16000: 0x87}  # all of L2's memory, for CPL 3
    control = {"enable": EXITING} if exiting else {"disable": EXITING}
    case = Case(
        program="mov dr0, rdi; hlt",
        fields=fields,
        data={at: entry.to_bytes(8, "little") for at, entry in tables.items()},
        **control,
    )
    run = vmxlab.run(case)
    if exiting:
        check_access(run.exits[0], 0, "rdi", reads=False)
    else:
        check_fault(run.exits[0], Vector.GP)
        assert run.exits[0].interruption_error_code == 0


def test_an_undefined_dr7_value_exits_too(vmxlab):
    """Vol. 3C, 26.1.1: bits 63:32 of DR7 and DR6 are #GP(0) in 64-bit mode, but the exit comes first."""
    registers = {"rax": 1 << 32}
    for dr in (6, 7):
        run = vmxlab.run(Case(program=f"mov dr{dr}, rax; hlt", registers=registers, enable=EXITING))
        check_access(run.exits[0], dr, "rax", reads=False)
        run = vmxlab.run(Case(program=f"mov dr{dr}, rax; hlt", registers=registers, disable=EXITING))
        check_fault(run.exits[0], Vector.GP)
