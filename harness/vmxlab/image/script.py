"""Writing scripts: each function gives the bytes of one operation (`vmxlab.image.protocol.Op`)."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

from vmxlab.cases import reactions as r
from vmxlab.cases.sweep import REASONS, U64_MASK, Sweep
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.image.protocol import ENTER_RESUME, ENTER_WITHOUT_VMCS_REPORT, OP_GO_ON, Action, Op
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import GENERAL_REGISTERS

EXIT_REASONS = 128
"""Size of the table of default actions."""

MAX_ACTION_BYTES = 0xFFFF

_MIN_SEQUENCE = 4


def op(code: Op, *, go_on: bool = False) -> bytes:
    """The first byte of an operation."""
    return bytes([code | OP_GO_ON if go_on else code])


def case(number: int, name: str) -> bytes:
    """Start of a case."""
    text = name.encode("ascii")
    return op(Op.CASE) + struct.pack("<IB", number, len(text)) + text


def live(number: int) -> bytes:
    """Start of a live command."""
    return op(Op.LIVE) + struct.pack("<I", number)


def fill(address: int, length: int, value: int = 0) -> bytes:
    """`length` bytes of `value`."""
    return op(Op.FILL) + struct.pack("<QIB", address, length, value)


def data(address: int, content: bytes) -> bytes:
    """Bytes as they are."""
    return op(Op.DATA) + struct.pack("<QI", address, len(content)) + content


def sequence(address: int, count: int, first: int, stride: int) -> bytes:
    """`count` 64-bit values from `first` in steps of `stride`."""
    return op(Op.SEQUENCE) + struct.pack("<QIQQ", address, count, first, stride)


def revision(address: int, flags: int = 0) -> bytes:
    """The processor's VMCS revision identifier at `address`, with flags (bit 31: shadow VMCS)."""
    return op(Op.REVISION) + struct.pack("<QI", address, flags)


def code(bits: int, base: int, linear: int, address: int, length: int) -> bytes:
    """Have L2's code reported: it lies at `address` in the machine and at `linear` for L2; CS has `base`."""
    return op(Op.CODE) + struct.pack("<BQQQI", bits, base, linear, address, length)


def with_u64(code: Op, *values: int, go_on: bool = False) -> bytes:
    """An operation whose operands are 64-bit values."""
    return op(code, go_on=go_on) + struct.pack(f"<{len(values)}Q", *values)


def with_u32(code: Op, value: int, *, go_on: bool = False) -> bytes:
    """An operation with one 32-bit operand."""
    return op(code, go_on=go_on) + struct.pack("<I", value)


def wrmsr(msr: int, value: int, *, go_on: bool = False) -> bytes:
    """WRMSR in L1."""
    return op(Op.WRMSR, go_on=go_on) + struct.pack("<IQ", msr, value)


def apic_write(register: int, value: int) -> bytes:
    """Write a register of L1's local APIC."""
    return op(Op.APIC_WRITE) + struct.pack("<II", register, value)


def vmwrites(values: Sequence[tuple[int, int]], *, go_on: bool = False) -> list[bytes]:
    """VMWRITEs, as units: the header and one unit for each field."""
    head = op(Op.VMWRITES, go_on=go_on) + struct.pack("<H", len(values))
    return [head, *(struct.pack("<IQ", field, value) for field, value in values)]


def registers(values: Mapping[str, int]) -> bytes:
    """L2's general registers."""
    indices = sorted((GENERAL_REGISTERS.index(name), value) for name, value in values.items())
    mask = sum(1 << index for index, _ in indices)
    return op(Op.REGISTERS) + struct.pack(f"<H{len(indices)}Q", mask, *(value for _, value in indices))


def watch(fields: Sequence[Field]) -> bytes:
    """Fields that every exit record shows as well."""
    return op(Op.WATCH) + struct.pack(f"<B{len(fields)}I", len(fields), *fields)


def enter(*, resume: bool, max_exits: int, report_vmcs: bool = True, go_on: bool = False) -> bytes:
    """VM entry and all that follows."""
    how = (ENTER_RESUME if resume else 0) | (0 if report_vmcs else ENTER_WITHOUT_VMCS_REPORT)
    return op(Op.ENTER, go_on=go_on) + struct.pack("<BI", how, max_exits)


def cpuid(leaf: int, subleaf: int) -> bytes:
    """CPUID in L1."""
    return op(Op.CPUID) + struct.pack("<II", leaf, subleaf)


def snapshot(*, all_: bool, go_on: bool = False) -> bytes:
    """Have the VMCS and L2's registers reported: all of them, or what is not as in the last snapshot."""
    return op(Op.SNAPSHOT, go_on=go_on) + bytes([all_])


def report_memory(address: int, length: int) -> bytes:
    """Have memory reported."""
    return op(Op.MEMORY) + struct.pack("<QI", address, length)


def sweep(step: Sweep, bits: int) -> bytes:
    """A sweep (guest/monitor/sweep.c); `bits`: machine address of the bitmap it walks over, 0 for none."""
    go_on = sum(1 << reason for reason in range(REASONS) if reason not in step.stop)
    walk = step.walk
    return (
        op(Op.SWEEP, go_on=step.go_on)
        + struct.pack(
            "<BBBQQQQQQIIQIIB",
            step.resume,
            step.report_all,
            GENERAL_REGISTERS.index(step.register),
            go_on & U64_MASK,
            go_on >> 64,
            step.rip,
            step.first,
            step.stride,
            step.mask,
            step.count,
            step.block,
            bits,
            walk.first if walk else 0,
            walk.stride if walk else 0,
            walk.value if walk else 0,
        )
        + struct.pack("<BBB", len(step.offsets), len(step.fields), len(step.exception_fields))
        + struct.pack(f"<{len(step.offsets)}Q", *(offset & U64_MASK for offset in step.offsets))
        + struct.pack(f"<{len(step.fields)}I", *step.fields)
        + struct.pack(f"<{len(step.exception_fields)}I", *step.exception_fields)
    )


_DEFAULT_CODES = {r.Skip: Action.SKIP, r.Resume: Action.RESUME, r.Stop: Action.STOP}


@lru_cache(maxsize=1)
def defaults() -> bytes:
    """The table of default actions."""
    table = bytearray(EXIT_REASONS)
    for reason, action in r.DEFAULT_ACTIONS.items():
        table[reason] = _DEFAULT_CODES[action]
    return op(Op.DEFAULTS) + bytes(table)


def reaction(what: r.Reaction, eptp: int | None) -> bytes:
    """A reaction; `eptp` is the case's own, for an INVEPT that names none."""
    actions = b"".join(_action(action, eptp) for action in what.actions)
    if len(actions) > MAX_ACTION_BYTES:
        raise OutOfRange("size of a reaction's actions", len(actions), f"{MAX_ACTION_BYTES:#x} bytes")
    return (
        op(Op.REACTION)
        + struct.pack(
            "<HIIQQH",
            what.reason,
            what.from_match,
            what.match_count,
            what.qualification_mask,
            what.qualification_value,
            len(actions),
        )
        + actions
    )


def _action(action: r.Act, eptp: int | None) -> bytes:
    match action:
        case r.SetRegister(name, value):
            return struct.pack("<BBQ", Action.SET_REGISTER, GENERAL_REGISTERS.index(name), value)
        case r.SetField(field, value):
            return struct.pack("<BIQ", Action.SET_FIELD, field, value)
        case r.SetMemory(address, content):
            return struct.pack("<BQI", Action.SET_MEMORY, address, len(content)) + content
        case r.InveptAction(kind, own):
            chosen = eptp if own is None else own
            if chosen is None:
                raise CaseError("a reaction executes INVEPT, but the case runs without EPT and names no EPTP")
            return struct.pack("<BQQ", Action.INVEPT, kind, chosen)
        case r.WriteApic(register, value):
            return struct.pack("<BII", Action.APIC_WRITE, register, value)
        case r.Skip():
            return bytes([Action.SKIP])
        case r.Resume():
            return bytes([Action.RESUME])
        case r.Stop():
            return bytes([Action.STOP])


def page(address: int, content: bytes, *, zeroed: bool = False) -> list[bytes]:
    """A range of memory in as few bytes as its pattern allows: fills, sequences, data.

    Where the memory is `zeroed` already, zeros are left out.
    """
    parts = _page_parts(bytes(content), zeroed)
    return [_at(address + offset, kind, rest) for offset, kind, rest in parts]


def _at(address: int, kind: Op, rest: bytes) -> bytes:
    return op(kind) + struct.pack("<Q", address) + rest


@lru_cache(maxsize=1024)
def _page_parts(content: bytes, zeroed: bool) -> tuple[tuple[int, Op, bytes], ...]:
    return tuple(_parts(content, zeroed))


def _parts(content: bytes, zeroed: bool) -> Iterator[tuple[int, Op, bytes]]:
    """(offset, operation, operands behind the address). One fill first, then what differs from it."""
    background = 0 if zeroed else max((0x00, 0xFF), key=content.count)
    if not zeroed:
        yield 0, Op.FILL, struct.pack("<IB", len(content), background)
    for start, end in _differing(content, background):
        yield from _run_parts(content, start, end)


def _differing(content: bytes, background: int) -> Iterable[tuple[int, int]]:
    """8-byte aligned ranges that hold anything but the background."""
    words = [content[i : i + 8] for i in range(0, len(content), 8)]
    plain = bytes([background]) * 8
    start: int | None = None
    for index, word in enumerate(words):
        if word == plain[: len(word)]:
            if start is not None:
                yield start * 8, index * 8
                start = None
        elif start is None:
            start = index
    if start is not None:
        yield start * 8, len(content)


def _run_parts(content: bytes, start: int, end: int) -> Iterator[tuple[int, Op, bytes]]:
    """A range as sequences of 64-bit values where it has them, else as data."""
    whole = (end - start) // 8
    values = array("Q", content[start : start + whole * 8])
    literal_from = start
    index = 0
    while index + 1 < whole:
        stride = values[index + 1] - values[index]
        last = index + 1
        while last + 1 < whole and values[last + 1] - values[last] == stride:
            last += 1
        count = last - index + 1
        if count >= _MIN_SEQUENCE:
            here = start + index * 8
            if literal_from < here:
                yield (
                    literal_from,
                    Op.DATA,
                    struct.pack("<I", here - literal_from) + content[literal_from:here],
                )
            yield here, Op.SEQUENCE, struct.pack("<IQQ", count, values[index], stride % (1 << 64))
            index = last + 1
            literal_from = start + index * 8
        else:
            index = last
    if literal_from < end:
        yield literal_from, Op.DATA, struct.pack("<I", end - literal_from) + content[literal_from:end]
