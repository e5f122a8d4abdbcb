"""Accesses of L2 to GDTR, IDTR, LDTR and TR in all forms: modes, operands, privilege.

SDM Vol. 3C, 26.1.3 (what exits), 28.2.1 (displacement), 28.2.5 with tables 28-10 and 28-11 (operands).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, Field, Mode, SecondaryControls
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.sdm.registers import CR4, GENERAL_REGISTERS, SEGMENT_REGISTERS, Vector

from .guest_setups import merged, user_mode

EXITING = SecondaryControls.DESCRIPTOR_TABLE_EXITING
NEEDED = pytest.mark.vmx_needs(EXITING)

TABLES = {"sgdt": "SGDT", "sidt": "SIDT", "lgdt": "LGDT", "lidt": "LIDT"}
SEGMENTS = {"sldt": "SLDT", "str": "STR", "lldt": "LLDT", "ltr": "LTR"}
REASONS = {
    **dict.fromkeys(TABLES, ExitReason.GDTR_IDTR_ACCESS),
    **dict.fromkeys(SEGMENTS, ExitReason.LDTR_TR_ACCESS),
}
NAMES = {**TABLES, **SEGMENTS}
REGISTERS = {name: 0x0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)} | {"rsp": 0x7000}


def check_exit(exit_, name: str, following) -> None:
    """All that is recorded but the operand; nothing of the instruction has been executed."""
    assert exit_.full_reason == REASONS[name], exit_
    assert exit_.instruction_information.instruction == NAMES[name]
    assert exit_.instruction_length == following.rip - exit_.rip
    assert exit_.registers == REGISTERS
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def check_memory(exit_, *, segment: str, base: str | None, index: str | None, scale: int, bits: int) -> None:
    memory = exit_.instruction_information.memory
    number = GENERAL_REGISTERS.index
    assert memory is not None
    assert SEGMENT_REGISTERS[memory.segment] == segment
    assert memory.base == (None if base is None else number(base))
    assert memory.index == (None if index is None else number(index))
    if index is not None:
        assert memory.scale == scale
    assert memory.address_size == bits


# Text of the operand, what the information says of it, and the displacement.
LONG_OPERANDS = [
    ("fs:[rdx + rsi*2 + 0x7f]", ("fs", "rdx", "rsi", 2, 64), 0x7F),
    ("gs:[r14 + r8*4 - 0x12345]", ("gs", "r14", "r8", 4, 64), -0x12345),
    ("[rsp + rbp*8]", ("ss", "rsp", "rbp", 8, 64), 0),
    ("[r11d + 1]", ("ds", "r11", None, 1, 32), 1),
    ("[rbp + r12]", ("ss", "rbp", "r12", 1, 64), 0),
]
PROTECTED_OPERANDS = [
    ("es:[eax + 4]", ("es", "rax", None, 1, 32), 4),
    ("cs:[ecx*8 + 0x100]", ("cs", None, "rcx", 8, 32), 0x100),
    ("ss:[edx + ebx*2]", ("ss", "rdx", "rbx", 2, 32), 0),
    ("[0x1234]", ("ds", None, None, 1, 32), 0x1234),
    ("[ebp - 8]", ("ss", "rbp", None, 1, 32), -8),
    ("[bx + si + 0x12]", ("ds", "rbx", "rsi", 1, 16), 0x12),
    ("[bp + di]", ("ss", "rbp", "rdi", 1, 16), 0),
    ("gs:[di]", ("gs", "rdi", None, 1, 16), 0),
]


def check_operands(vmxlab, name: str, mode: Mode, operands) -> None:
    program = "; ".join(f"{name} {text}" for text, _, _ in operands)
    run = vmxlab.run(Case(program=f"{program}; hlt", mode=mode, registers=REGISTERS, enable=EXITING))
    assert run.reasons == [REASONS[name]] * len(operands) + [ExitReason.HLT]
    for (text, expected, displacement), exit_, following in zip(
        operands, run.exits, run.exits[1:], strict=False
    ):
        check_exit(exit_, name, following)
        segment, base, index, scale, bits = expected
        check_memory(exit_, segment=segment, base=base, index=index, scale=scale, bits=bits)
        # 28.2.1: bits beyond the instruction's address size are undefined.
        mask = (1 << bits) - 1
        assert exit_.raw_qualification & mask == displacement & mask, text


@NEEDED
@pytest.mark.parametrize("name", NAMES)
def test_memory_operands_in_64_bit_mode(vmxlab, name):
    """Vol. 3C, tables 28-10 and 28-11: segment, base, index, scale, address size; 28.2.1: displacement."""
    check_operands(vmxlab, name, Mode.LONG, LONG_OPERANDS)


@NEEDED
@pytest.mark.parametrize("name", NAMES)
def test_memory_operands_in_protected_mode(vmxlab, name):
    """Vol. 3C, tables 28-10 and 28-11: segments that 64-bit mode ignores, and 16-bit addresses."""
    check_operands(vmxlab, name, Mode.PROTECTED, PROTECTED_OPERANDS)


@NEEDED
@pytest.mark.vmx_known_difference("descriptor-table-operand-size")
@pytest.mark.parametrize("name", TABLES)
def test_the_operand_size_outside_64_bit_mode(vmxlab, name):
    """Vol. 3C, table 28-10: bit 11 is 1 for a 32-bit operand, 0 for a 16-bit one."""
    program = f"{name} [ebx]; .byte 0x66; {name} [ebx]; hlt"
    run = vmxlab.run(Case(program=program, mode=Mode.PROTECTED, registers=REGISTERS, enable=EXITING))
    assert run.reasons == [ExitReason.GDTR_IDTR_ACCESS] * 2 + [ExitReason.HLT]
    for exit_, following, size in zip(run.exits, run.exits[1:], (32, 16), strict=False):
        check_exit(exit_, name, following)
        assert exit_.instruction_information.operand_size == size


@NEEDED
@pytest.mark.parametrize("name", SEGMENTS)
def test_register_operands(vmxlab, name):
    """Vol. 3C, table 28-11: bit 10 tells a register operand, bits 6:3 which one."""
    suffixes = {"rax": "ax", "rcx": "cx", "rdx": "dx", "rbx": "bx", "rsp": "sp", "rbp": "bp", "rsi": "si"}
    words = [suffixes.get(r, "di" if r == "rdi" else f"{r}w") for r in GENERAL_REGISTERS]
    program = "; ".join(f"{name} {word}" for word in words)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS, enable=EXITING))
    assert run.reasons == [REASONS[name]] * 16 + [ExitReason.HLT]
    for number, (exit_, following) in enumerate(zip(run.exits, run.exits[1:], strict=False)):
        check_exit(exit_, name, following)
        assert exit_.instruction_information.memory is None
        assert exit_.instruction_information.register == number


@NEEDED
@pytest.mark.vmx_needs(SecondaryControls.UNRESTRICTED_GUEST)
def test_in_real_mode_the_tables_exit_and_the_segments_are_undefined(vmxlab):
    """Vol. 3C, 26.1.1: SLDT, STR, LLDT and LTR are #UD in real mode (Vol. 2), which comes before the exit."""
    run = vmxlab.run(
        Case(program="lgdt [bx]; sidt [0x1234]; hlt", mode=Mode.REAL, registers=REGISTERS, enable=EXITING)
    )
    assert run.reasons == [ExitReason.GDTR_IDTR_ACCESS] * 2 + [ExitReason.HLT]
    assert [exit_.instruction_information.memory.address_size for exit_ in run.exits[:2]] == [16, 16]
    assert [exit_.instruction_information.operand_size for exit_ in run.exits[:2]] == [16, 16]
    assert run.exits[1].raw_qualification & 0xFFFF == 0x1234
    for name in SEGMENTS:
        run = vmxlab.run(Case(program=f"nop; {name} ax", mode=Mode.REAL, enable=EXITING))
        assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
        assert run.exits[0].interruption.vector == Vector.UD
        assert run.exits[0].rip == PROGRAM + 1


@NEEDED
def test_rip_relative_operands(vmxlab):
    """Vol. 3C, 28.2.1: for RIP-relative addressing the qualification is the next RIP plus displacement."""
    names = [*TABLES, *SEGMENTS]
    program = "; ".join(f"{name} [rip + 0x40]" for name in names)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS, enable=EXITING))
    for name, exit_, following in zip(names, run.exits, run.exits[1:], strict=False):
        check_exit(exit_, name, following)
        assert exit_.raw_qualification == following.rip + 0x40


# --- privilege ---------------------------------------------------------------------------------------------


@NEEDED
@pytest.mark.parametrize("name", ["sgdt", "sidt", "sldt", "str"])
def test_stores_exit_at_any_privilege_level(vmxlab, name):
    """Vol. 3C, 26.1.3: at CPL 3 without CR4.UMIP the instructions that store exit."""
    run = vmxlab.run(Case(program=f"nop; {name} [rbx]", enable=EXITING, **user_mode()))
    assert run.exits[0].full_reason == REASONS[name]
    assert run.exits[0].rip == PROGRAM + 1


@NEEDED
@pytest.mark.parametrize("name", ["lgdt", "lidt", "lldt", "ltr"])
def test_loads_at_privilege_level_3_fault(vmxlab, name):
    """Vol. 3C, 26.1.1: #GP(0) for CPL 3 comes before the exit."""
    run = vmxlab.run(Case(program=f"nop; {name} [rbx]", enable=EXITING, **user_mode()))
    check_general_protection(run)


@NEEDED
@pytest.mark.vmx_known_difference("kvm-exit-before-umip-fault")
@pytest.mark.parametrize("name", ["sgdt", "sidt", "sldt", "str"])
def test_stores_with_user_mode_instruction_prevention_fault(vmxlab, name):
    """Vol. 3C, 26.1.1, and Vol. 3A, 2.5: at CPL 3 with CR4.UMIP they are #GP(0), before the exit."""
    vmxlab.require(CR4.UMIP)
    cr4 = int(CR4.PAE | CR4.UMIP | vmxlab.capabilities.cr4_fixed0)
    parts = merged(user_mode(), fields={Field.GUEST_CR4: cr4})
    check_general_protection(vmxlab.run(Case(program=f"nop; {name} [rbx]", enable=EXITING, **parts)))


def check_general_protection(run) -> None:
    assert run.exits[0].full_reason == ExitReason.EXCEPTION_OR_NMI
    assert run.exits[0].interruption.vector == Vector.GP
    assert run.exits[0].interruption_error_code == 0
    assert run.exits[0].rip == PROGRAM + 1


# --- without the control -----------------------------------------------------------------------------------


def test_loads_take_effect_and_are_saved(vmxlab):
    """Vol. 3C, 26.1.3 and 28.3.2: without "descriptor-table exiting" LGDT, LIDT load; the exit saves it."""
    watch = [
        Field.GUEST_GDTR_BASE,
        Field.GUEST_GDTR_LIMIT,
        Field.GUEST_IDTR_BASE,
        Field.GUEST_IDTR_LIMIT,
        Field.GUEST_LDTR_SELECTOR,
        Field.GUEST_TR_SELECTOR,
    ]
    gdt = DATA + 0x100
    tss = 0x67 | 0x1800 << 16 | 0x89 << 40  # available
    table = b"".join(value.to_bytes(8, "little") for value in (0, 0, 0, 0, tss, 0))
    pointer = (len(table) - 1).to_bytes(2, "little") + gdt.to_bytes(8, "little")
    run = vmxlab.run(
        Case(
            program="lgdt [DATA]; lidt [DATA + 16]; mov al, 0x20; ltr ax; mov al, 0; lldt ax; str ecx; hlt",
            data={DATA: pointer, DATA + 16: b"\x33\x02" + (0x5000).to_bytes(8, "little"), gdt: table},
            watch=watch,
        )
    )
    assert run.reasons == [ExitReason.HLT]
    assert list(run.exits[0].watched.values()) == [gdt, len(table) - 1, 0x5000, 0x233, 0, 0x20]
    assert run.exits[0].registers["rcx"] == 0x20
