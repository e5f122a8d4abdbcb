"""INS and OUTS, with and without REP: what their exits record (SDM Vol. 3C, 26.1.3 and 28.2).

An exit comes before the first element is moved. The processor tells the element's place in memory by the
guest-linear address (28.2.1) and, where IA32_VMX_BASIC[54] says so, the address size and the segment by the
VM-exit instruction information (28.2.5, Table 28-8).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vmxlab import Case, ExitReason, Field, IOBitmap, Mode
from vmxlab.cases.memory import PROGRAM

SIZES = (1, 2, 4)
REP, OPERAND_SIZE, ADDRESS_SIZE = 0xF3, 0x66, 0x67
OVERRIDES = {"es": 0x26, "cs": 0x2E, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}
"""Segment-override prefixes (SDM Vol. 2A, 2.1.1), in the order of the segments' numbers in Table 28-8."""
NUMBERS = {name: number for number, name in enumerate(OVERRIDES)}

# A mode's own address size, and the one that the address-size prefix gives (SDM Vol. 1, 3.6).
ADDRESS_SIZES = {Mode.LONG: (64, 32), Mode.PROTECTED: (32, 16), Mode.REAL: (16, 32)}
MODES = pytest.mark.parametrize(
    ("mode", "address_size"), [(m, size) for m, sizes in ADDRESS_SIZES.items() for size in sizes]
)
DIRECTIONS = pytest.mark.parametrize("is_in", [True, False], ids=["INS", "OUTS"])

PORT = 0x9ABC
DI, SI = 0x2340, 0x1234
GARBAGE = 0x1357_8765_4321_0000
"""For the bits of RDI and RSI above the address size: they don't count."""

BASES = {
    Mode.LONG: {"es": 0x20000, "ss": 0x40000, "ds": 0x50000, "fs": 0x6000_0006_0000, "gs": 0x70000},
    Mode.PROTECTED: {"es": 0x20000, "ss": 0x40000, "ds": 0x50000, "fs": 0x60000, "gs": 0xFFFF_F000},
    Mode.REAL: {"es": 0x20000, "ss": 0x40000, "ds": 0x50000, "fs": 0x60000, "gs": 0x70000},
}
"""CS, where the program is, starts at 0. GS + DI and GS + SI pass 4 GiB in 32-bit mode."""


@dataclass(frozen=True, slots=True)
class StringIo:
    """An INS or OUTS, for a mode."""

    mode: Mode
    address_size: int
    is_in: bool = True
    size: int = 1
    rep: bool = False
    override: str | None = None

    @property
    def code(self) -> bytes:
        prefixes = [REP] * self.rep
        if self.override is not None:
            prefixes.append(OVERRIDES[self.override])
        if self.address_size != ADDRESS_SIZES[self.mode][0]:
            prefixes.append(ADDRESS_SIZE)
        if self.size == (4 if self.mode is Mode.REAL else 2):
            prefixes.append(OPERAND_SIZE)
        return bytes([*prefixes, (0x6C if self.is_in else 0x6E) + (self.size > 1)])

    @property
    def raw_qualification(self) -> int:
        """Table 28-5; bit 4: string instruction, bit 5: REP; bit 6 is 0, as the port is in DX."""
        return PORT << 16 | self.rep << 5 | 1 << 4 | self.is_in << 3 | self.size - 1

    @property
    def segment(self) -> str:
        """ES for INS, whatever the prefix; DS for OUTS, unless overridden."""
        return "es" if self.is_in else self.override or "ds"

    @property
    def linear_address(self) -> int:
        """In 64-bit mode only FS and GS have a base; otherwise a linear address has 32 bits."""
        has_base = self.mode is not Mode.LONG or self.segment in ("fs", "gs")
        base = BASES[self.mode].get(self.segment, 0) if has_base else 0
        address = base + (DI if self.is_in else SI)
        return address if self.mode is Mode.LONG else address & 0xFFFF_FFFF


def segments(mode: Mode) -> dict[Field, int]:
    fields = {Field[f"GUEST_{name.upper()}_BASE"]: base for name, base in BASES[mode].items()}
    if mode is Mode.REAL:
        fields |= {Field[f"GUEST_{name.upper()}_SELECTOR"]: b >> 4 for name, b in BASES[mode].items()}
    return fields


def registers(mode: Mode, address_size: int) -> dict[str, int]:
    """As wide as the mode has them (32-bit code says nothing of the upper halves)."""
    width = 64 if mode is Mode.LONG else 32
    garbage = GARBAGE >> address_size << address_size
    values = {"rcx": garbage | 0x1003, "rdx": GARBAGE | PORT, "rsi": garbage | SI, "rdi": garbage | DI}
    return {name: value & ((1 << width) - 1) for name, value in values.items()}


def exits_of(vmxlab, accesses: list[StringIo], *, setup: bytes = b""):
    """The exits of a program that executes `setup` and then each access; what all exits share is checked."""
    mode, address_size = accesses[0].mode, accesses[0].address_size
    program = setup + b"".join(access.code for access in accesses) + b"\xf4"
    before = registers(mode, address_size)
    run = vmxlab.run(
        Case(
            mode=mode,
            io_bitmap=IOBitmap.intercept_all(),
            program=program,
            registers=before,
            fields=segments(mode),
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION] * len(accesses) + [ExitReason.HLT]
    rip = PROGRAM + len(setup)
    for exit_, access in zip(run.exits, accesses, strict=False):
        assert exit_.full_reason == ExitReason.IO_INSTRUCTION
        assert (exit_.rip, exit_.instruction_length) == (rip, len(access.code)), access
        assert {name: exit_.registers[name] for name in before} == before, access
        assert not exit_.interruption.valid
        assert not exit_.idt_vectoring.valid
        rip += len(access.code)
    assert run.exits[-1].rip == rip
    return run.exits[:-1]


def every_form(mode: Mode, address_size: int, is_in: bool) -> list[StringIo]:
    return [StringIo(mode, address_size, is_in, size, rep) for size in SIZES for rep in (False, True)]


def every_override(mode: Mode, address_size: int, is_in: bool) -> list[StringIo]:
    return [StringIo(mode, address_size, is_in, override=override) for override in (None, *OVERRIDES)]


# --- the exit qualification --------------------------------------------------------------------------------


@MODES
@DIRECTIONS
def test_a_string_access_says_size_direction_repetition_and_port(vmxlab, mode, address_size, is_in):
    """Table 28-5: bit 4 for a string instruction, bit 5 for a REP prefix, and the port that DX holds."""
    accesses = every_form(mode, address_size, is_in)
    for exit_, access in zip(exits_of(vmxlab, accesses), accesses, strict=True):
        said = exit_.qualification
        assert (said.size, said.is_in, said.rep, said.port) == (access.size, is_in, access.rep, PORT)
        assert (said.string, said.immediate_operand) == (True, False)
        assert exit_.raw_qualification == access.raw_qualification


# --- the guest-linear address ------------------------------------------------------------------------------


@MODES
@DIRECTIONS
@pytest.mark.parametrize("backward", [False, True], ids=["DF=0", "DF=1"])
def test_the_linear_address_is_that_of_the_first_element(vmxlab, mode, address_size, is_in, backward):
    """28.2.1: segment base plus (E/R)DI or (E/R)SI, as wide as the address size; the direction flag, the size
    and REP change where the instruction goes on, not where it starts."""
    accesses = every_form(mode, address_size, is_in)
    exits = exits_of(vmxlab, accesses, setup=b"\xfd" if backward else b"\xfc")
    for exit_, access in zip(exits, accesses, strict=True):
        assert exit_.guest_linear_address == access.linear_address, access
        assert bool(exit_.rflags & 1 << 10) == backward


@MODES
def test_the_segment_of_outs_can_be_overridden(vmxlab, mode, address_size):
    """28.2.1: DS for OUTS, but for a prefix. 64-bit mode gives ES, CS, SS and DS the base 0 (SDM Vol. 1,
    3.4.2.1); elsewhere the address wraps at 4 GiB, so that bits 63:32 are clear."""
    accesses = every_override(mode, address_size, is_in=False)
    for exit_, access in zip(exits_of(vmxlab, accesses), accesses, strict=True):
        assert exit_.guest_linear_address == access.linear_address, access


@MODES
def test_the_segment_of_ins_is_always_es(vmxlab, mode, address_size):
    """28.2.1, and SDM Vol. 2A, INS: a prefix can't override ES."""
    accesses = every_override(mode, address_size, is_in=True)
    for exit_, access in zip(exits_of(vmxlab, accesses), accesses, strict=True):
        assert exit_.guest_linear_address == access.linear_address, access


def test_64_bit_mode_has_64_bit_linear_addresses(vmxlab):
    """28.2.1: only outside 64-bit mode bits 63:32 are clear."""
    high = 0xFFFF_8765_4321_0123
    run = vmxlab.run(
        Case(
            io_bitmap=IOBitmap.intercept_all(),
            program="rep insb; rep outsd; hlt",
            registers={"rcx": 2, "rdx": PORT, "rdi": high, "rsi": high + 8},
        )
    )
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert [e.guest_linear_address for e in run.exits[:2]] == [high, high + 8]


# --- the instruction information ---------------------------------------------------------------------------


def needs_io_exit_info(vmxlab) -> None:
    """A.1: only with this bit does the field say anything of INS and OUTS."""
    if not vmxlab.capabilities.basic.io_exit_info:
        pytest.skip("IA32_VMX_BASIC[54] is 0: no VM-exit instruction information for INS and OUTS")


@MODES
@DIRECTIONS
def test_the_instruction_information_tells_the_address_size(vmxlab, mode, address_size, is_in):
    """Table 28-8, bits 9:7: 0, 1 and 2 are 16, 32 and 64 bits."""
    needs_io_exit_info(vmxlab)
    for exit_ in exits_of(vmxlab, every_form(mode, address_size, is_in)):
        assert exit_.raw_instruction_information >> 7 & 7 == {16: 0, 32: 1, 64: 2}[address_size]
        assert exit_.instruction_information.address_size == address_size


@MODES
def test_the_instruction_information_tells_the_segment_of_outs(vmxlab, mode, address_size):
    """Table 28-8, bits 17:15: ES 0 to GS 5. It is undefined for INS, and what an override that 64-bit mode
    ignores does to it the manual leaves open."""
    needs_io_exit_info(vmxlab)
    accesses = every_override(mode, address_size, is_in=False)
    exits = exits_of(vmxlab, accesses)
    for exit_, access in zip(exits, accesses, strict=True):
        if mode is Mode.LONG and access.override in ("es", "cs", "ss"):
            continue
        assert exit_.raw_instruction_information >> 15 & 7 == NUMBERS[access.segment], access
        assert exit_.instruction_information.segment == NUMBERS[access.segment]


# --- which of them exit ------------------------------------------------------------------------------------


@DIRECTIONS
@pytest.mark.parametrize(("port", "size"), [(0x9ABC, 1), (0x9ABB, 2), (0x9AB9, 4), (0xFFFE, 4), (0xFFFF, 2)])
def test_a_string_access_exits_by_the_same_bits(vmxlab, port, size, is_in):
    """26.1.3: INS and OUTS exit for any port of an element, and where it wraps past FFFFH."""
    bitmap = IOBitmap.passthrough_all()
    bitmap.set_intercept(0x9ABC, True)
    program = StringIo(Mode.LONG, 64, is_in, size, rep=True).code + b"\xf4"
    state = {"rcx": 2, "rdx": port, "rsi": 0x10000, "rdi": 0x10800}
    run = vmxlab.run(Case(io_bitmap=bitmap, program=program, registers=state))
    assert run.reasons == [ExitReason.IO_INSTRUCTION, ExitReason.HLT]
    assert (run.exits[0].qualification.port, run.exits[0].qualification.size) == (port, size)
    assert {name: run.exits[0].registers[name] for name in state} == state
