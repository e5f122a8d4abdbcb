"""VM-exit instruction information: the operands of the instructions of L2 that exit.

SDM Vol. 3C, 28.2.5 (tables 28-9 to 28-15), and 28.2.1 for the displacement in the exit qualification.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, Exit, ExitReason, Mode, PrimaryControls, SecondaryControls
from vmxlab.cases.memory import PROGRAM
from vmxlab.sdm.instruction_information import MemoryOperand
from vmxlab.sdm.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS

P = PrimaryControls
S = SecondaryControls

REGISTERS = {name: 0x0101_0101_0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)}
REGISTERS["rsp"] = 0x7000


def check_exit(exit_: Exit, reason: ExitReason, *, length: int, qualification: int | None = 0) -> None:
    """All else that is recorded for an exit due to an instruction; nothing has been executed of it.

    `qualification` None: that is another test's.
    """
    assert exit_.full_reason == reason, exit_
    assert exit_.instruction_length == length, exit_
    if qualification is not None:
        assert exit_.raw_qualification == qualification, exit_
    assert exit_.registers == REGISTERS, exit_
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def operand(
    *, base: str | None = None, index: str | None = None, scale: int = 1, segment: str = "ds", bits: int = 64
) -> MemoryOperand:
    return MemoryOperand(
        address_size=bits,
        segment=SEGMENT_REGISTERS.index(segment),
        base=None if base is None else GENERAL_REGISTERS.index(base),
        index=None if index is None else GENERAL_REGISTERS.index(index),
        scale=scale,
    )


OPERANDS = {
    "[rbx]": (operand(base="rbx"), 0),
    "[rax + rcx*4 + 0x10]": (operand(base="rax", index="rcx", scale=4), 0x10),
    "[r13 - 8]": (operand(base="r13"), -8),
    "[rsp + 0x12345678]": (operand(base="rsp", segment="ss"), 0x12345678),
    "[rbp + r15*8 - 0x80000000]": (
        operand(base="rbp", index="r15", scale=8, segment="ss"),
        -0x8000_0000,
    ),
    "fs:[r8 + r12*2]": (operand(base="r8", index="r12", scale=2, segment="fs"), 0),
    "gs:[r9*8 + 0x40]": (operand(index="r9", scale=8, segment="gs"), 0x40),
    "[0x1234]": (operand(), 0x1234),
}


def same_operand(seen: MemoryOperand, expected: MemoryOperand) -> bool:
    """Whether the operands agree in all that is defined: the scale only means something with an index."""
    if expected.index is None:
        seen = MemoryOperand(seen.address_size, seen.segment, seen.base, seen.index, expected.scale)
    return seen == expected


def check_operands(exits: tuple[Exit, ...], reason: ExitReason) -> None:
    """The exits of one instruction with each operand of OPERANDS, and the exit that follows them."""
    for i, (text, (expected, displacement)) in enumerate(OPERANDS.items()):
        exit_ = exits[i]
        length = exits[i + 1].rip - exit_.rip
        qualification = displacement % (1 << 64)
        check_exit(exit_, reason, length=length, qualification=qualification)
        assert same_operand(exit_.instruction_information.memory, expected), text
        assert exit_.qualification.displacement == displacement, text


# --- VMX instructions in L2 --------------------------------------------------------------------------------

POINTER_INSTRUCTIONS = {
    "vmclear": ExitReason.VMCLEAR,
    "vmptrld": ExitReason.VMPTRLD,
    "vmptrst": ExitReason.VMPTRST,
    "vmxon": ExitReason.VMXON,
}


@pytest.mark.parametrize("name", POINTER_INSTRUCTIONS)
def test_vmx_instructions_with_a_memory_operand_describe_it(vmxlab, name):
    """Vol. 3C, table 28-14 and 28.2.1: segment, base, index, scale, address size; and the displacement."""
    reason = POINTER_INSTRUCTIONS[name]
    program = "; ".join(f"{name} {text}" for text in OPERANDS)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS))
    assert run.reasons == [reason] * len(OPERANDS) + [ExitReason.HLT]
    check_operands(run.exits, reason)


def test_rip_relative_displacements_are_resolved(vmxlab):
    """Vol. 3C, 28.2.1: for RIP-relative addressing the qualification is displacement plus the next RIP."""
    run = vmxlab.run(Case(program="vmclear [rip + 0x20]; vmptrst [rip - 0x10]; hlt"))
    assert run.reasons == [ExitReason.VMCLEAR, ExitReason.VMPTRST, ExitReason.HLT]
    assert run.exits[0].raw_qualification == run.exits[1].rip + 0x20
    assert run.exits[1].raw_qualification == run.exits[2].rip - 0x10
    for exit_ in run.exits[:2]:
        memory = exit_.instruction_information.memory
        assert (memory.base, memory.index) == (None, None)


def test_the_address_size_is_reported(vmxlab):
    """Vol. 3C, tables 28-9 to 28-15: bits 9:7 tell 16-, 32- and 64-bit addresses apart."""
    long = vmxlab.run(Case(program="vmclear [eax + 4]; vmclear [rax + 4]; hlt"))
    assert [e.instruction_information.memory.address_size for e in long.exits[:2]] == [32, 64]
    protected = vmxlab.run(Case(program="vmclear [bx + 4]; vmclear [ebx + 4]; hlt", mode=Mode.PROTECTED))
    assert protected.reasons == [ExitReason.VMCLEAR, ExitReason.VMCLEAR, ExitReason.HLT]
    assert [e.instruction_information.memory.address_size for e in protected.exits[:2]] == [16, 32]


@pytest.mark.parametrize(("name", "reason"), [("vmread", ExitReason.VMREAD), ("vmwrite", ExitReason.VMWRITE)])
def test_vmread_and_vmwrite_describe_both_operands(vmxlab, name, reason):
    """Vol. 3C, table 28-15: bits 31:28 are the register with the encoding; the other operand is in memory."""
    reads = name == "vmread"
    program = "; ".join(f"{name} {text}, r14" if reads else f"{name} r14, {text}" for text in OPERANDS)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS))
    assert run.reasons == [reason] * len(OPERANDS) + [ExitReason.HLT]
    check_operands(run.exits, reason)
    for exit_ in run.exits[:-1]:
        assert exit_.instruction_information.register is None
        assert exit_.instruction_information.register2 == GENERAL_REGISTERS.index("r14")


@pytest.mark.parametrize(("name", "reason"), [("vmread", ExitReason.VMREAD), ("vmwrite", ExitReason.VMWRITE)])
def test_vmread_and_vmwrite_of_registers(vmxlab, name, reason):
    """Vol. 3C, table 28-15: bit 10 tells a register operand, in bits 6:3."""
    pairs = [(GENERAL_REGISTERS[i], GENERAL_REGISTERS[(i * 7 + 3) % 16]) for i in range(16)]
    reads = name == "vmread"
    program = "; ".join(
        f"{name} {data}, {code}" if reads else f"{name} {code}, {data}" for data, code in pairs
    )
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS))
    assert run.reasons == [reason] * 16 + [ExitReason.HLT]
    for (data, code), exit_, following in zip(pairs, run.exits, run.exits[1:], strict=False):
        information = exit_.instruction_information
        assert information.memory is None
        assert GENERAL_REGISTERS[information.register] == data
        assert GENERAL_REGISTERS[information.register2] == code
        check_exit(exit_, reason, length=following.rip - exit_.rip, qualification=None)


@pytest.mark.vmx_known_difference("displacement-of-a-register-operand")
def test_a_register_operand_has_no_displacement(vmxlab):
    """Vol. 3C, 28.2.1: the qualification of an instruction without a displacement is 0."""
    texts = [f"vmread {name}, rax; vmwrite rax, {name}" for name in GENERAL_REGISTERS]
    enable: tuple[S, ...] = ()
    if vmxlab.capabilities.supports(S.DESCRIPTOR_TABLE_EXITING):
        texts += [f"sldt {name}; str {name}; lldt dx; ltr cx" for name in GENERAL_REGISTERS]
        enable = (S.DESCRIPTOR_TABLE_EXITING,)
    run = vmxlab.run(Case(program="; ".join([*texts, "hlt"]), registers=REGISTERS, enable=enable))
    assert run.reasons[-1] is ExitReason.HLT
    assert len(run.exits) == sum(text.count(";") + 1 for text in texts) + 1
    assert [exit_.raw_qualification for exit_ in run.exits] == [0] * len(run.exits)


@pytest.mark.parametrize(
    ("name", "reason", "bit"), [("invept", ExitReason.INVEPT, 20), ("invvpid", ExitReason.INVVPID, 32)]
)
def test_invept_and_invvpid_describe_both_operands(vmxlab, name, reason, bit):
    """Vol. 3C, table 28-9: bits 31:28 are the register with the type; the descriptor is in memory."""
    if not vmxlab.capabilities.ept_vpid.raw >> bit & 1:
        pytest.skip(f"the processor lacks {name.upper()} (IA32_VMX_EPT_VPID_CAP[{bit}] is 0)")
    program = "; ".join(f"{name} r11, {text}" for text in OPERANDS)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS))
    assert run.reasons == [reason] * len(OPERANDS) + [ExitReason.HLT]
    check_operands(run.exits, reason)
    for exit_ in run.exits[:-1]:
        assert exit_.instruction_information.register2 == GENERAL_REGISTERS.index("r11")


# --- INVPCID, RDRAND, RDSEED -------------------------------------------------------------------------------


@pytest.mark.vmx_needs(S.ENABLE_INVPCID)
def test_invpcid_exits_by_invlpg_exiting(vmxlab):
    """Vol. 3C, 26.1.3 and table 28-9: its type register, memory operand, and displacement are reported."""
    program = "invpcid r9, [rbx + rcx*2 + 0x24]; hlt"
    enable = (S.ENABLE_INVPCID, P.INVLPG_EXITING)
    run = vmxlab.run(Case(program=program, registers=REGISTERS, enable=enable))
    assert run.reasons == [ExitReason.INVPCID, ExitReason.HLT]
    length = len(b"\x66\x44\x0f\x38\x82\x4c\x4b\x24")
    check_exit(run.exits[0], ExitReason.INVPCID, length=length, qualification=0x24)
    information = run.exits[0].instruction_information
    assert information.register2 == GENERAL_REGISTERS.index("r9")
    assert information.memory == operand(base="rbx", index="rcx", scale=2)
    case = Case(program="invpcid rax, [DATA]; hlt", enable=S.ENABLE_INVPCID, disable=P.INVLPG_EXITING)
    assert vmxlab.run(case).reasons == [ExitReason.HLT]


RANDOM = [("rdrand", S.RDRAND_EXITING, ExitReason.RDRAND), ("rdseed", S.RDSEED_EXITING, ExitReason.RDSEED)]


@pytest.mark.parametrize(("name", "control", "reason"), RANDOM, ids=["rdrand", "rdseed"])
def test_rdrand_and_rdseed_name_their_destination(vmxlab, name, control, reason):
    """Vol. 3C, table 28-12: bits 6:3 are the destination, bits 12:11 its size (1: 32 bits, 2: 64 bits)."""
    names = {f"r{i}d": (f"r{i}", 32) for i in range(8, 16)} | {r: (r, 64) for r in GENERAL_REGISTERS}
    names |= {"eax": ("rax", 32), "ecx": ("rcx", 32), "edi": ("rdi", 32), "esp": ("rsp", 32)}
    program = "; ".join(f"{name} {register}" for register in names)
    run = vmxlab.run(Case(program=f"{program}; hlt", registers=REGISTERS, enable=control))
    assert run.reasons == [reason] * len(names) + [ExitReason.HLT]
    rip = PROGRAM
    for (register, size), exit_ in zip(names.values(), run.exits, strict=False):
        information = exit_.instruction_information
        assert (GENERAL_REGISTERS[information.register], information.operand_size) == (register, size)
        length = 4 if size == 64 or register in GENERAL_REGISTERS[8:] else 3
        assert exit_.rip == rip
        check_exit(exit_, reason, length=length)
        rip += length


@pytest.mark.vmx_known_difference("rdrand-16-bit-operand-size")
@pytest.mark.parametrize(("name", "control", "reason"), RANDOM, ids=["rdrand", "rdseed"])
def test_rdrand_and_rdseed_of_16_bits_say_so(vmxlab, name, control, reason):
    """Vol. 3C, table 28-12: bits 12:11 are 0 for a 16-bit destination."""
    run = vmxlab.run(Case(program=f"{name} dx; hlt", enable=control))
    assert run.reasons == [reason, ExitReason.HLT]
    information = run.exits[0].instruction_information
    assert (information.register, information.operand_size) == (GENERAL_REGISTERS.index("rdx"), 16)


@pytest.mark.parametrize(("name", "control", "reason"), RANDOM, ids=["rdrand", "rdseed"])
def test_rdrand_and_rdseed_are_executed_without_their_control(vmxlab, name, control, reason):
    """Vol. 3C, 26.1.3: with the control 0 they are executed, and set CF or clear the destination."""
    case = Case(program=f"{name} rax; setc bl; hlt", needs=control, disable=control)
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["rbx"] == 1 or registers["rax"] == 0


# --- descriptor-table instructions -------------------------------------------------------------------------


@pytest.mark.vmx_needs(S.DESCRIPTOR_TABLE_EXITING)
def test_gdtr_and_idtr_accesses_exit(vmxlab):
    """Vol. 3C, 26.1.3 and table 28-10: LGDT, LIDT, SGDT, SIDT, told apart by bits 29:28."""
    texts = {
        "sgdt [rax + 0x100]": ("SGDT", operand(base="rax"), 0x100),
        "sidt [r10]": ("SIDT", operand(base="r10"), 0),
        "lgdt [rcx + rdx*8 - 4]": ("LGDT", operand(base="rcx", index="rdx", scale=8), -4),
        "lidt fs:[rsi]": ("LIDT", operand(base="rsi", segment="fs"), 0),
    }
    case = Case(program="; ".join([*texts, "hlt"]), registers=REGISTERS, enable=S.DESCRIPTOR_TABLE_EXITING)
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.GDTR_IDTR_ACCESS] * 4 + [ExitReason.HLT]
    for (name, expected, displacement), exit_, following in zip(
        texts.values(), run.exits, run.exits[1:], strict=False
    ):
        information = exit_.instruction_information
        assert information.instruction == name
        assert same_operand(information.memory, expected)
        length = following.rip - exit_.rip
        qualification = displacement % (1 << 64)
        check_exit(exit_, ExitReason.GDTR_IDTR_ACCESS, length=length, qualification=qualification)


@pytest.mark.vmx_needs(S.DESCRIPTOR_TABLE_EXITING)
def test_ldtr_and_tr_accesses_exit(vmxlab):
    """Vol. 3C, 26.1.3 and table 28-11: LLDT, LTR, SLDT, STR, with a register or a memory operand."""
    texts = {
        "sldt r9": ("SLDT", "r9", None),
        "str [rbx + 8]": ("STR", None, operand(base="rbx")),
        "lldt dx": ("LLDT", "rdx", None),
        "ltr [r12]": ("LTR", None, operand(base="r12")),
        "str rsi": ("STR", "rsi", None),
    }
    case = Case(program="; ".join([*texts, "hlt"]), registers=REGISTERS, enable=S.DESCRIPTOR_TABLE_EXITING)
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.LDTR_TR_ACCESS] * len(texts) + [ExitReason.HLT]
    for (name, register, memory), exit_ in zip(texts.values(), run.exits, strict=False):
        information = exit_.instruction_information
        assert information.instruction == name
        if register is not None:
            assert GENERAL_REGISTERS[information.register] == register
        else:
            assert same_operand(information.memory, memory)


def test_descriptor_tables_are_accessed_without_exiting(vmxlab):
    """Vol. 3C, 26.1.3: without "descriptor-table exiting" they reach L2's own registers."""
    program = "sgdt [DATA]; str ecx; lldt ax; sldt edx; mov bx, [DATA]; hlt"
    run = vmxlab.run(Case(program=program, registers={"rdx": 0x77}))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["rbx"] == 0x27  # GUEST_GDTR_LIMIT of the baseline: five descriptors
    assert registers["rcx"] == 0x18  # GUEST_TR_SELECTOR
    assert registers["rdx"] == 0
