"""INVPCID in L2: as an exit, and executed under a VPID (SDM Vol. 3C, 26.1.3, 26.3, 29.4.3.1)."""

from __future__ import annotations

import struct

import pytest

from vmxlab import Case, ExitReason, Field, Mode, PrimaryControls, SecondaryControls
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.sdm.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS, Vector

from .guest_setups import user_mode

P, S = PrimaryControls, SecondaryControls
pytestmark = pytest.mark.vmx_needs(S.ENABLE_INVPCID)
EXITING = (S.ENABLE_INVPCID, P.INVLPG_EXITING)
REGISTERS = {name: 0x0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)} | {"rsp": 0x7000}

# Operand, (type register, segment, base, index, scale, address size), displacement.
LONG = [
    ("rax, [rbx]", ("rax", "ds", "rbx", None, 1, 64), 0),
    ("r15, gs:[r8 + r9*8 - 0x40]", ("r15", "gs", "r8", "r9", 8, 64), -0x40),
    ("rdi, [rsp + 0x1234]", ("rdi", "ss", "rsp", None, 1, 64), 0x1234),
    ("rsp, [ecx*2 + 0x10]", ("rsp", "ds", None, "rcx", 2, 32), 0x10),
]
PROTECTED = [
    ("eax, es:[ebx + 4]", ("rax", "es", "rbx", None, 1, 32), 4),
    ("esi, [bp + si - 2]", ("rsi", "ss", "rbp", "rsi", 1, 16), -2),
]


@pytest.mark.parametrize(("mode", "operands"), [(Mode.LONG, LONG), (Mode.PROTECTED, PROTECTED)])
def test_it_exits_with_its_operands(vmxlab, mode, operands):
    """Vol. 3C, table 28-9 and 28.2.1: type register, memory operand, displacement; whatever the type is."""
    program = "; ".join(f"invpcid {text}" for text, _, _ in operands)
    run = vmxlab.run(Case(program=f"{program}; hlt", mode=mode, registers=REGISTERS, enable=EXITING))
    assert run.reasons == [ExitReason.INVPCID] * len(operands) + [ExitReason.HLT]
    number = GENERAL_REGISTERS.index
    for (_, expected, displacement), exit_, following in zip(
        operands, run.exits, run.exits[1:], strict=False
    ):
        kind, segment, base, index, scale, bits = expected
        assert exit_.full_reason == ExitReason.INVPCID
        assert exit_.instruction_length == following.rip - exit_.rip
        memory = exit_.instruction_information.memory
        assert exit_.instruction_information.register2 == number(kind)
        assert (SEGMENT_REGISTERS[memory.segment], memory.address_size) == (segment, bits)
        assert memory.base == (None if base is None else number(base))
        assert memory.index == (None if index is None else number(index))
        assert index is None or memory.scale == scale
        mask = (1 << bits) - 1
        assert exit_.raw_qualification & mask == displacement & mask
        assert exit_.registers == REGISTERS
        assert not exit_.interruption.valid


@pytest.mark.vmx_known_difference("exit-before-privilege-fault")
def test_privilege_comes_before_the_exit(vmxlab):
    """Vol. 3C, 26.1.1: #GP(0) at CPL 3."""
    run = vmxlab.run(Case(program="nop; invpcid rax, [DATA]", enable=EXITING, **user_mode()))
    assert run.exits[0].full_reason == ExitReason.EXCEPTION_OR_NMI
    assert run.exits[0].interruption.vector == Vector.GP
    assert run.exits[0].rip == PROGRAM + 1


def test_the_exit_comes_before_faults_of_the_operand(vmxlab):
    """Vol. 3C, 26.1.1: a bad type is #GP(0) when it is executed; an exit looks at neither type nor memory."""
    for enable, reason in ((EXITING, ExitReason.INVPCID), (S.ENABLE_INVPCID, ExitReason.EXCEPTION_OR_NMI)):
        disable = () if enable is EXITING else P.INVLPG_EXITING
        run = vmxlab.run(
            Case(
                program="mov eax, 4; invpcid rax, [DATA]",
                enable=enable,
                disable=disable,
                registers={"rcx": 9},
            )
        )
        assert run.exits[0].reason is reason
        assert run.exits[0].rip == PROGRAM + 5


@pytest.mark.vmx_needs(S.ENABLE_EPT)
@pytest.mark.parametrize("vpid", [0, 5])
@pytest.mark.parametrize("kind", range(4))
def test_executed_it_ends_the_use_of_old_translations(vmxlab, kind, vpid):
    """Vol. 3C, 29.4.3.1: INVPCID of each type invalidates in L2 what has the current VPID and PCID 0."""
    tables, linear = 0x18000, 0x20_0000
    first, second = DATA + 0x1000, DATA + 0x2000
    data = {
        tables: struct.pack("<Q", tables + 0x1000 | 0x63),
        tables + 0x1000: struct.pack("<Q", tables + 0x2000 | 0x63),
        tables + 0x2000: struct.pack("<QQ", 0xE3, tables + 0x3000 | 0x63),
        tables + 0x3000: struct.pack("<Q", first | 0x63),
        first: b"\x11\x11",
        second: b"\x22\x22",
        DATA: struct.pack("<QQ", 0, linear),
    }
    program = (
        f"mov edi, {linear:#x}; mov ecx, [rdi]; mov rbx, {second | 0x63:#x}; "
        f"mov [{tables + 0x3000:#x}], rbx; mov eax, {kind}; invpcid rax, [DATA]; mov edx, [rdi]; hlt"
    )
    enable = [S.ENABLE_INVPCID] + [S.ENABLE_VPID] * bool(vpid)
    fields = {Field.GUEST_CR3: tables} | ({Field.VPID: vpid} if vpid else {})
    run = vmxlab.run(Case(program=program, enable=enable, disable=P.INVLPG_EXITING, fields=fields, data=data))
    assert run.reasons == [ExitReason.HLT]
    assert (run.exits[0].registers["rcx"], run.exits[0].registers["rdx"]) == (0x1111, 0x2222)
