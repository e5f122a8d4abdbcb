"""I/O bitmaps on the processor: which ports' accesses exit (SDM Vol. 3C, 25.6.4 and 26.1.3).

What must exit is said twice: by `IOBitmap.intercepts`, and by a model of this file that knows nothing of it
(`must_exit`: a rule about one port's bit, and the ports of an access). Both must agree before the processor
is asked.

Ports whose bit is 0 are really accessed, so the ones used here are unassigned on a PC, or reading them does
nothing to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import pytest

from vmxlab import Case, ExitReason, Field, IOBitmap
from vmxlab.cases.memory import PROGRAM
from vmxlab.image.layout import IO_BITMAP_A, IO_BITMAP_B

Rule = Callable[[int], bool]
"""Whether the bit of a port is 1."""

EDGES = (0x0000, 0x7FFF, 0x8000, 0xFFFF)
SIZES = (1, 2, 4)
HLT = b"\xf4"


@dataclass(frozen=True, slots=True)
class Access:
    """IN or OUT with the port in DX."""

    port: int
    size: int = 1
    is_in: bool = True

    @property
    def instruction(self) -> bytes:
        opcode = (0xEC if self.is_in else 0xEE) + (self.size > 1)
        return bytes([0x66, opcode] if self.size == 2 else [opcode])

    @property
    def code(self) -> bytes:
        return b"\xba" + self.port.to_bytes(4, "little") + self.instruction  # MOV EDX, port

    @property
    def raw_qualification(self) -> int:
        """Table 28-5; bits 4, 5 and 6 are 0: no string instruction, no REP, operand in DX."""
        return self.port << 16 | self.is_in << 3 | self.size - 1


def must_exit(rule: Rule, access: Access) -> bool:
    ports = range(access.port, access.port + access.size)
    return any(port > 0xFFFF or rule(port) for port in ports)


def bitmap_of(rule: Rule) -> IOBitmap:
    bitmap = IOBitmap.passthrough_all()
    for bit, run in groupby(range(0x10000), rule):
        ports = list(run)
        bitmap.set_intercept_of_range(ports[0], len(ports), bit)
    return bitmap


def exits_of(vmxlab, bitmap: IOBitmap, accesses: Iterable[Access], **case) -> list[tuple[int, int, int]]:
    """(RIP, instruction length, exit qualification) of each I/O exit; the program ran to its end."""
    program = b"".join(access.code for access in accesses) + HLT
    run = vmxlab.run(Case(io_bitmap=bitmap, program=program, **case))
    *exits, last = run.exits
    assert last.reason is ExitReason.HLT
    assert last.rip == PROGRAM + len(program) - 1
    assert [e.full_reason for e in exits] == [ExitReason.IO_INSTRUCTION] * len(exits)
    return [(e.rip, e.instruction_length, e.raw_qualification) for e in exits]


def expected(rule: Rule, accesses: Iterable[Access]) -> list[tuple[int, int, int]]:
    exits = []
    rip = PROGRAM
    for access in accesses:
        length = len(access.instruction)
        rip += len(access.code)
        if must_exit(rule, access):
            exits.append((rip - length, length, access.raw_qualification))
    return exits


def check(vmxlab, rule: Rule, accesses: Iterable[Access]) -> None:
    """Bitmap, model and processor say the same of each access."""
    accesses = list(accesses)
    bitmap = bitmap_of(rule)
    for access in accesses:
        assert bitmap.intercepts(access.port, access.size) == must_exit(rule, access), access
    assert exits_of(vmxlab, bitmap, accesses) == expected(rule, accesses)


def reads_at(ports: Iterable[int]) -> list[Access]:
    return [Access(port, size) for port in ports for size in SIZES]


# --- both halves, both edges of each -----------------------------------------------------------------------


@pytest.mark.parametrize("edge", EDGES, ids=hex)
def test_the_bit_of_an_edge_is_for_that_port_alone(vmxlab, edge):
    """25.6.4: bitmap A has ports 0 to 7FFFH, bitmap B 8000H to FFFFH; each bit belongs to one port."""
    check(vmxlab, lambda port: port == edge, reads_at(EDGES))


@pytest.mark.parametrize("edge", EDGES, ids=hex)
def test_a_clear_bit_lets_that_port_alone_through(vmxlab, edge):
    """25.6.4, the other way round: all bits 1 but one. Only the 1-byte access to that port does not exit."""
    accesses = reads_at(EDGES)
    assert len(expected(lambda port: port != edge, accesses)) == len(accesses) - 1
    check(vmxlab, lambda port: port != edge, accesses)


@pytest.mark.vmx_also_on("kvm-in-bochs")
def test_a_clear_bitmap_lets_every_port_through(vmxlab):
    """26.1.3: with "use I/O bitmaps" an access exits for a 1 bit, or for wrapping; here there is neither."""
    accesses = [access for access in reads_at(EDGES) if access.port + access.size <= 0x10000]
    assert exits_of(vmxlab, IOBitmap.passthrough_all(), accesses) == []


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize("is_in", [True, False], ids=["IN", "OUT"])
@pytest.mark.parametrize("size", SIZES)
def test_a_full_bitmap_makes_every_access_exit(vmxlab, size, is_in):
    """26.1.3 and Table 28-5: the qualification holds size, direction and the port that DX names."""
    accesses = [Access(port, size, is_in) for port in (*EDGES, 0x60, 0x3F8, 0xCFC, 0x9234)]
    check(vmxlab, lambda port: True, accesses)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    ("a", "b", "exiting"),
    [
        pytest.param(IO_BITMAP_A, IO_BITMAP_B, [0x1234], id="A-and-B"),
        pytest.param(IO_BITMAP_B, IO_BITMAP_A, [0x9234], id="swapped"),
        pytest.param(IO_BITMAP_A, IO_BITMAP_A, [0x1234, 0x9234], id="one-page-for-both"),
        pytest.param(IO_BITMAP_B, IO_BITMAP_B, [], id="the-other-page-for-both"),
    ],
)
def test_each_half_is_found_by_its_own_address(vmxlab, a, b, exiting):
    """25.6.4: two fields, two addresses; a port's place in its half is the same in both."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x1234, True)
    fields = {Field.IO_BITMAP_A: a, Field.IO_BITMAP_B: b}
    exits = exits_of(vmxlab, bitmap, [Access(0x1234), Access(0x9234)], fields=fields)
    assert [qualification >> 16 for _, _, qualification in exits] == exiting


# --- accesses of more than one byte ------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("half", [0x2000, 0xA000], ids=["A", "B"])
def test_an_access_exits_if_any_covered_port_is_set(vmxlab, half, size):
    """26.1.3: any of the ports accessed counts; the port below and the one above do not.

    Every position of the bit, at every place of the first port within a byte of the bitmap.
    """
    bits = set()
    accesses = []
    for place in range(8):
        for position in range(-1, size + 1):
            port = half + len(accesses) * 0x20 + 8 + place
            accesses.append(Access(port, size))
            bits.add(port + position)
    exiting = expected(bits.__contains__, accesses)
    assert len(exiting) == 8 * size
    check(vmxlab, bits.__contains__, accesses)


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize("bit", range(0x7FFB, 0x8005), ids=hex)
def test_an_access_across_7fff_and_8000_uses_both_bitmaps(vmxlab, bit):
    """26.1.3: the bits of one access may lie at the end of A and at the start of B."""
    check(vmxlab, lambda port: port == bit, reads_at(range(0x7FFA, 0x8005)))


@pytest.mark.vmx_also_on("kvm-in-bochs")
@pytest.mark.parametrize(
    "access",
    [Access(0xFFFF, 2), Access(0xFFFD, 4), Access(0xFFFE, 4), Access(0xFFFF, 4, is_in=False)],
    ids=lambda a: f"{a.port:#x}-{a.size}",
)
def test_an_access_that_wraps_past_ffff_exits_though_the_bitmap_is_clear(vmxlab, access):
    """26.1.3: an operation that wraps around the 16-bit port space always exits."""
    assert IOBitmap.passthrough_all().intercepts(access.port, access.size)
    exits = exits_of(vmxlab, IOBitmap.passthrough_all(), [access])
    assert exits == [(PROGRAM + 5, len(access.instruction), access.raw_qualification)]


def test_the_last_accesses_that_do_not_wrap_go_by_their_bits(vmxlab):
    """26.1.3: an access that ends at FFFFH does not wrap."""
    fitting = [Access(0xFFFF), Access(0xFFFE, 2), Access(0xFFFC, 4)]
    assert exits_of(vmxlab, IOBitmap.passthrough_all(), fitting) == []
    check(vmxlab, lambda port: port == 0xFFFF, fitting)
    check(vmxlab, lambda port: port == 0xFFFB, fitting)


# --- many ports --------------------------------------------------------------------------------------------


def is_harmless(port: int) -> bool:
    """Whether anything may be written there: no device of a PC, of Bochs (8900H) or QEMU (5658H) is."""
    return port >= 0x1000 and not 0x5640 <= port < 0x5670 and not 0x88F0 <= port < 0x8910


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_ports_by_lot(vmxlab, seed):
    """25.6.4 and 26.1.3, for bitmaps and accesses drawn by lot."""
    lot = random.Random(seed)
    density = (0.1, 0.25, 0.5)[seed]
    bits = {port for port in range(0x10000) if not is_harmless(port) or lot.random() < density}
    accesses = [Access(lot.randrange(0x10000), lot.choice(SIZES), lot.random() < 0.5) for _ in range(300)]
    count = len(expected(bits.__contains__, accesses))
    assert 50 < count < 280, "the lot left one of the two sides with next to nothing"
    check(vmxlab, bits.__contains__, accesses)


# --- the other things an exit records ----------------------------------------------------------------------


@pytest.mark.parametrize("port", [0x00, 0x61, 0xFF], ids=hex)
@pytest.mark.parametrize(
    ("instruction", "size", "is_in", "length"),
    [
        ("in al, {}", 1, True, 2),
        ("in ax, {}", 2, True, 3),
        ("in eax, {}", 4, True, 2),
        ("out {}, al", 1, False, 2),
        ("out {}, ax", 2, False, 3),
        ("out {}, eax", 4, False, 2),
    ],
)
def test_an_immediate_operand_is_told_from_dx(vmxlab, port, instruction, size, is_in, length):
    """Table 28-5: bit 6 is 1 for a port in an immediate operand; DX does not matter then."""
    run = vmxlab.run(
        Case(
            io_bitmap=IOBitmap.intercept_all(),
            program=f"{instruction.format(port)}; hlt",
            registers={"rax": 0x1122334455667788, "rdx": 0xFFFF_FFFF_FFFF_9999},
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    exit_ = run.exits[0]
    qualification = exit_.qualification
    assert (qualification.port, qualification.size, qualification.is_in) == (port, size, is_in)
    assert (qualification.immediate_operand, qualification.string, qualification.rep) == (True, False, False)
    assert qualification.raw == port << 16 | 1 << 6 | is_in << 3 | size - 1
    assert exit_.instruction_length == length


def test_an_io_exit_comes_before_the_instruction_does_anything(vmxlab):
    """26.1.1 and 28.3: the exit is fault-like: RIP is that of the instruction, no register has changed; only
    DX, not EDX or RDX, names the port (SDM Vol. 2A, IN), and no event is reported (28.2.2, 28.2.4)."""
    registers = {"rax": 0x1122334455667788, "rdx": 0xDEAD_BEEF_CAFE_0060, "r15": 0x15, "rsp": 0x7F00}
    for instruction in ("in eax, dx", "out dx, eax"):
        run = vmxlab.run(
            Case(io_bitmap=IOBitmap.intercept_all(), program=f"{instruction}; hlt", registers=registers)
        )
        exit_ = run.exits[0]
        assert exit_.full_reason == ExitReason.IO_INSTRUCTION
        assert exit_.qualification.port == 0x60
        assert not exit_.qualification.immediate_operand
        assert exit_.rip == PROGRAM
        assert {name: value for name, value in exit_.registers.items() if value} == registers
        assert not exit_.interruption.valid
        assert not exit_.idt_vectoring.valid
