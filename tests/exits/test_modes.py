"""L2 in 64-bit, 32-bit protected and real mode: it starts as the case says, and it really runs.

SDM Vol. 3C, 27.3.2 (loading guest state), 26.6 (unrestricted guest); Vol. 1, 3.2 and 3.3 (the modes).
"""

from __future__ import annotations

import pytest

from vmxlab import Case, EntryControls, ExitReason, Field, Mode
from vmxlab.cases.memory import DATA, PROGRAM, STACK_TOP
from vmxlab.sdm.registers import CR0, CR4, EFER, GENERAL_REGISTERS, RFLAGS

MODES = pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())

SCRATCH = 0x7100
"""An address that real mode reaches with its segment bases of 0: below what the stack needs."""

MASKS = {Mode.LONG: (1 << 64) - 1, Mode.PROTECTED: (1 << 32) - 1, Mode.REAL: (1 << 32) - 1}
"""What of a general register L2's instructions can reach."""


def last_registers(vmxlab, **case) -> dict[str, int]:
    """L2's registers at the HLT that must be the only exit."""
    run = vmxlab.run(Case(**case))
    assert run.reasons == [ExitReason.HLT]
    return dict(run.exits[0].registers)


# --- the state L2 starts in --------------------------------------------------------------------------------


@MODES
def test_all_registers_are_zero_but_the_stack_pointer(vmxlab, mode):
    """The baseline: RIP at the program, RSP at the top of the stack, RFLAGS with its fixed bit alone."""
    run = vmxlab.run(Case(mode=mode))
    assert run.reasons == [ExitReason.HLT]
    exit_ = run.exits[0]
    assert exit_.registers == dict.fromkeys(GENERAL_REGISTERS, 0) | {"rsp": STACK_TOP}
    assert exit_.rip == PROGRAM
    assert exit_.rflags & ~RFLAGS.RF == RFLAGS.FIXED1
    assert exit_.instruction_length == 1


def test_registers_start_with_what_the_case_says(vmxlab):
    """Sixteen registers, each with its own value, RSP too."""
    values = {name: 0x0123_4567_89AB_CDEF ^ i << 60 for i, name in enumerate(GENERAL_REGISTERS)}
    assert last_registers(vmxlab, registers=values) == values


@MODES
def test_l2_sees_the_registers_the_case_gave_it(vmxlab, mode):
    """The general registers are no part of the VMCS: the monitor loads them (Vol. 3C, 27.3.2.3)."""
    values = {"rax": 0x1111, "rcx": 0x2222, "rdx": 0x3333, "rbx": 0x4444, "rbp": 0x5555, "rsi": 0x6666}
    moves = [f"mov [{SCRATCH + 2 * i}], {name[1:]}" for i, name in enumerate(values)]
    loads = [f"mov eax, [{SCRATCH}]", f"mov ecx, [{SCRATCH + 4}]"]
    program = "; ".join([*moves, *loads, "hlt"])
    registers = last_registers(vmxlab, mode=mode, registers=values, program=program)
    assert registers["rax"] & MASKS[mode] == 0x2222_1111
    assert registers["rcx"] & MASKS[mode] == 0x4444_3333


@MODES
def test_control_registers_are_those_of_the_mode(vmxlab, mode):
    """Vol. 3A, 2.2 and Vol. 3C, 26.6: real mode has PE and PG 0, 64-bit mode PG, PAE and EFER.LMA set."""
    run = vmxlab.run(Case(mode=mode, watch=[Field.GUEST_CR0, Field.GUEST_CR4, Field.GUEST_CS_ACCESS_RIGHTS]))
    watched = run.exits[0].watched
    paging = CR0(watched[Field.GUEST_CR0]) & (CR0.PE | CR0.PG)
    assert paging == (CR0(0) if mode is Mode.REAL else CR0.PE | CR0.PG)
    assert bool(watched[Field.GUEST_CR4] & CR4.PAE) is (mode is Mode.LONG)
    size_bits = watched[Field.GUEST_CS_ACCESS_RIGHTS] >> 13 & 3  # L and D/B
    assert size_bits == {Mode.LONG: 0b01, Mode.PROTECTED: 0b10, Mode.REAL: 0b00}[mode]


@pytest.mark.vmx_known_difference("real-mode-cs-type")
def test_type_of_cs_in_real_mode_is_saved_as_it_was_loaded(vmxlab):
    """Vol. 3C, 27.3.2.2 and 28.3.2: accessed readable code, though a reset would make it data."""
    run = vmxlab.run(Case(mode=Mode.REAL, watch=[Field.GUEST_CS_ACCESS_RIGHTS]))
    assert run.exits[0].watched[Field.GUEST_CS_ACCESS_RIGHTS] == 0x9B


@pytest.mark.vmx_needs(EntryControls.LOAD_IA32_EFER)
@MODES
def test_efer_belongs_to_the_mode(vmxlab, mode):
    """Vol. 3C, 27.3.1.1: LMA and LME are set for an IA-32e mode guest, and clear for any other."""
    run = vmxlab.run(Case(mode=mode, watch=[Field.GUEST_IA32_EFER]))
    wanted = EFER.LMA | EFER.LME if mode is Mode.LONG else EFER(0)
    assert EFER(run.exits[0].watched[Field.GUEST_IA32_EFER]) & (EFER.LMA | EFER.LME) == wanted


# --- it runs -----------------------------------------------------------------------------------------------


@MODES
def test_arithmetic(vmxlab, mode):
    """Instructions of the mode's default operand size, and of the other by a prefix."""
    program = (
        "mov eax, 0x12345678; add eax, 0x11111111; mov bx, 0xfff0; add bx, 32; mov cl, 3; shl eax, cl; hlt"
    )
    registers = last_registers(vmxlab, mode=mode, program=program)
    assert registers["rax"] == 0x2345_6789 << 3 & 0xFFFF_FFFF
    assert registers["rbx"] == 0x10


def test_64_bit_arithmetic(vmxlab):
    """64-bit mode has 64-bit operands and sixteen registers; a 32-bit result clears the upper half."""
    program = "mov rax, 0x123456789abcdef0; imul r15, rax, 2; mov r8, r15; add r8d, 1; hlt"
    registers = last_registers(vmxlab, program=program)
    assert registers["r15"] == 0x2468_ACF1_3579_BDE0
    assert registers["r8"] == 0x3579_BDE1


def test_32_bit_mode_has_32_bit_arithmetic(vmxlab):
    """In protected mode REX prefixes are INC and DEC, and results are 32 bits wide."""
    registers = last_registers(
        vmxlab,
        mode=Mode.PROTECTED,
        program=b"\x48\x48\xf4",  # DEC EAX twice here; in 64-bit mode REX.W prefixes of HLT
    )
    assert registers["rax"] & 0xFFFF_FFFF == 0xFFFF_FFFE


@MODES
def test_memory_holds_the_data_of_the_case(vmxlab, mode):
    """`data` is there at L2's addresses, the rest is zero, and L2 can write."""
    registers = last_registers(
        vmxlab,
        mode=mode,
        program=f"mov eax, [{SCRATCH}]; inc eax; mov [{SCRATCH + 4}], eax; mov ebx, [{SCRATCH + 4}]; "
        f"mov ecx, [{SCRATCH + 8}]; hlt",
        data={SCRATCH: b"\x78\x56\x34\x12"},
    )
    assert registers["rax"] == registers["rbx"] == 0x1234_5679
    assert registers["rcx"] == 0


def test_real_mode_segments_reach_beyond_64_kib(vmxlab):
    """Vol. 3B, 21.1.1: in real mode an address is selector * 16 + offset."""
    registers = last_registers(
        vmxlab,
        mode=Mode.REAL,
        program="mov ax, 0x1000; mov ds, ax; mov ebx, [0x234]; mov cx, ds; hlt",
        data={0x10234: b"\xef\xbe\xad\xde"},
    )
    assert registers["rbx"] == 0xDEAD_BEEF
    assert registers["rcx"] == 0x1000


def test_loading_a_segment_in_real_mode_is_saved_by_the_exit(vmxlab):
    """Vol. 3C, 28.3.2: selector and base of DS as L2 loaded them."""
    watch = [Field.GUEST_DS_SELECTOR, Field.GUEST_DS_BASE, Field.GUEST_DS_LIMIT]
    run = vmxlab.run(Case(mode=Mode.REAL, program="mov ax, 0x1234; mov ds, ax; hlt", watch=watch))
    assert list(run.exits[0].watched.values()) == [0x1234, 0x12340, 0xFFFF]


@MODES
def test_the_stack_works(vmxlab, mode):
    """PUSH, POP, CALL and RET below STACK_TOP."""
    width = 2 if mode is Mode.REAL else 4 if mode is Mode.PROTECTED else 8
    registers = last_registers(
        vmxlab,
        mode=mode,
        program="push 0x1234; call f; pop ax; hlt; f: mov bx, sp; mov cx, [esp]; ret".replace(
            "pop ax", {2: "pop ax", 4: "pop eax", 8: "pop rax"}[width]
        ),
    )
    assert registers["rax"] == 0x1234
    assert registers["rbx"] == STACK_TOP - 2 * width
    # The return address: behind PUSH and CALL.
    lengths = {2: 3 + 3, 4: 5 + 5, 8: 5 + 5}
    assert registers["rcx"] == PROGRAM + lengths[width]
    assert registers["rsp"] == STACK_TOP


@MODES
def test_jumps_and_loops(vmxlab, mode):
    """Near jumps, forwards and backwards, and LOOP."""
    program = "mov ecx, 100; again: add eax, ecx; loop again; jmp end; ud2; end: hlt"
    assert last_registers(vmxlab, mode=mode, program=program)["rax"] == 5050


def test_a_far_jump_in_real_mode_changes_cs(vmxlab):
    """Vol. 2A, JMP: a far jump loads CS; the exit shows the new selector and base."""
    watch = [Field.GUEST_CS_SELECTOR, Field.GUEST_CS_BASE]
    run = vmxlab.run(Case(mode=Mode.REAL, program=b"\xea\x10\x00\x00\x08" + bytes(11) + b"\xf4", watch=watch))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].rip == 0x10
    assert list(run.exits[0].watched.values()) == [0x800, 0x8000]


def test_a_far_return_in_protected_mode_reloads_cs_from_the_gdt(vmxlab):
    """Vol. 2B, RET: the descriptor in L2's own GDT is loaded, as the baseline has it."""
    registers = last_registers(
        vmxlab, mode=Mode.PROTECTED, program="push 8; push offset target; retf; ud2; target: mov al, 1; hlt"
    )
    assert registers["rax"] == 1


def test_data_segments_can_be_reloaded_in_protected_mode(vmxlab):
    """Selector 10H of the baseline's GDT is a flat, writable data segment."""
    registers = last_registers(
        vmxlab,
        mode=Mode.PROTECTED,
        program="mov ax, ds; mov es, ax; mov ss, ax; mov dword ptr es:[DATA], 0x55; mov ebx, [DATA]; hlt",
    )
    assert registers["rax"] == 0x10
    assert registers["rbx"] == 0x55


# --- exits in each mode ------------------------------------------------------------------------------------

IO = "in al, 0x60; in ax, dx; in eax, dx; out 0x10, eax; out dx, al; hlt"
IO_LENGTHS = {
    # An operand-size prefix goes with the size that is not the mode's default.
    Mode.LONG: [2, 2, 1, 2, 1, 1],
    Mode.PROTECTED: [2, 2, 1, 2, 1, 1],
    Mode.REAL: [2, 1, 2, 3, 1, 1],
}


@MODES
def test_io_exits_with_the_lengths_of_the_mode(vmxlab, mode):
    """Vol. 3C, 28.2.1 and 28.2.5: port, size, direction, and the length that the mode gives the code."""
    run = vmxlab.run(Case(mode=mode, program=IO, registers={"rdx": 0x1234}))
    assert run.reasons == [ExitReason.IO_INSTRUCTION] * 5 + [ExitReason.HLT]
    seen = [
        (e.qualification.port, e.qualification.size, e.qualification.is_in, e.qualification.immediate_operand)
        for e in run.exits[:-1]
    ]
    assert seen == [
        (0x60, 1, True, True),
        (0x1234, 2, True, False),
        (0x1234, 4, True, False),
        (0x10, 4, False, True),
        (0x1234, 1, False, False),
    ]
    assert [exit_.instruction_length for exit_ in run.exits] == IO_LENGTHS[mode]
    rips = [PROGRAM + sum(IO_LENGTHS[mode][:i]) for i in range(len(run.exits))]
    assert [exit_.rip for exit_ in run.exits] == rips


@MODES
def test_other_instructions_exit_in_each_mode(vmxlab, mode):
    """Vol. 3C, 26.1.2: CPUID and VMCALL exit in every mode; their lengths are the same."""
    run = vmxlab.run(Case(mode=mode, program="cpuid; vmcall; invd; hlt"))
    assert run.reasons == [ExitReason.CPUID, ExitReason.VMCALL, ExitReason.INVD, ExitReason.HLT]
    assert [exit_.instruction_length for exit_ in run.exits] == [2, 3, 2, 1]


@pytest.mark.parametrize("instruction", ["vmxoff", "vmlaunch", "vmread eax, ecx", "vmclear [bx]"])
def test_vmx_instructions_in_real_mode_are_undefined(vmxlab, instruction):
    """Vol. 3C, 31.3: in real-address mode VMX instructions but VMCALL are #UD, and do not exit."""
    run = vmxlab.run(Case(mode=Mode.REAL, program=f"nop; {instruction}"))
    assert run.reasons == [ExitReason.EXCEPTION_OR_NMI]
    assert run.exits[0].interruption.vector == 6
    assert run.exits[0].rip == PROGRAM + 1


@MODES
def test_a_page_fault_free_program_may_use_all_of_its_memory(vmxlab, mode):
    """Every page of L2's 128 KiB can be read and written: nothing of the harness is in the way."""
    limit = 0x10000 if mode is Mode.REAL else DATA + 0x10000
    spots = range(0x9000, limit, 0x1000)
    program = "; ".join(f"mov eax, [{at}]; mov dword ptr [{at}], {at}" for at in spots)
    assert last_registers(vmxlab, mode=mode, program=f"{program}; hlt")["rax"] == 0
