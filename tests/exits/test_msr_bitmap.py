"""MSR bitmaps on the processor: which RDMSR and WRMSR exit (SDM Vol. 3C, 25.6.9 and 26.1.3).

What must exit is said twice: by `MsrBitmap.intercepts`, and by a model of this file (`must_exit`). Both must
agree before the processor is asked.

An access that does not exit is executed: it reads or writes the MSR, or it is a #GP if there is none. L2 has
a handler for that, which goes on behind the instruction: either way no exit is seen.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pytest

from vmxlab import Case, ExitReason, Field, Mode, Msr, MsrBitmap, PrimaryControls
from vmxlab.cases.memory import DATA, IDT, PROGRAM
from vmxlab.cases.steps import STANDARD, Rdmsr, Wrmsr
from vmxlab.sdm.registers import Vector

HLT = b"\xf4"
INDICES = (0x0000, 0x1FFF)
"""The edges of each of the four bitmaps."""
OUTSIDE = (0x2000, 0x3FFF, 0x4000_0000, 0x4000_0082, 0x8000_0000, 0xBFFF_FFFF, 0xC000_2000, 0xFFFF_FFFF)

Bit = tuple[bool, bool, int]
"""(for WRMSR, of a high MSR, index): one bit of the MSR bitmap."""
QUADRANTS = [(write, high) for write in (False, True) for high in (False, True)]
QUADRANT_NAMES = ["read-low", "read-high", "write-low", "write-high"]


@dataclass(frozen=True, slots=True)
class Access:
    """RDMSR, or WRMSR of 0."""

    msr: int
    write: bool = False

    @property
    def code(self) -> bytes:
        """MOV ECX, msr; XOR EAX, EAX; XOR EDX, EDX; and the instruction, of two bytes."""
        load = b"\xb9" + self.msr.to_bytes(4, "little") + b"\x31\xc0\x31\xd2"
        return load + (b"\x0f\x30" if self.write else b"\x0f\x32")

    @property
    def bit(self) -> Bit | None:
        for high, first in ((False, 0), (True, 0xC000_0000)):
            if first <= self.msr <= first + 0x1FFF:
                return self.write, high, self.msr - first
        return None

    @property
    def reason(self) -> ExitReason:
        return ExitReason.WRMSR if self.write else ExitReason.RDMSR


def must_exit(bits: Collection[Bit], access: Access) -> bool:
    return access.bit is None or access.bit in bits


def bitmap_of(bits: Iterable[Bit]) -> MsrBitmap:
    bitmap = MsrBitmap.passthrough_all()
    for write, high, index in bits:
        set_intercept = bitmap.set_write_intercept if write else bitmap.set_read_intercept
        set_intercept(index + 0xC000_0000 * high, True)
    return bitmap


ALL_BITS = frozenset((write, high, index) for write, high in QUADRANTS for index in range(0x2000))


def at_index(index: int) -> list[Access]:
    """The four accesses whose bits have this index in their bitmaps."""
    return [Access(index + 0xC000_0000 * high, write) for write, high in QUADRANTS]


# #GP in L2: ADD qword [RSP+8], 2 (RIP, behind the error code); ADD RSP, 8; IRETQ
SKIP_TWO_BYTES = bytes.fromhex("48 83 44 24 08 02  48 83 c4 08  48 cf")
HANDLER = DATA + 0x8000
INTERRUPT_GATE = struct.pack("<HHHHII", HANDLER & 0xFFFF, 0x08, 0x8E00, HANDLER >> 16, 0, 0)


def exits_of(vmxlab, bitmap: MsrBitmap | None, accesses: Iterable[Access], **case) -> list[tuple[int, ...]]:
    """(full reason, RIP, ECX, instruction length, qualification) of each; the program ran to its end."""
    program = b"".join(access.code for access in accesses) + HLT
    run = vmxlab.run(
        Case(
            msr_bitmap=bitmap,
            program=program,
            fields={Field.EXCEPTION_BITMAP: 0, Field.GUEST_IDTR_LIMIT: 0xFFF},
            data={HANDLER: SKIP_TWO_BYTES, IDT + 16 * Vector.GP: INTERRUPT_GATE},
            **case,
        )
    )
    *exits, last = run.exits
    assert last.reason is ExitReason.HLT
    assert last.rip == PROGRAM + len(program) - 1
    return [
        (e.full_reason, e.rip, e.registers["rcx"], e.instruction_length, e.raw_qualification) for e in exits
    ]


def expected(bits: Collection[Bit], accesses: Iterable[Access]) -> list[tuple[int, ...]]:
    exits = []
    rip = PROGRAM
    for access in accesses:
        rip += len(access.code)
        if must_exit(bits, access):
            exits.append((int(access.reason), rip - 2, access.msr, 2, 0))
    return exits


def check(vmxlab, bits: Collection[Bit], accesses: Iterable[Access]) -> None:
    """Bitmap, model and processor say the same of each access."""
    accesses = list(accesses)
    bitmap = bitmap_of(bits)
    for access in accesses:
        assert bitmap.intercepts(access.msr, access.write) == must_exit(bits, access), access
    assert exits_of(vmxlab, bitmap, accesses) == expected(bits, accesses)


# --- the four quadrants ------------------------------------------------------------------------------------


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(("write", "high"), QUADRANTS, ids=QUADRANT_NAMES)
@pytest.mark.parametrize("index", INDICES, ids=hex)
def test_a_bit_is_for_one_msr_and_one_direction(vmxlab, write, high, index):
    """25.6.9: four bitmaps, for reads and writes of low and of high MSRs; each bit belongs to one of them."""
    accesses = [access for each in INDICES for access in at_index(each)]
    bits = {(write, high, index)}
    assert len(expected(bits, accesses)) == 1
    check(vmxlab, bits, accesses)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(("write", "high"), QUADRANTS, ids=QUADRANT_NAMES)
@pytest.mark.parametrize("index", INDICES, ids=hex)
def test_a_clear_bit_lets_one_msr_in_one_direction_through(vmxlab, write, high, index):
    """25.6.9, the other way round: all bits 1 but one."""
    accesses = [access for each in INDICES for access in at_index(each)]
    bits = ALL_BITS - {(write, high, index)}
    assert len(expected(bits, accesses)) == len(accesses) - 1
    check(vmxlab, bits, accesses)


@pytest.mark.parametrize(("write", "high"), QUADRANTS, ids=QUADRANT_NAMES)
def test_a_full_bitmap_leaves_the_other_three_alone(vmxlab, write, high):
    """25.6.9: the bitmaps are independent of each other."""
    accesses = [access for each in INDICES for access in at_index(each)]
    bits = {bit for bit in ALL_BITS if bit[:2] == (write, high)}
    assert len(expected(bits, accesses)) == 2
    check(vmxlab, bits, accesses)


def test_a_clear_bitmap_lets_all_of_both_ranges_through(vmxlab):
    """26.1.3: inside of the ranges only a 1 bit makes an access exit."""
    check(vmxlab, set(), [access for each in INDICES for access in at_index(each)])


def test_a_neighbour_s_bit_does_not_count(vmxlab):
    """25.6.9: one bit an MSR, at every place of a byte."""
    bits = {(write, high, 0x1000 + 9 * place) for write, high in QUADRANTS for place in range(8)}
    indices = {0x1000 + 9 * place + step for place in range(8) for step in (-1, 0, 1)}
    reads = [Access(index + 0xC000_0000 * high) for index in sorted(indices) for high in (False, True)]
    check(vmxlab, bits, reads)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize("write", [False, True], ids=["RDMSR", "WRMSR"])
def test_msrs_outside_the_ranges_always_exit(vmxlab, write):
    """26.1.3: ECX neither in 0 to 1FFFH nor in C0000000H to C0001FFFH exits, whatever the bitmaps say."""
    check(vmxlab, set(), [Access(msr, write) for msr in OUTSIDE])


@pytest.mark.parametrize("bitmap", [None, MsrBitmap()], ids=["no-bitmap", "bitmap-not-used"])
def test_without_use_msr_bitmaps_every_access_exits(vmxlab, bitmap):
    """25.6.2, Table 25-6: with "use MSR bitmaps" 0 all executions of RDMSR and WRMSR exit."""
    msrs = (0, 0x1FFF, 0xC000_0000, 0xC000_1FFF, Msr.IA32_SYSENTER_CS, Msr.IA32_KERNEL_GS_BASE, *OUTSIDE)
    accesses = [Access(int(msr), write) for msr in msrs for write in (False, True)]
    exits = exits_of(vmxlab, bitmap, accesses, disable=PrimaryControls.USE_MSR_BITMAPS)
    assert exits == expected(ALL_BITS, accesses)


HARMLESS_WRITES = {(True, False, msr) for msr in (0x174, 0x175, 0x176)}
HARMLESS_WRITES |= {(True, True, msr & 0x1FFF) for msr in (Msr.IA32_FMASK, Msr.IA32_KERNEL_GS_BASE)}


@pytest.mark.parametrize("seed", range(2))
def test_hundreds_of_msrs_by_lot(vmxlab, seed):
    """26.1.3, for bitmaps and accesses drawn by lot: half of the reads, and a few writes, are let through."""
    lot = random.Random(seed)
    bits = {bit for bit in ALL_BITS if (bit[0] and bit not in HARMLESS_WRITES) or lot.random() < 0.5}
    accesses = [
        Access(lot.randrange(0x2000) + lot.choice((0, 0, 0x2000, 0xC000_0000, 0xC000_0000)), write)
        for write in lot.choices((False, True), weights=(3, 1), k=300)
    ]
    accesses += [Access(index + 0xC000_0000 * high, write) for write, high, index in sorted(HARMLESS_WRITES)]
    count = len(expected(bits, accesses))
    assert 100 < count < 280, "the lot left one of the two sides with next to nothing"
    check(vmxlab, bits, accesses)


# --- what an exit records ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("bitmap", [MsrBitmap.intercept_all(), None], ids=["bitmap", "no-bitmap"])
@pytest.mark.parametrize(("instruction", "length"), [("rdmsr", 2), ("wrmsr", 2), (".byte 0x3e; rdmsr", 3)])
def test_an_msr_exit_comes_before_the_instruction_does_anything(vmxlab, mode, bitmap, instruction, length):
    """26.1.1, 28.2.1, 28.2.5, 28.3: the exit is fault-like; it shows the instruction's place and length, a
    qualification of 0, and the registers, the MSR's number in ECX among them, as they were."""
    registers = {"rcx": 0x174, "rax": 0x89ABCDEF, "rdx": 0x81234567, "rbx": 0x3, "rsp": 0x7F00}
    program = f"{instruction}; hlt"
    run = vmxlab.run(Case(mode=mode, msr_bitmap=bitmap, program=program, registers=registers))
    exit_ = run.exits[0]
    assert exit_.full_reason == (ExitReason.RDMSR if "rdmsr" in instruction else ExitReason.WRMSR)
    assert (exit_.rip, exit_.instruction_length, exit_.raw_qualification) == (PROGRAM, length, 0)
    assert {name: value for name, value in exit_.registers.items() if value} == registers
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert (run.exits[1].reason, run.exits[1].rip) == (ExitReason.HLT, PROGRAM + length)


def test_only_ecx_names_the_msr(vmxlab):
    """26.1.3, and SDM Vol. 2B, RDMSR: bits 63:32 of RCX are ignored, by the bitmap and by the instruction."""
    bits = {(False, False, 0x174)}
    program = "rdmsr; mov ecx, 0x175; bts rcx, 63; rdmsr; mov ecx, 0x2000; bts rcx, 40; rdmsr; hlt"
    registers = {"rcx": 0xFFFF_FFFF_0000_0174}
    run = vmxlab.run(Case(msr_bitmap=bitmap_of(bits), program=program, registers=registers))
    assert run.reasons == [ExitReason.RDMSR, ExitReason.RDMSR, ExitReason.HLT]
    assert [e.registers["rcx"] for e in run.exits[:2]] == [0xFFFF_FFFF_0000_0174, 0x100_0000_2000]


# --- executed ----------------------------------------------------------------------------------------------

WRITE_AND_READ = "wrmsr; mov rax, -1; mov rdx, -1; rdmsr; hlt"
VALUE = 0x0000_1234_8765_4321


def write_and_read(vmxlab, msr: Msr, **case):
    """L2 writes VALUE and reads it back, all other bits 1; its state at the HLT, the only exit."""
    bitmap = MsrBitmap.intercept_all()
    bitmap.set_read_intercept(msr, False)
    bitmap.set_write_intercept(msr, False)
    high_halves = 0xAAAA_AAAA << 32
    registers = {"rcx": msr, "rax": VALUE & 0xFFFF_FFFF, "rdx": VALUE >> 32}
    registers = {name: high_halves | value for name, value in registers.items()}
    run = vmxlab.run(Case(msr_bitmap=bitmap, program=WRITE_AND_READ, registers=registers, **case))
    assert run.reasons == [ExitReason.HLT]
    after = run.exits[0].registers
    # SDM Vol. 2B, RDMSR: bits 63:32 of RAX and RDX are cleared; Vol. 2D, WRMSR: they are ignored.
    assert (after["rdx"], after["rax"]) == (VALUE >> 32, VALUE & 0xFFFF_FFFF)
    return run


@pytest.mark.parametrize(
    "msr", [Msr.IA32_STAR, Msr.IA32_LSTAR, Msr.IA32_KERNEL_GS_BASE], ids=lambda m: m.name
)
def test_an_msr_that_is_not_intercepted_is_written_and_read(vmxlab, msr):
    """26.1.3: a 0 bit lets the instruction execute. No VMCS field holds these MSRs (25.4, 25.5), so L1 finds
    in them what L2 wrote; then it puts back what was there."""
    (before,) = vmxlab.run(Case(steps=[Rdmsr(msr)])).outcomes
    run = write_and_read(vmxlab, msr, steps=(*STANDARD, Rdmsr(msr), Wrmsr(msr, before.value)))
    assert run.outcome("rdmsr").value == VALUE
    assert run.outcome("wrmsr").ok


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    ("msr", "field"),
    [
        (Msr.IA32_SYSENTER_ESP, Field.GUEST_IA32_SYSENTER_ESP),
        (Msr.IA32_SYSENTER_EIP, Field.GUEST_IA32_SYSENTER_EIP),
        (Msr.IA32_FS_BASE, Field.GUEST_FS_BASE),
        (Msr.IA32_GS_BASE, Field.GUEST_GS_BASE),
    ],
    ids=lambda value: value.name,
)
def test_an_msr_of_the_guest_state_area_is_written_and_saved(vmxlab, msr, field):
    """26.1.3 and 28.3.1: the exit saves what L2 wrote into the field of the guest-state area."""
    run = write_and_read(vmxlab, msr, watch=[field])
    assert run.exits[0].watched[field] == VALUE


def test_a_write_that_exits_is_not_executed(vmxlab):
    """26.1.1: the exit is in place of the instruction. Here reads pass and writes do not."""
    bitmap = MsrBitmap.passthrough_all()
    bitmap.set_write_intercept(Msr.IA32_SYSENTER_ESP, True)
    run = vmxlab.run(
        Case(
            msr_bitmap=bitmap,
            program=WRITE_AND_READ,
            registers={"rcx": Msr.IA32_SYSENTER_ESP, "rax": 0x5555},
            fields={Field.GUEST_IA32_SYSENTER_ESP: 0x1234_0000_5678},
        )
    )
    assert run.reasons == [ExitReason.WRMSR, ExitReason.HLT]
    assert (run.exits[1].registers["rdx"], run.exits[1].registers["rax"]) == (0x1234, 0x5678)
