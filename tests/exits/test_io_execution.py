"""I/O that does not exit is executed; which of the two I/O controls decides (SDM Vol. 3C, 25.6.2, 26.1.3).

The port that shows it is the mask register of the second 8259: every PC has it, what is written there can be
read again, and while the first one is masked (the monitor has done that) its value is of no consequence.
"""

from __future__ import annotations

import pytest

from vmxlab import Case, ExitReason, IOBitmap, Mode, PrimaryControls, on
from vmxlab.cases.memory import DATA, PROGRAM, machine_address
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.image.layout import IO_BITMAP_B

PIC_MASK = 0xA1
ALL_MASKED = 0xFF
RESTORE = f"mov al, {ALL_MASKED}; out {PIC_MASK}, al"
FREE_PORT = 0x9ABC
"""No device is there: what is read is the engine's business, but reading and writing it does nothing."""


def halted(run):
    """L2 reached its HLT without any exit before it; its registers there."""
    assert run.reasons == [ExitReason.HLT]
    return run.exits[0].registers


# --- the two controls --------------------------------------------------------------------------------------


def test_unconditional_io_exiting_makes_every_access_exit(vmxlab):
    """26.1.3: with "unconditional I/O exiting" 1 and "use I/O bitmaps" 0 every I/O instruction exits."""
    program = """
        mov dx, 0x7fff; in al, dx; inc dx; out dx, ax
        mov dx, 0xffff; in eax, dx
        xor edx, edx;   out dx, al; insb; rep outsd
        in al, 0x80;    out 0xff, eax
        hlt"""
    run = vmxlab.run(
        Case(
            program=program,
            enable=PrimaryControls.UNCONDITIONAL_IO_EXITING,
            disable=PrimaryControls.USE_IO_BITMAPS,
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION] * 8 + [ExitReason.HLT]
    assert [(e.qualification.port, e.qualification.size, e.qualification.is_in) for e in run.exits[:-1]] == [
        (0x7FFF, 1, True),
        (0x8000, 2, False),
        (0xFFFF, 4, True),
        (0x0000, 1, False),
        (0x0000, 1, True),
        (0x0000, 4, False),
        (0x0080, 1, True),
        (0x00FF, 4, False),
    ]


def test_with_both_controls_off_no_access_exits(vmxlab):
    """26.1.3: with both controls 0 I/O instructions execute normally, one that wraps past FFFFH too."""
    run = vmxlab.run(
        Case(
            program=f"""
                mov al, 0x5a; out {PIC_MASK}, al; xor eax, eax; in al, {PIC_MASK}; mov ebx, eax
                {RESTORE}
                mov edx, 0xffff; in ax, dx; mov edx, {FREE_PORT}; in eax, dx; out dx, ax
                hlt""",
            disable=[PrimaryControls.UNCONDITIONAL_IO_EXITING, PrimaryControls.USE_IO_BITMAPS],
        )
    )
    assert halted(run)["rbx"] == 0x5A


def test_with_io_bitmaps_unconditional_io_exiting_is_ignored(vmxlab):
    """25.6.2, Table 25-6: "use I/O bitmaps" 1 makes the processor ignore "unconditional I/O exiting"."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    run = vmxlab.run(
        Case(
            io_bitmap=bitmap,
            enable=PrimaryControls.UNCONDITIONAL_IO_EXITING,
            program=f"in al, 0x60; in al, {PIC_MASK}; in al, 0x60; mov edx, 0xffff; in ax, dx; hlt",
        )
    )
    ports = [e.qualification.port for e in run.exits if e.reason is ExitReason.IO_INSTRUCTION]
    assert ports == [0x60, 0x60, 0xFFFF]
    assert run.reasons[-1] is ExitReason.HLT
    assert run.exits[1].registers["rax"] & 0xFF == ALL_MASKED


def test_the_bitmap_decides_alone_without_unconditional_io_exiting(vmxlab):
    """26.1.3: the bitmap needs no help of "unconditional I/O exiting"."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x60, True)
    run = vmxlab.run(
        Case(
            io_bitmap=bitmap,
            disable=PrimaryControls.UNCONDITIONAL_IO_EXITING,
            program=f"in al, 0x60; in al, {PIC_MASK}; hlt",
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert run.exits[1].registers["rax"] & 0xFF == ALL_MASKED


def test_without_use_io_bitmaps_the_bitmaps_are_not_looked_at(vmxlab):
    """25.6.4: the bitmaps are used if and only if the control is 1."""
    run = vmxlab.run(
        Case(
            io_bitmap=IOBitmap.intercept_all(),
            disable=[PrimaryControls.USE_IO_BITMAPS, PrimaryControls.UNCONDITIONAL_IO_EXITING],
            program=f"in al, {PIC_MASK}; mov edx, 0xffff; in eax, dx; hlt",
        )
    )
    assert halted(run)["rdx"] == 0xFFFF


# --- executed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_a_port_that_is_not_intercepted_is_written_and_read(vmxlab, mode):
    """26.1.3: an access that no bit makes exit is executed, in every mode; here all other bits are 1."""
    bitmap = IOBitmap.intercept_all()
    bitmap.set_intercept(PIC_MASK, False)
    run = vmxlab.run(
        Case(
            mode=mode,
            io_bitmap=bitmap,
            program=f"""
                mov al, 0x5a; out {PIC_MASK}, al; xor eax, eax; in al, {PIC_MASK}; mov ebx, eax
                mov edx, {PIC_MASK}
                mov al, 0xa5; out dx, al; xor eax, eax; in al, dx; mov ecx, eax
                {RESTORE}
                hlt""",
        )
    )
    registers = halted(run)
    assert (registers["rbx"], registers["rcx"]) == (0x5A, 0xA5)


def test_an_access_that_exits_is_not_executed(vmxlab):
    """26.1.1: the exit is in place of the instruction: neither the port nor the register changes."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(PIC_MASK, True)
    run = vmxlab.run(
        Case(io_bitmap=bitmap, program=f"mov al, 0x5a; out {PIC_MASK}, al; in al, {PIC_MASK}; hlt")
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert run.exits[2].registers["rax"] == 0x5A
    assert halted(vmxlab.run(Case(io_bitmap=IOBitmap(), program=f"in al, {PIC_MASK}; hlt")))["rax"] == 0xFF


@pytest.mark.parametrize(
    ("instruction", "kept"),
    [
        ("in al, dx", 0x1122_3344_5566_7700),
        ("in ax, dx", 0x1122_3344_5566_0000),
        ("in eax, dx", 0),
    ],
)
def test_in_changes_as_much_of_rax_as_it_reads(vmxlab, instruction, kept):
    """SDM Vol. 1, 3.4.1.1: AL and AX leave the rest of RAX, EAX clears bits 63:32."""
    run = vmxlab.run(
        Case(
            io_bitmap=IOBitmap.passthrough_all(),
            program=f"{instruction}; hlt",
            registers={"rax": 0x1122334455667788, "rdx": FREE_PORT},
        )
    )
    width = {"al": 8, "ax": 16, "eax": 32}[instruction.split()[1].rstrip(",")]
    assert halted(run)["rax"] >> width == kept >> width


def run_string(vmxlab, program: str, **case):
    """L2's registers at its HLT, and 32 bytes from 16 below DATA + 0x100 on."""
    start = DATA + 0x100 - 16
    steps = (*STANDARD, ReportMemory(machine_address(start), 32))
    run = vmxlab.run(Case(io_bitmap=IOBitmap.passthrough_all(), program=program, steps=steps, **case))
    return halted(run), run.memory[machine_address(start)]


@pytest.mark.parametrize("backward", [False, True], ids=["DF=0", "DF=1"])
def test_rep_insb_reads_into_memory(vmxlab, backward):
    """SDM Vol. 2A, INS: each element goes to ES:(E/R)DI, which moves on by its size; REP counts RCX down."""
    program = f"""
        mov al, 0x5a; out {PIC_MASK}, al; mov edx, {PIC_MASK}
        mov edi, DATA + 0x100; mov ecx, 5; {"std" if backward else "cld"}
        rep insb
        {RESTORE}; hlt"""
    registers, memory = run_string(vmxlab, program, data={DATA + 0xF0: b"\x11" * 32})
    assert (registers["rcx"], registers["rsi"]) == (0, 0)
    assert registers["rdi"] == DATA + 0x100 + (-5 if backward else 5)
    first = 16 - 4 if backward else 16
    assert memory == b"\x11" * first + b"\x5a" * 5 + b"\x11" * (27 - first)


@pytest.mark.parametrize("backward", [False, True], ids=["DF=0", "DF=1"])
def test_rep_outsb_writes_from_memory_in_order(vmxlab, backward):
    """SDM Vol. 2B, OUTS: the elements of DS:(E/R)SI go out in order; what the port keeps is the last one."""
    program = f"""
        mov edx, {PIC_MASK}; mov esi, DATA + 0x100; mov ecx, 3; {"std" if backward else "cld"}
        rep outsb
        xor eax, eax; in al, {PIC_MASK}; mov ebx, eax
        {RESTORE}; hlt"""
    data = {DATA + 0x100 - 3: bytes(range(0x30, 0x37))}
    registers, _ = run_string(vmxlab, program, data=data)
    assert (registers["rcx"], registers["rdi"]) == (0, 0)
    assert registers["rsi"] == DATA + 0x100 + (-3 if backward else 3)
    assert registers["rbx"] == (0x31 if backward else 0x35)


@pytest.mark.parametrize(("letter", "size"), [("w", 2), ("d", 4)])
@pytest.mark.parametrize("address_size", [64, 32])
def test_wide_string_input_moves_by_its_size(vmxlab, letter, size, address_size):
    """SDM Vol. 2A, INS: three elements of 2 or 4 bytes, each what IN reads at the same port."""
    prefix = "addr32 " if address_size == 32 else ""
    program = f"""
        mov edx, {FREE_PORT}; in eax, dx; mov ebx, eax; mov edi, DATA + 0x100; mov ecx, 3
        {prefix}rep ins{letter}
        hlt"""
    registers, memory = run_string(vmxlab, program, data={DATA + 0xF0: b"\x11" * 32})
    assert (registers["rcx"], registers["rdi"]) == (0, DATA + 0x100 + 3 * size)
    element = registers["rbx"].to_bytes(4, "little")[:size]
    assert memory == b"\x11" * 16 + element * 3 + b"\x11" * (16 - 3 * size)


def test_an_access_runs_to_its_end_once_its_bit_is_cleared(vmxlab):
    """25.11.4: the bitmaps are memory; what L1 writes there counts when the instruction is tried again.

    The exit left the instruction undone (26.1.1), so all four elements are read then.
    """
    port = 0x9ABC
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(port, True)
    byte = IO_BITMAP_B + (port - 0x8000) // 8
    run = vmxlab.run(
        Case(
            io_bitmap=bitmap,
            program="rep insb; hlt",
            registers={"rcx": 4, "rdx": port, "rdi": DATA},
            reactions=[on(ExitReason.IO_INSTRUCTION, times=1).write(byte, b"\x00").resume()],
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert (run.exits[0].rip, run.exits[0].registers["rcx"]) == (PROGRAM, 4)
    assert (run.exits[1].registers["rcx"], run.exits[1].registers["rdi"]) == (0, DATA + 4)
