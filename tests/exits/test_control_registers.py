"""Accesses of L2 to CR0, CR3, CR4 and CR8: which of them exit, what they read, and what they change.

SDM Vol. 3C, 25.6.6 (guest/host masks and read shadows), 25.6.7 (CR3-target controls), 26.1.3 (what exits),
26.3 (what does not), 28.2.1 with table 28-3 (exit qualification).
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmxlab import Case, Exit, ExitReason, Field, Mode, PrimaryControls, Run, SecondaryControls, on
from vmxlab.cases.memory import DATA, PROGRAM
from vmxlab.cases.reactions import Reaction
from vmxlab.sdm.qualifications import CrAccessType
from vmxlab.sdm.registers import CR0, CR4, GENERAL_REGISTERS, RFLAGS, Vector

P = PrimaryControls
CR3_EXITING = (P.CR3_LOAD_EXITING, P.CR3_STORE_EXITING)
CR8_EXITING = (P.CR8_LOAD_EXITING, P.CR8_STORE_EXITING)

REGISTERS = {name: 0x0101_0101_0101_0101 * (i + 1) for i, name in enumerate(GENERAL_REGISTERS)}
REGISTERS["rsp"] = 0x7000


def check_access(exit_: Exit, cr: int, access: CrAccessType, *, register: str = "rax", **more: int) -> None:
    """The whole of a control-register exit; `more` is lmsw_memory_operand and lmsw_source."""
    assert exit_.full_reason == ExitReason.CONTROL_REGISTER_ACCESS, exit_
    qualification = exit_.qualification
    assert (qualification.cr, qualification.access_type) == (cr, access)
    memory_operand, source = more.get("lmsw_memory_operand", 0), more.get("lmsw_source", 0)
    index = GENERAL_REGISTERS.index(register)
    # Nothing is set in the field but what these say (table 28-3: all else is cleared).
    assert exit_.raw_qualification == cr | access << 4 | memory_operand << 6 | index << 8 | source << 16
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid


def check_fault(exit_: Exit, vector: Vector, rip: int) -> None:
    """A fault of L2 with error code 0."""
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI, exit_
    assert exit_.interruption.vector == vector
    assert exit_.interruption_error_code == 0
    assert exit_.rip == rip


def one_access_each(template: str, controls) -> Case:
    """`template` once for each general register, on registers that differ."""
    program = "; ".join(template.format(register=name) for name in GENERAL_REGISTERS)
    return Case(program=f"{program}; hlt", registers=REGISTERS, enable=controls)


@pytest.mark.parametrize(
    ("template", "cr", "access", "controls"),
    [
        ("mov cr3, {register}", 3, CrAccessType.MOV_TO_CR, CR3_EXITING),
        ("mov {register}, cr3", 3, CrAccessType.MOV_FROM_CR, CR3_EXITING),
        ("mov cr8, {register}", 8, CrAccessType.MOV_TO_CR, CR8_EXITING),
        ("mov {register}, cr8", 8, CrAccessType.MOV_FROM_CR, CR8_EXITING),
    ],
    ids=["to-cr3", "from-cr3", "to-cr8", "from-cr8"],
)
def test_an_access_that_exits_names_its_register(vmxlab, template, cr, access, controls):
    """Vol. 3C, table 28-3: control register, direction, general register; nothing has been done yet."""
    run = vmxlab.run(one_access_each(template, controls))
    assert run.reasons == [ExitReason.CONTROL_REGISTER_ACCESS] * 16 + [ExitReason.HLT]
    for register, exit_, following in zip(GENERAL_REGISTERS, run.exits, run.exits[1:], strict=False):
        check_access(exit_, cr, access, register=register)
        # MOV CR8 always has a REX prefix; MOV CR3 for R8 to R15 (SDM Vol. 2B, MOV).
        length = 4 if cr == 8 or register in GENERAL_REGISTERS[8:] else 3
        assert exit_.instruction_length == length
        assert following.rip == exit_.rip + length
        assert exit_.registers == REGISTERS


@pytest.mark.parametrize("mode", [Mode.PROTECTED, Mode.REAL])
def test_accesses_exit_in_other_modes_too(vmxlab, mode):
    """Vol. 3C, 26.1.3: MOV CR3 exits by its controls in any mode of L2."""
    program = "mov ecx, cr3; mov cr3, esi; hlt"
    run = vmxlab.run(Case(program=program, mode=mode, enable=CR3_EXITING))
    assert run.reasons == [ExitReason.CONTROL_REGISTER_ACCESS] * 2 + [ExitReason.HLT]
    check_access(run.exits[0], 3, CrAccessType.MOV_FROM_CR, register="rcx")
    check_access(run.exits[1], 3, CrAccessType.MOV_TO_CR, register="rsi")


# --- CR3 ---------------------------------------------------------------------------------------------------


def root(vmxlab) -> int:
    """GUEST_CR3 of the baseline."""
    run = vmxlab.run(Case(watch=[Field.GUEST_CR3]))
    return run.exits[0].watched[Field.GUEST_CR3]


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_mov_to_cr3_without_exiting_takes_effect(vmxlab):
    """Vol. 3C, 26.1.3 and 26.3: without the exiting controls L2 reads and loads CR3 itself."""
    tables = {0x14000: 0x15003, 0x15000: 0x16003, 0x16000: 0x83, 0x16008: 0x83}  # 2 MiB, and again at 2 MiB
    data = {at: entry.to_bytes(8, "little") for at, entry in tables.items()}
    case = Case(
        program="mov rax, cr3; mov rbx, 0x14000; mov cr3, rbx; mov rcx, cr3; mov edx, [DATA + 0x200000]; hlt",
        data=data | {DATA: b"\x78\x56\x34\x12"},
        disable=CR3_EXITING,
        watch=[Field.GUEST_CR3],
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["rax"] == root(vmxlab)
    assert registers["rcx"] == 0x14000
    assert registers["rdx"] == 0x1234_5678
    assert run.exits[0].watched[Field.GUEST_CR3] == 0x14000


def test_a_mov_to_cr3_that_exits_has_no_effect(vmxlab):
    """Vol. 3C, 28.1: the exit is fault-like; skipped, CR3 is what it was."""
    case = Case(program="xor eax, eax; mov cr3, rax; hlt", enable=CR3_EXITING, watch=[Field.GUEST_CR3])
    run = vmxlab.run(case)
    assert [exit_.watched[Field.GUEST_CR3] for exit_ in run.exits] == [root(vmxlab)] * 2


def test_cr3_target_values_do_not_exit(vmxlab):
    """Vol. 3C, 25.6.7 and 26.1.3: of the CR3-target values the first "count" are let through, no others."""
    base = root(vmxlab)
    targets = [base | flags for flags in (0x00, 0x08, 0x10, 0x18)]  # PWT and PCD change no translation
    program = "; ".join(f"mov rax, {value:#x}; mov cr3, rax" for value in targets)
    supported = min(4, vmxlab.capabilities.misc.cr3_target_count)  # there are no more of the fields
    fields = {Field[f"CR3_TARGET_VALUE_{i}"]: value for i, value in enumerate(targets[:supported])}
    for count in range(supported + 1):
        case = Case(
            program=f"{program}; hlt",
            enable=P.CR3_LOAD_EXITING,
            fields=fields | {Field.CR3_TARGET_COUNT: count},
            watch=[Field.GUEST_CR3],
        )
        run = vmxlab.run(case)
        exits = [exit_.registers["rax"] for exit_ in run.exits[:-1]]
        assert exits == targets[count:], count
        assert run.reasons[-1] is ExitReason.HLT
        loaded = targets[count - 1] if count else base
        assert run.exits[-1].watched[Field.GUEST_CR3] == loaded, count


def test_the_whole_value_is_compared_with_a_cr3_target(vmxlab):
    """Vol. 3C, 26.1.3: MOV to CR3 exits unless its operand is equal to a target value, in all bits."""
    if not vmxlab.capabilities.misc.cr3_target_count:
        pytest.skip("the processor lacks CR3-target values (IA32_VMX_MISC[24:16] is 0)")
    base = root(vmxlab)
    near = [base ^ 1 << bit for bit in (3, 4, 12, 31, 63)]
    program = "; ".join(f"mov rax, {value:#x}; mov cr3, rax" for value in near)
    fields = {Field.CR3_TARGET_COUNT: 1, Field.CR3_TARGET_VALUE_0: base}
    run = vmxlab.run(Case(program=f"{program}; hlt", enable=P.CR3_LOAD_EXITING, fields=fields))
    assert run.reasons == [ExitReason.CONTROL_REGISTER_ACCESS] * len(near) + [ExitReason.HLT]


# --- CR0 and CR4: guest/host masks and read shadows --------------------------------------------------------

WRITABLE_BITS = {
    "cr0": [CR0.MP, CR0.EM, CR0.TS, CR0.WP, CR0.AM],
    "cr4": [CR4.VME, CR4.PVI, CR4.TSD, CR4.DE, CR4.PSE, CR4.MCE, CR4.PGE, CR4.PCE, CR4.OSFXSR],
}
"""Bits that every processor has, and that L2 may set and clear alone."""

OTHER_BITS = {
    "cr0": [CR0.PE, CR0.ET, CR0.NE, CR0.NW, CR0.CD, CR0.PG, 1 << 6, 1 << 28],
    "cr4": [CR4.PAE, CR4.OSXMMEXCPT, CR4.UMIP, CR4.LA57, CR4.VMXE, CR4.SMXE, CR4.PCIDE, CR4.OSXSAVE, 1 << 15],
}
"""Bits whose change would be a fault or more, reserved ones among them, if it did not exit."""


def fields_of(register: str) -> tuple[Field, Field, Field]:
    """Guest/host mask, read shadow, and the guest's register."""
    name = register.upper()
    return Field[f"{name}_GUEST_HOST_MASK"], Field[f"{name}_READ_SHADOW"], Field[f"GUEST_{name}"]


def set_mask_and_shadow(register: str, values: list[tuple[int, int]]) -> list[Reaction]:
    """Reactions that give the mask and the shadow their next values at each VMCALL of L2."""
    mask, shadow, _ = fields_of(register)
    return [
        on(ExitReason.VMCALL, first=i, times=1).vmwrite(mask, bits).vmwrite(shadow, value).skip()
        for i, (bits, value) in enumerate(values)
    ]


def accesses(run: Run) -> list[Exit]:
    return [exit_ for exit_ in run.exits if exit_.reason is ExitReason.CONTROL_REGISTER_ACCESS]


@pytest.mark.parametrize("register", ["cr0", "cr4"])
def test_a_masked_bit_reads_from_the_shadow(vmxlab, register):
    """Vol. 3C, 26.3, MOV from CR0 and CR4: masked bits come from the read shadow, others are real."""
    bits = [*WRITABLE_BITS[register], *OTHER_BITS[register]]
    values = [(bit, shadow) for bit in map(int, bits) for shadow in (0, bit)]
    program = f"vmcall; mov rax, {register}; vmcall; hlt"
    reads = "; ".join(f"vmcall; mov rax, {register}" for _ in values)
    _, _, guest = fields_of(register)
    run = vmxlab.run(
        Case(
            program=f"{reads}; {program}",
            reactions=set_mask_and_shadow(register, values),
            watch=[guest],
        )
    )
    for (mask, shadow), exit_ in zip(values, run.exits[1:], strict=False):
        expected = exit_.watched[guest] & ~mask | shadow
        assert exit_.registers["rax"] == expected, f"mask {mask:#x}, shadow {shadow:#x}"


@pytest.mark.parametrize("register", ["cr0", "cr4"])
def test_with_every_bit_masked_the_shadow_is_all_that_is_read(vmxlab, register):
    """Vol. 3C, 26.3: with every mask bit set MOV from CR0 (CR4) gives the whole read shadow."""
    mask, shadow, _ = fields_of(register)
    value = 0xFEDC_BA98_7654_3210
    fields = {mask: (1 << 64) - 1, shadow: value}
    run = vmxlab.run(Case(program=f"mov rax, {register}; hlt", fields=fields))
    assert run.exits[0].registers["rax"] == value


@pytest.mark.parametrize("register", ["cr0", "cr4"])
def test_a_write_exits_where_a_masked_bit_differs_from_the_shadow(vmxlab, register):
    """Vol. 3C, 26.1.3, MOV to CR0 and CR4: it exits unless every masked bit matches the shadow.

    The exit comes before the #GP that the value would be (26.1.1), and nothing is written.
    """
    bits = [*WRITABLE_BITS[register], *OTHER_BITS[register]]
    values = [(bit, shadow) for bit in map(int, bits) for shadow in (0, bit)]
    writes = [f"vmcall; mov r9, {register}; btc r9, {mask.bit_length() - 1}" for mask, _ in values]
    program = "; ".join(f"{write}; mov {register}, r9" for write in writes)
    _, _, guest = fields_of(register)
    case = Case(program=f"{program}; hlt", reactions=set_mask_and_shadow(register, values), watch=[guest])
    run = vmxlab.run(case)
    seen = accesses(run)
    assert len(seen) == len(values)
    for exit_ in seen:
        check_access(exit_, int(register[2:]), CrAccessType.MOV_TO_CR, register="r9")
        assert exit_.instruction_length == len(b"\x41\x0f\x22\xc1")
    assert len({exit_.watched[guest] for exit_ in run.exits}) == 1


@pytest.mark.parametrize("register", ["cr0", "cr4"])
def test_a_write_that_matches_the_shadow_leaves_masked_bits_alone(vmxlab, register):
    """Vol. 3C, 26.1.3 and 26.3: no exit where all masked bits match, and those bits keep their real value."""
    values = [(bit, shadow) for bit in map(int, WRITABLE_BITS[register]) for shadow in (0, bit)]
    write = f"vmcall; mov r9, {register}; mov {register}, r9"
    _, _, guest = fields_of(register)
    run = vmxlab.run(
        Case(
            program="; ".join([write] * len(values) + ["hlt"]),
            reactions=set_mask_and_shadow(register, values),
            watch=[guest],
        )
    )
    assert run.reasons == [ExitReason.VMCALL] * len(values) + [ExitReason.HLT]
    assert len({exit_.watched[guest] for exit_ in run.exits}) == 1


@pytest.mark.parametrize("register", ["cr0", "cr4"])
def test_unmasked_bits_are_written_without_an_exit(vmxlab, register):
    """Vol. 3C, 26.3: L2 sets and clears unmasked bits itself; the next exit saves what it wrote."""
    _, _, guest = fields_of(register)
    bits = [int(bit) for bit in WRITABLE_BITS[register]]
    fixed1 = getattr(vmxlab.capabilities, f"{register}_fixed1")
    bits = [bit for bit in bits if bit & fixed1]
    flips = "; ".join(
        f"mov rax, {register}; btc rax, {bit.bit_length() - 1}; mov {register}, rax; vmcall" for bit in bits
    )
    run = vmxlab.run(Case(program=f"vmcall; {flips}; {flips}; hlt", watch=[guest]))
    assert run.reasons == [ExitReason.VMCALL] * (2 * len(bits) + 1) + [ExitReason.HLT]
    seen = [exit_.watched[guest] for exit_ in run.exits[:-1]]
    changes = [before ^ after for before, after in pairwise(seen)]
    assert changes == bits * 2


@pytest.mark.parametrize(
    ("register", "bit"), [("cr0", CR0.NE), ("cr4", CR4.VMXE)], ids=["cr0.ne", "cr4.vmxe"]
)
def test_a_fixed_bit_can_not_be_changed_by_l2(vmxlab, register, bit):
    """Vol. 3C, 26.3 and 24.8: unmasked, a value not supported in VMX operation is #GP(0) in L2."""
    if not getattr(vmxlab.capabilities, f"{register}_fixed0") & bit:
        pytest.skip(f"IA32_VMX_{register.upper()}_FIXED0 does not want {bit.name}")
    number = int(bit).bit_length() - 1
    run = vmxlab.run(Case(program=f"mov rax, {register}; btr rax, {number}; mov {register}, rax; hlt"))
    check_fault(run.exits[0], Vector.GP, PROGRAM + len(b"\x0f\x20\xc0") + len(b"\x48\x0f\xba\xf0\x05"))


# --- CLTS --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shadow", [False, True], ids=["", "shadow"])
@pytest.mark.parametrize("real", [False, True], ids=["", "real"])
def test_clts(vmxlab, masked, shadow, real):
    """Vol. 3C, 26.1.3 and 26.3, CLTS: it exits where mask and shadow have TS; unmasked it clears TS.

    Masked with a clear shadow it neither exits nor changes CR0.TS.
    """
    ts = int(CR0.TS)
    cr0 = CR0.PG | CR0.NE | CR0.ET | CR0.PE | vmxlab.capabilities.cr0_fixed0
    fields = {
        Field.CR0_GUEST_HOST_MASK: ts * masked,
        Field.CR0_READ_SHADOW: ts * shadow,
        Field.GUEST_CR0: int(cr0) | ts * real,
    }
    run = vmxlab.run(Case(program="clts; hlt", fields=fields, watch=[Field.GUEST_CR0]))
    if masked and shadow:
        assert run.reasons == [ExitReason.CONTROL_REGISTER_ACCESS, ExitReason.HLT]
        check_access(run.exits[0], 0, CrAccessType.CLTS)
        assert (run.exits[0].rip, run.exits[0].instruction_length) == (PROGRAM, 2)
    else:
        assert run.reasons == [ExitReason.HLT]
    assert bool(run.exits[-1].watched[Field.GUEST_CR0] & ts) is (real and masked)


# --- LMSW and SMSW -----------------------------------------------------------------------------------------

LMSW_CASES = [
    # mask, shadow, source, whether it exits
    (CR0.TS, 0, 0x0009, True),
    (CR0.TS, CR0.TS, 0x0009, False),
    (CR0.TS, CR0.TS, 0xFFF1, True),
    (CR0.TS, 0, 0xFFF7, False),
    (CR0.MP, 0, 0x0003, True),
    (CR0.MP, CR0.MP, 0x0001, True),
    (CR0.EM, 0, 0x0005, True),
    (CR0.EM, 0, 0xFF0B, False),
    (CR0.PE, 0, 0x0001, True),
    (CR0.PE, 0, 0x000E, False),
    (CR0.PE, CR0.PE, 0x0000, False),  # LMSW never clears PE
    (CR0.NE | CR0.WP | CR0.PG, 0, 0xFFFF, False),  # LMSW writes bits 3:0 alone
]


@pytest.mark.parametrize("memory", [False, True], ids=["register", "memory"])
def test_lmsw_exits_by_the_low_four_bits(vmxlab, memory):
    """Vol. 3C, 26.1.3, LMSW, and table 28-3: when it exits, the qualification holds its 16-bit operand."""
    values = [(int(mask), int(shadow)) for mask, shadow, _, _ in LMSW_CASES]
    one = "vmcall; mov ebx, {source:#x}; mov [DATA + 0x20], ebx; " + (
        "lmsw [rsi + 0x10]" if memory else "lmsw bx"
    )
    program = "; ".join(one.format(source=0xABCD_0000 | source) for _, _, source, _ in LMSW_CASES)
    case = Case(
        program=f"{program}; hlt",
        registers={"rsi": DATA + 0x10},
        reactions=set_mask_and_shadow("cr0", values),
    )
    run = vmxlab.run(case)
    assert run.reasons[-1] is ExitReason.HLT
    exiting = [source for _, _, source, exits in LMSW_CASES if exits]
    seen = accesses(run)
    assert [exit_.qualification.lmsw_source for exit_ in seen] == exiting
    for source, exit_ in zip(exiting, seen, strict=True):
        check_access(exit_, 0, CrAccessType.LMSW, lmsw_memory_operand=memory, lmsw_source=source)
        assert exit_.instruction_length == (4 if memory else 3)
        if memory:
            assert exit_.guest_linear_address == DATA + 0x20


def test_lmsw_from_memory_gives_the_linear_address(vmxlab):
    """Vol. 3C, 28.2.1: the guest-linear address of LMSW from memory, the segment base in it."""
    case = Case(
        program="lmsw fs:[rbx + 6]; hlt",
        registers={"rbx": 0x100},
        data={DATA + 0x1106: b"\x3b\x00"},
        fields={
            Field.GUEST_FS_BASE: DATA + 0x1000,
            Field.CR0_GUEST_HOST_MASK: int(CR0.TS),
            Field.CR0_READ_SHADOW: 0,
        },
    )
    run = vmxlab.run(case)
    check_access(run.exits[0], 0, CrAccessType.LMSW, lmsw_memory_operand=1, lmsw_source=0x3B)
    assert run.exits[0].guest_linear_address == DATA + 0x1106


def test_lmsw_without_an_exit_changes_unmasked_bits_alone(vmxlab):
    """Vol. 3C, 26.3, LMSW: it loads CR0[3:1], leaves masked bits as they are, and never clears PE."""
    fields = {Field.CR0_GUEST_HOST_MASK: int(CR0.EM), Field.CR0_READ_SHADOW: int(CR0.EM)}
    case = Case(program="mov ax, 0xfffe; lmsw ax; hlt", fields=fields, watch=[Field.GUEST_CR0])
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].watched[Field.GUEST_CR0] & 0xF == CR0.TS | CR0.MP | CR0.PE


def test_smsw_reads_masked_bits_from_the_shadow(vmxlab):
    """Vol. 3C, 26.3, SMSW: as MOV from CR0; a memory or 16-bit destination takes bits 15:0."""
    fields = {Field.CR0_GUEST_HOST_MASK: 0xFFFF, Field.CR0_READ_SHADOW: 0xA55A}
    case = Case(program="smsw ax; smsw [DATA]; mov rbx, [DATA]; hlt", fields=fields)
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert (run.exits[0].registers["rax"], run.exits[0].registers["rbx"]) == (0xA55A, 0xA55A)


# --- CR8 ---------------------------------------------------------------------------------------------------


def test_cr8_without_exiting_is_the_task_priority(vmxlab):
    """Vol. 3C, 26.1.3: without exiting and TPR shadow, MOV CR8 reads and writes the processor's own TPR."""
    program = "mov r8, cr8; mov eax, 9; mov cr8, rax; mov r9, cr8; mov cr8, r8; mov r10, cr8; hlt"
    run = vmxlab.run(Case(program=program, disable=(*CR8_EXITING, P.USE_TPR_SHADOW)))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    assert registers["r9"] == 9
    assert registers["r10"] == registers["r8"]


@pytest.mark.parametrize("exiting", [False, True])
def test_an_invalid_cr8_value(vmxlab, exiting):
    """Vol. 3C, 26.1.1: a value above 15 is #GP(0), but the exit comes first where "CR8-load exiting" is 1."""
    control = {"enable": P.CR8_LOAD_EXITING} if exiting else {"disable": P.CR8_LOAD_EXITING}
    run = vmxlab.run(Case(program="mov cr8, rax; hlt", registers={"rax": 0x10}, **control))
    if exiting:
        check_access(run.exits[0], 8, CrAccessType.MOV_TO_CR)
    else:
        check_fault(run.exits[0], Vector.GP, PROGRAM)


def test_a_skipped_access_leaves_the_flags(vmxlab):
    """Vol. 3C, 28.1: executed, MOV CR leaves flags undefined (Vol. 2B); one that exits leaves them alone."""
    flags = RFLAGS.FIXED1 | RFLAGS.CF | RFLAGS.ZF
    fields = {Field.GUEST_RFLAGS: int(flags)}
    run = vmxlab.run(Case(program="mov cr3, rax; hlt", enable=CR3_EXITING, fields=fields))
    assert [exit_.rflags & ~RFLAGS.RF for exit_ in run.exits] == [flags, flags]
