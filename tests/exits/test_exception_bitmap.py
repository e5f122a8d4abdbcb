"""The exception bitmap: every exception that an instruction of L2 can raise, as an exit and delivered.

SDM Vol. 3C, 25.6.3 and 26.2 (what exits), 28.2.1 (qualification of #DB and #PF), 28.2.2 (interruption
information); Vol. 3A, 6.15 (each exception's class and error code).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from vmxlab import Case, ExitReason, Field, Mode, SecondaryControls, on
from vmxlab.cases.memory import DATA, IDT, PROGRAM, STACK_TOP, TSS
from vmxlab.sdm.interruption import InterruptionType
from vmxlab.sdm.registers import CR0, CR4, DR6, RFLAGS, Vector

from .guest_setups import EVERY_EXCEPTION, frame, gate, handled, merged, user_mode

HARDWARE = InterruptionType.HARDWARE_EXCEPTION
SOFTWARE = InterruptionType.SOFTWARE_EXCEPTION
PRIVILEGED = InterruptionType.PRIVILEGED_SOFTWARE_EXCEPTION

OWN_GDT = DATA + 0x800
"""L2's GDT once more, and behind it: 28H not present, 30H a TSS that is busy."""
NOT_PRESENT = 0x28
NON_CANONICAL = 1 << 63
BEYOND = 1 << 30
"""A linear address that L2's page tables do not map."""


def descriptors(mode: Mode) -> bytes:
    code = 0x00AF9B000000FFFF if mode is Mode.LONG else 0x00CF9B000000FFFF
    data, tss = 0x00CF93000000FFFF, 0x67 | TSS << 16 | 0x8B << 40
    return struct.pack("<6Q", 0, code, data, tss, 0, data & ~(1 << 47))


def own_gdt(mode: Mode) -> dict[str, dict]:
    fields = {Field.GUEST_GDTR_BASE: OWN_GDT, Field.GUEST_GDTR_LIMIT: 0x2F}
    return {"data": {OWN_GDT: descriptors(mode)}, "fields": fields}


@dataclass(frozen=True)
class Raise:
    """How an exception is raised: by the last instruction of `program`, which `offset` is the address of.

    `length`: of the instruction, where the exit records it (software exceptions). `is_trap`: what is saved is
    the address behind that instruction.
    """

    program: str
    offset: int
    vector: Vector
    type: InterruptionType = HARDWARE
    error_code: int | None = None
    qualification: int = 0
    length: int | None = None
    is_trap: bool = False
    mode: Mode = Mode.LONG
    cr0: int = 0
    cr4: int = 0
    rflags: int = 0
    user: bool = False
    parts: dict = field(default_factory=dict)

    def arguments(self, vmxlab) -> dict:
        """Case arguments that make it so."""
        vmxlab.require(CR4(self.cr4))
        capabilities = vmxlab.capabilities
        cr0 = (
            capabilities.cr0_fixed0 | CR0.PE | CR0.PG | CR0.ET | CR0.NE | self.cr0
        ) & capabilities.cr0_fixed1
        cr4 = capabilities.cr4_fixed0 | self.cr4 | (CR4.PAE if self.mode is Mode.LONG else CR4.PSE)
        fields = {
            Field.GUEST_CR0: int(cr0 & capabilities.cr0_fixed1),
            Field.GUEST_CR4: int(cr4),
            Field.GUEST_RFLAGS: int(RFLAGS.FIXED1 | self.rflags),
        }
        return merged(own_gdt(self.mode), user_mode() if self.user else {}, self.parts, fields=fields)


EXCEPTIONS = {
    "DE": Raise("xor ecx, ecx; div ecx", 2, Vector.DE),
    "DB by TF": Raise(
        "nop", 0, Vector.DB, qualification=int(DR6.BS), rflags=int(RFLAGS.TF), is_trap=True, length=1
    ),
    "DB by INT1": Raise(".byte 0xf1", 0, Vector.DB, PRIVILEGED, length=1, is_trap=True),
    "BP": Raise("nop; int3", 1, Vector.BP, SOFTWARE, length=1, is_trap=True),
    "OF": Raise(
        "mov al, 127; add al, 1; into", 4, Vector.OF, SOFTWARE, length=1, is_trap=True, mode=Mode.PROTECTED
    ),
    "BR": Raise("mov eax, 5; bound eax, [DATA]", 5, Vector.BR, mode=Mode.PROTECTED),
    "UD": Raise("nop; ud2", 1, Vector.UD),
    "NM by TS": Raise("nop; fnop", 1, Vector.NM, cr0=int(CR0.TS)),
    "NM by EM": Raise("nop; fnop", 1, Vector.NM, cr0=int(CR0.EM)),
    "TS": Raise(
        "nop; iretd",
        1,
        Vector.TS,
        error_code=0x4,
        mode=Mode.PROTECTED,
        rflags=int(RFLAGS.NT),
        parts={"data": {TSS: struct.pack("<H", 0x4)}},
    ),
    "NP": Raise(f"mov eax, {NOT_PRESENT}; mov ds, ax", 5, Vector.NP, error_code=NOT_PRESENT),
    "SS by selector": Raise(f"mov eax, {NOT_PRESENT}; mov ss, ax", 5, Vector.SS, error_code=NOT_PRESENT),
    "SS by address": Raise(f"mov rbp, {NON_CANONICAL:#x}; mov rax, [rbp]", 10, Vector.SS, error_code=0),
    "GP by address": Raise(f"mov rax, {NON_CANONICAL:#x}; mov rbx, [rax]", 10, Vector.GP, error_code=0),
    "GP by selector": Raise("mov eax, 0x38; mov es, ax", 5, Vector.GP, error_code=0x38),
    "PF by read": Raise(
        f"mov edi, {BEYOND:#x}; mov rax, [rdi + 8]", 5, Vector.PF, error_code=0, qualification=BEYOND + 8
    ),
    "PF by write": Raise(
        f"mov edi, {BEYOND:#x}; mov [rdi + 8], rax", 5, Vector.PF, error_code=2, qualification=BEYOND + 8
    ),
    "PF at CPL 3": Raise(
        f"mov edi, {BEYOND:#x}; mov [rdi], al", 5, Vector.PF, error_code=6, qualification=BEYOND, user=True
    ),
    "MF": Raise("fninit; fldcw [DATA + 16]; fldz; fld1; fdivrp; nop; fwait", 16, Vector.MF),
    "AC": Raise(
        f"mov edi, {DATA + 1}; mov eax, [rdi]",
        5,
        Vector.AC,
        error_code=0,
        cr0=int(CR0.AM),
        rflags=int(RFLAGS.AC),
        user=True,
    ),
    "XM": Raise(
        "ldmxcsr [DATA + 24]; divss xmm0, [DATA + 28]", 8, Vector.XM, cr4=int(CR4.OSFXSR | CR4.OSXMMEXCPT)
    ),
}
"""By name. DATA holds what BOUND, FLDCW, LDMXCSR and DIVSS of these programs use."""

OPERANDS = {
    DATA: struct.pack("<ii", 0, 3),
    DATA + 16: struct.pack("<H", 0x37F & ~4),  # all masked but zero divide
    DATA + 24: struct.pack("<If", 0x1F80 & ~0x80, 0.0),  # all masked but invalid: 0 / 0
}
SINGLE_STEP = pytest.mark.vmx_known_difference("single-step-before-the-instruction")
EACH = pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, id=name, marks=[SINGLE_STEP] if name == "DB by TF" else [])
        for name, how in EXCEPTIONS.items()
    ],
)


def raising(vmxlab, how: Raise, *more: dict) -> Case:
    arguments = merged(how.arguments(vmxlab), *more, data=OPERANDS)
    return Case(program=f"{how.program}; hlt", mode=how.mode, **arguments)


# --- exits -------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_an_exception_whose_bit_is_1_exits(vmxlab, how):
    """Vol. 3C, 26.2, 28.2.1, 28.2.2: vector, type, error code, qualification, and the place it came from."""
    run = vmxlab.run(raising(vmxlab, how))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    (exit_,) = run.exits
    assert exit_.full_reason == ExitReason.EXCEPTION_OR_NMI
    event = exit_.interruption
    assert (event.vector, event.type) == (how.vector, how.type)
    assert event.error_code_valid is (how.error_code is not None)
    assert not event.nmi_unblocking
    assert not exit_.idt_vectoring.valid
    if how.error_code is not None:
        assert exit_.interruption_error_code == how.error_code
    assert exit_.raw_qualification == how.qualification
    if how.type is HARDWARE:
        # 28.3.3: a single step is a trap; the others here are faults, with RIP at the instruction.
        assert exit_.rip == PROGRAM + how.offset + (how.length if how.is_trap else 0)
    else:
        # 28.2.5 and 28.3.3: INT1, INT3 and INTO have a length, and RIP is still at the instruction.
        assert exit_.rip == PROGRAM + how.offset
        assert exit_.instruction_length == how.length


@EACH
@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_an_exception_whose_bit_is_0_is_delivered(vmxlab, how):
    """Vol. 3C, 25.6.3: L2's handler gets it, with its frame, and L1 sees nothing."""
    run = vmxlab.run(raising(vmxlab, how, delivered(how)))
    assert run.reasons == [ExitReason.HLT]
    registers = run.exits[0].registers
    seen = frame(registers, error_code=how.error_code is not None)
    assert seen["rip"] & 0xFFFF_FFFF == PROGRAM + how.offset + (how.length if how.is_trap else 0)
    assert seen["cs"] & 0xFFFF == (0x0B if how.user else 0x08)
    if how.error_code is not None:
        assert seen["error_code"] & 0xFFFF_FFFF == how.error_code
    if how.mode is Mode.LONG:
        assert (seen["rsp"], seen["ss"]) == (STACK_TOP, 0x13 if how.user else 0x10)


def delivered(how: Raise) -> dict[str, dict]:
    """The IDT that takes it, and a stack for CPL 0; outside 64-bit mode gates have 8 bytes."""
    if how.mode is Mode.LONG:
        return merged(handled(how.vector), data={TSS + 4: struct.pack("<Q", STACK_TOP)})
    parts = handled(how.vector)
    wide = parts["data"].pop(IDT + 16 * how.vector)
    return merged(parts, data={IDT + 8 * how.vector: wide[:8]})


def test_a_bit_is_for_its_vector_alone(vmxlab):
    """Vol. 3C, 25.6.3: with all other bits 1 the exception is delivered; with all others 0 it exits."""
    for how in (EXCEPTIONS["DE"], EXCEPTIONS["BP"], EXCEPTIONS["GP by address"]):
        assert vmxlab.run(raising(vmxlab, how, delivered(how))).reasons == [ExitReason.HLT]
        only = {"fields": {Field.EXCEPTION_BITMAP: 1 << how.vector}}
        run = vmxlab.run(raising(vmxlab, how, delivered(how), only))
        assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
        assert run.exits[0].interruption.vector == how.vector


def test_int_n_is_no_exception(vmxlab):
    """Vol. 3C, 25.6.3: INT n with the vector of an exception is not subject to the exception bitmap."""
    parts = handled(Vector.BP)
    fields = {**parts["fields"], Field.EXCEPTION_BITMAP: EVERY_EXCEPTION}
    run = vmxlab.run(Case(program=b"\xcd\x03\xf4", data=parts["data"], fields=fields))  # INT 3, two bytes
    assert run.reasons == [ExitReason.HLT]
    assert frame(run.exits[0].registers)["rip"] == PROGRAM + 2


# --- double faults -----------------------------------------------------------------------------------------


def double_fault(bitmap: int, **more: dict) -> Case:
    """#GP, whose gate is empty: another #GP in its delivery (Vol. 3A, Table 6-5)."""
    return Case(
        program=f"mov rax, {NON_CANONICAL:#x}; mov rbx, [rax]",
        **merged(more, fields={Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: bitmap}),
    )


def test_a_double_fault_exits_by_its_bit(vmxlab):
    """Vol. 3C, 26.2 and 28.2.2, Vol. 3A, 6.15: #GP in the delivery of #GP is #DF(0)."""
    run = vmxlab.run(double_fault(1 << Vector.DF))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    event = run.exits[0].interruption
    assert (event.vector, event.type, event.error_code_valid) == (Vector.DF, HARDWARE, True)
    assert run.exits[0].interruption_error_code == 0
    assert run.exits[0].raw_qualification == 0
    assert run.exits[0].rip == PROGRAM + 10
    # 28.2.4: a double fault that exits itself is not considered to be in the delivery of the first event.
    assert not run.exits[0].idt_vectoring.valid


def test_a_fault_in_a_delivery_exits_by_its_own_bit(vmxlab):
    """Vol. 3C, 28.2.4: #UD is delivered, its gate is not there: #GP exits, and #UD is the vectored event."""
    case = Case(
        program="nop; ud2", fields={Field.GUEST_IDTR_LIMIT: 0xFFF, Field.EXCEPTION_BITMAP: 1 << Vector.GP}
    )
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    (exit_,) = run.exits
    assert exit_.interruption.vector == Vector.GP
    assert exit_.interruption_error_code & ~1 == Vector.UD << 3 | 2  # bit 1: of the IDT; bit 0 (EXT) aside
    assert (exit_.idt_vectoring.vector, exit_.idt_vectoring.type) == (Vector.UD, HARDWARE)
    assert exit_.rip == PROGRAM + 1


def test_a_double_fault_whose_bit_is_0_is_delivered(vmxlab):
    """Vol. 3C, 25.6.3: L2's handler gets #DF with error code 0."""
    parts = handled(Vector.DF)
    case = double_fault(0, data=parts["data"])
    run = vmxlab.run(case)
    assert run.reasons == [ExitReason.HLT]
    assert frame(run.exits[0].registers, error_code=True)["error_code"] == 0


# --- page faults -------------------------------------------------------------------------------------------


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
@pytest.mark.parametrize("bit", [0, 1])
@pytest.mark.parametrize(
    ("mask", "match", "equal"),
    [(0, 0, True), (2, 2, True), (3, 2, True), (0x1F, 2, True), (0, 1, False), (2, 0, False), (1, 1, False)],
)
def test_mask_and_match_turn_the_page_fault_bit_around(vmxlab, bit, mask, match, equal):
    """Vol. 3C, 26.2: where the error code AND mask equals match, bit 14 holds; else its opposite does."""
    how = EXCEPTIONS["PF by write"]  # error code 2
    fields = {
        Field.EXCEPTION_BITMAP: EVERY_EXCEPTION & ~(1 << Vector.PF) | bit << Vector.PF,
        Field.PAGE_FAULT_ERROR_CODE_MASK: mask,
        Field.PAGE_FAULT_ERROR_CODE_MATCH: match,
    }
    run = vmxlab.run(raising(vmxlab, how, delivered(how), {"fields": fields}))
    exits = bool(bit) is equal
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI if exits else ExitReason.HLT]
    if not exits:
        assert frame(run.exits[0].registers, error_code=True)["error_code"] == 2


@pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT)
def test_a_delivered_page_fault_loads_cr2_and_one_that_exits_does_not(vmxlab):
    """Vol. 3C, 28.2.1 and 28.1: CR2 is loaded as part of delivery; the exit has the address instead."""
    handler = 0x1B000
    code = bytes.fromhex("0f 20 d0 f4")  # mov rax, cr2; hlt
    parts = handled(Vector.PF)
    parts["data"] = {IDT + 16 * Vector.PF: gate(handler), handler: code}
    case = Case(program=f"mov rax, 0x777000; mov cr2, rax; mov [{BEYOND:#x}], ecx", **parts)
    run = vmxlab.run(case)
    assert run.exits[0].registers["rax"] == BEYOND
    behind = on(ExitReason.EXCEPTION_OR_NMI).vmwrite(Field.GUEST_RIP, handler).resume()
    run = vmxlab.run(
        Case(
            program=f"mov rax, 0x777000; mov cr2, rax; mov [{BEYOND:#x}], ecx",
            data=parts["data"],
            reactions=[behind],
        )
    )
    assert run.exits[0].raw_qualification == BEYOND
    assert run.exits[1].registers["rax"] == 0x777000
