"""What `vmxlab sweep` asks: all ports and all MSRs, with bitmaps of every kind.

An access that is not intercepted is really made, so the questions let through only what does the machine no
harm. What that is stands in the tables of this page, each entry with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vmxlab.cases.sweep import Instruction, Question
from vmxlab.sdm.msrs import Msr
from vmxlab.structures import IOBitmap, MsrBitmap

PORTS = 0x1_0000
LOW_MSRS, HIGH_MSRS = 0x0000_0000, 0xC000_0000
MSRS_IN_A_RANGE = 0x2000


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Ports that are never really read: their bits are 1 in every bitmap."""

    ports: range
    why: str

    def __str__(self) -> str:
        return f"ports {self.ports[0]:#x} to {self.ports[-1]:#x} are always intercepted: {self.why}"


HARMFUL_READS = (
    LeftOut(
        range(0x3F8, 0x400),
        "the UART that the harness talks over; reading it eats input and clears what its driver looks at",
    ),
)

# Every other port can be read. What that changes in a PC nobody looks at here: the keyboard's output buffer
# (60H), flip-flops of the DMA controllers and of the VGA (3DAH), interrupts pending in the real-time clock
# (71H) and the disks (1F7H, 177H), all masked. The backdoor of VMware (5658H) wants a magic number in EAX,
# which is 0.

HARMLESS_WRITES: Mapping[int, str] = {
    0x80: "POST codes; written by every system to pass time",
    0x84: "a DMA page register that belongs to no channel",
    0x85: "a DMA page register that belongs to no channel",
    0x86: "a DMA page register that belongs to no channel",
    0x88: "a DMA page register that belongs to no channel",
    0x8C: "a DMA page register that belongs to no channel",
    0x8D: "a DMA page register that belongs to no channel",
    0x8E: "a DMA page register that belongs to no channel",
    0xED: "decoded by nothing; Linux passes time with it where 80H is in use",
}
"""Ports at which 0 can be written."""

HARMLESS_MSR_WRITES: Mapping[int, str] = {
    Msr.IA32_SYSENTER_CS: "loaded by each VM entry and each VM exit",
    Msr.IA32_SYSENTER_ESP: "loaded by each VM entry and each VM exit",
    Msr.IA32_SYSENTER_EIP: "loaded by each VM entry and each VM exit",
    Msr.IA32_STAR: "used by SYSCALL, which nobody executes",
    Msr.IA32_LSTAR: "used by SYSCALL, which nobody executes",
    Msr.IA32_FMASK: "used by SYSCALL, which nobody executes",
    Msr.IA32_FS_BASE: "loaded by each VM entry and each VM exit",
    Msr.IA32_GS_BASE: "loaded by each VM entry and each VM exit",
    Msr.IA32_KERNEL_GS_BASE: "used by SWAPGS, which nobody executes",
}
"""MSRs to which 0 can be written. (A read of any MSR gives a value or #GP.)"""

QUICK_STRIDE = 61
"""A quick round asks every so many-th value: a prime, so that all bits of a byte get their turn."""


def io_questions(seed: int = 0, *, quick: bool = False) -> list[Question]:
    """All ports, by IN and OUT of each size."""
    return _finish(_io(seed), quick)


def msr_questions(seed: int = 0, *, quick: bool = False) -> list[Question]:
    """All MSRs of both ranges and a sample outside, by RDMSR and WRMSR."""
    return _finish(_msr(seed), quick)


KINDS: Mapping[str, Callable[..., list[Question]]] = {"io": io_questions, "msr": msr_questions}
"""What can be swept, by the names of the command line."""

_IN = (Instruction.IN_AL, Instruction.IN_AX, Instruction.IN_EAX)
_OUT = (Instruction.OUT_AL, Instruction.OUT_AX, Instruction.OUT_EAX)


def _finish(questions: Iterable[Question], quick: bool) -> list[Question]:
    if not quick:
        return list(questions)
    return [_thin(question) if question.count > MSRS_IN_A_RANGE // 16 else question for question in questions]


def _thin(question: Question) -> Question:
    stride = question.stride * QUICK_STRIDE
    return replace(question, stride=stride, count=(question.count - 1) // QUICK_STRIDE + 1)


# --- ports -------------------------------------------------------------------------------------------------


def safe_io_bitmap(content: bytes | None = None) -> IOBitmap:
    """A bitmap of these 8 KiB (None: all bits 0), less what reads may not touch: those bits are 1."""
    bitmap = IOBitmap.passthrough_all() if content is None else IOBitmap.from_bytes(content)
    for left_out in HARMFUL_READS:
        bitmap.set_intercept_of_range(left_out.ports.start, len(left_out.ports), True)
    return bitmap


def _io(seed: int) -> Iterator[Question]:
    whole, clear = IOBitmap.intercept_all(), safe_io_bitmap()
    chance = safe_io_bitmap(random.Random(seed).randbytes(PORTS // 8))

    def ports(instruction: Instruction, bitmap: IOBitmap | None, what: str, **more: object) -> Question:
        name = f"{instruction.name.lower().replace('_', '-')}-{what}"
        about: dict[str, object] = {"first": 0, "count": PORTS} | more
        return Question(name=name, instruction=instruction, io_bitmap=bitmap, **about)  # type: ignore[arg-type]

    for instruction in (*_IN, *_OUT):
        yield ports(instruction, whole, "all-set")
    for instruction in _IN:
        yield ports(instruction, clear, "all-clear")
    # One after the other: a bitmap that the machine has got already is not sent again.
    for instruction in _IN:
        yield ports(instruction, chance, f"random-{seed}")
    yield ports(
        Instruction.IN_AL, chance, "upper-rdx", high=0xFEDC_BA98_7654_0000, stride=3, count=PORTS // 3
    )
    yield from _harmless_outs(ports)
    # Without bitmaps every access exits: that needs no bits, but all of the port in the qualification.
    yield ports(Instruction.IN_AL, None, "unconditional")
    yield ports(Instruction.OUT_AL, None, "unconditional")
    for instruction in (*_IN[1:], *_OUT[1:]):
        yield ports(instruction, None, "unconditional", stride=17, count=PORTS // 17 + 1)
    # One bit set at a time: an access exits if it covers that port, and its neighbours do not.
    yield ports(Instruction.IN_AL, clear, "one-set", walk=True, offsets=(-1, 0, 1))
    for instruction, offsets in ((Instruction.IN_AX, (-2, -1, 0, 1)), (Instruction.IN_EAX, (-4, -3, 0, 1))):
        yield ports(
            instruction, clear, "one-set", walk=True, offsets=offsets, stride=7, count=(PORTS - 1) // 7 + 1
        )
    for start, count in _readable_ranges():
        yield ports(
            Instruction.IN_AL,
            whole,
            f"one-clear-from-{start:#x}",
            walk=False,
            offsets=(-1, 0, 1),
            first=start,
            count=count,
        )


def _harmless_outs(ports: Callable[..., Question]) -> Iterator[Question]:
    """OUT at ports that can be written, and around them."""
    bitmap = IOBitmap.intercept_all()
    for port in HARMLESS_WRITES:
        bitmap.set_intercept(port, False)
    first = min(HARMLESS_WRITES) - 4
    for instruction in _OUT:
        yield ports(
            instruction, bitmap, "harmless-clear", first=first, count=max(HARMLESS_WRITES) + 5 - first
        )


def _readable_ranges() -> Iterator[tuple[int, int]]:
    """(first, count) of the ports between those that are left out."""
    start = 0
    for left_out in sorted(HARMFUL_READS, key=lambda each: each.ports.start):
        yield start, left_out.ports.start - start
        start = left_out.ports.stop
    yield start, PORTS - start


# --- MSRs --------------------------------------------------------------------------------------------------

_RANGES = ((LOW_MSRS, "low"), (HIGH_MSRS, "high"))
_BOTH = (Instruction.RDMSR, Instruction.WRMSR)


def _msr(seed: int) -> Iterator[Question]:
    def msrs(
        instruction: Instruction, bitmap: MsrBitmap | None, what: str, **more: object
    ) -> Iterator[Question]:
        for first, name in _RANGES:
            yield Question(
                name=f"{instruction.name.lower()}-{name}-{what}",
                instruction=instruction,
                first=first,
                count=MSRS_IN_A_RANGE,
                msr_bitmap=bitmap,
                **more,  # type: ignore[arg-type]
            )

    whole, clear = MsrBitmap.intercept_all(), safe_msr_bitmap()
    chance = safe_msr_bitmap(random.Random(seed).randbytes(4096))
    for instruction in _BOTH:
        yield from msrs(instruction, whole, "all-set")
        # Bits of the own direction decide: of the other one they are the opposite here.
        yield from msrs(instruction, _one_direction(instruction), "own-direction-set")
        yield from msrs(instruction, None, "no-bitmaps")
        yield from _outside(instruction, clear, seed)
        yield from msrs(instruction, clear, "all-clear")
    for instruction in _BOTH:
        yield from msrs(instruction, chance, f"random-{seed}")
    yield from msrs(Instruction.RDMSR, chance, "upper-rcx", high=0xFEDC_BA98_0000_0000)
    yield from msrs(Instruction.RDMSR, clear, "one-set", walk=True, offsets=(-1, 0, 1))
    yield from msrs(Instruction.RDMSR, whole, "one-clear", walk=False, offsets=(-1, 0, 1))


def safe_msr_bitmap(content: bytes | None = None) -> MsrBitmap:
    """A bitmap of these 4 KiB (None: all bits 0), but with bits of WRMSR 0 for HARMLESS_MSR_WRITES alone."""
    bitmap = MsrBitmap.passthrough_all() if content is None else MsrBitmap.from_bytes(content)
    may_be_clear = {msr for msr in HARMLESS_MSR_WRITES if not bitmap.intercepts(msr, write=True)}
    for first, _ in _RANGES:
        bitmap.set_write_intercept_of_range(first, MSRS_IN_A_RANGE, True)
    for msr in may_be_clear:
        bitmap.set_write_intercept(msr, False)
    return bitmap


def _one_direction(instruction: Instruction) -> MsrBitmap:
    bitmap = MsrBitmap.passthrough_all()
    for first, _ in _RANGES:
        if instruction is Instruction.RDMSR:
            bitmap.set_read_intercept_of_range(first, MSRS_IN_A_RANGE, True)
        else:
            bitmap.set_write_intercept_of_range(first, MSRS_IN_A_RANGE, True)
    return bitmap


def _outside(instruction: Instruction, bitmap: MsrBitmap, seed: int) -> Iterator[Question]:
    """MSRs without a bit: at the edges of both ranges, where hypervisors have theirs, and all over."""
    spread = random.Random(seed)
    first = spread.randrange(MSRS_IN_A_RANGE, 1 << 20)
    stride = spread.randrange(1 << 20, ((1 << 32) - first) // 256)
    samples: Sequence[tuple[int, int, int]] = (
        (MSRS_IN_A_RANGE, 64, 1),
        (HIGH_MSRS - 64, 64, 1),
        (HIGH_MSRS + MSRS_IN_A_RANGE, 64, 1),
        (0x4000_0000, 256, 1),
        ((1 << 32) - 64, 64, 1),
        (first, 256, stride),
    )
    for start, count, step in samples:
        yield Question(
            name=f"{instruction.name.lower()}-outside-from-{start:#x}",
            instruction=instruction,
            first=start,
            count=count,
            stride=step,
            msr_bitmap=bitmap,
        )
