"""Memory as L2 sees it: segmentation, linear addresses, paging and EPT (SDM Vol. 3A, 3.4 and ch. 4, 5).

What an access does is decided whole before anything is written: all bytes are translated, then moved.
"""

from __future__ import annotations

from vmxlab.image import layout
from vmxlab.oracle.processor import paging
from vmxlab.oracle.processor.state import Fault, Mode, Processor, canonical, general_protection
from vmxlab.oracle.values import Bits, CannotTell
from vmxlab.sdm.registers import CR0, RFLAGS, Vector

# Access rights, type field: SDM Vol. 3A, table 3-1.
_CODE, _WRITABLE_OR_READABLE, _EXPAND_DOWN = 8, 2, 4


def linear_address(
    processor: Processor, segment: str, offset: int, size: int, *, write: bool = False, check: bool = True
) -> int:
    """The linear address of `size` bytes at `offset`. Raises Fault (#GP(0), #SS(0)).

    `check` False computes it without limit, type and canonicality checks: INVLPG, and what is recorded.
    """
    found = processor.segments[segment]
    if processor.mode is Mode.LONG:
        base = found.base if segment in ("fs", "gs") else 0
        linear = base + offset & (1 << 64) - 1
        if check and not (
            canonical(linear, processor.cr4) and canonical(linear + size - 1 & (1 << 64) - 1, processor.cr4)
        ):
            raise Fault(Vector.SS if segment == "ss" else Vector.GP, 0, why="non-canonical address")
        return linear
    if check:
        check_segment(processor, segment, offset, size, write=write)
    return found.base + offset & 0xFFFF_FFFF


def check_segment(processor: Processor, segment: str, offset: int, size: int, *, write: bool) -> None:
    """Type and limit checks outside 64-bit mode (SDM Vol. 3A, 5.3 and 5.5)."""
    found = processor.segments[segment]
    fault = Fault(Vector.SS if segment == "ss" else Vector.GP, 0)
    if processor.mode is Mode.REAL:
        if offset + size - 1 > found.limit:
            raise fault
        return
    if not found.usable:
        raise general_protection("the segment is unusable") if segment != "ss" else fault
    kind = found.rights & 0xF
    if kind & _CODE:
        if write or not kind & _WRITABLE_OR_READABLE:
            raise general_protection("the segment's type")
    elif write and not kind & _WRITABLE_OR_READABLE:
        raise general_protection("the segment is read-only")
    if not kind & _CODE and kind & _EXPAND_DOWN:
        top = 0xFFFF_FFFF if found.rights >> 14 & 1 else 0xFFFF
        if offset <= found.limit or offset + size - 1 > top:
            raise fault
    elif offset + size - 1 > found.limit:
        if found.limit == 0xFFFF_FFFF:
            # Vol. 3A, 5.3: with this limit such accesses may or may not fault.
            raise CannotTell("an access that passes the end of a segment of 4 GiB")
        raise fault


def check_code_limit(processor: Processor, offset: int) -> None:
    """#GP(0) for a fetch beyond the limit of CS (SDM Vol. 3A, 5.3)."""
    if offset > processor.segments["cs"].limit:
        raise general_protection("a fetch beyond the limit of CS")


def check_alignment(processor: Processor, linear: int, size: int) -> None:
    """#AC(0) (SDM Vol. 3A, 6.15): CR0.AM, RFLAGS.AC, CPL 3."""
    if processor.cr0 & CR0.AM and processor.cpl == 3 and processor.flag(RFLAGS.AC) and linear % size:
        raise Fault(Vector.AC, 0)


def read(processor: Processor, segment: str, offset: int, size: int) -> Bits:
    """Bytes that an instruction reads."""
    linear = linear_address(processor, segment, offset, size)
    check_alignment(processor, linear, size)
    return read_linear(processor, linear, size)


def write(processor: Processor, segment: str, offset: int, size: int, value: Bits) -> None:
    """Bytes that an instruction writes."""
    linear = linear_address(processor, segment, offset, size, write=True)
    check_alignment(processor, linear, size)
    write_linear(processor, linear, size, value)


def read_linear(processor: Processor, linear: int, size: int, *, implicit: bool = False) -> Bits:
    """Bytes at a linear address; `implicit`: an access of the processor's own, with supervisor rights."""
    value, known, shift = 0, 0, 0
    for address, count in _pieces(linear, size):
        machine = _memory(paging.translate(processor, address, paging.READ, implicit=implicit))
        for byte in processor.memory.read_known(machine, count):
            if byte is not None:
                value |= byte << shift
                known |= 0xFF << shift
            shift += 8
    return Bits(value, known)


def write_linear(
    processor: Processor, linear: int, size: int, value: Bits, *, implicit: bool = False
) -> None:
    """Bytes to a linear address."""
    where = [
        (_memory(paging.translate(processor, address, paging.WRITE, implicit=implicit)), count)
        for address, count in _pieces(linear, size)
    ]
    shift = 0
    for machine, count in where:
        for i in range(count):
            if value.known >> shift & 0xFF == 0xFF:
                processor.memory.write(machine + i, bytes([value.value >> shift & 0xFF]))
            else:
                processor.memory.forget(machine + i, 1)
            shift += 8


def _memory(machine: int) -> int:
    """Raise CannotTell for what is no RAM: a device answers there, and may do anything (the local APIC)."""
    if machine >= layout.MEMORY_BYTES:
        raise CannotTell(f"what lies at machine address {machine:#x}")
    return machine


def check_writable(processor: Processor, segment: str, offset: int, size: int) -> None:
    """Raise what writing there would; write nothing. For an instruction that reads first."""
    linear = linear_address(processor, segment, offset, size, write=True)
    check_alignment(processor, linear, size)
    for address, _ in _pieces(linear, size):
        paging.translate(processor, address, paging.READ_WRITE)


def fetch(processor: Processor, linear: int, size: int) -> bytes:
    """Bytes of an instruction, up to the first that is not known. Raises CannotTell where none is."""
    content = b""
    for address, count in _pieces(linear, size):
        machine = paging.translate(processor, address, paging.FETCH)
        part = processor.memory.read_known(machine, count)
        known = part.index(None) if None in part else count
        content += bytes(byte for byte in part[:known] if byte is not None)
        if known < count:
            break
    if not content:
        raise CannotTell(f"the code at linear address {linear:#x}")
    return content


def _pieces(linear: int, size: int) -> list[tuple[int, int]]:
    """An access page by page."""
    first = min(size, 4096 - linear % 4096)
    return [(linear, first)] if first == size else [(linear, first), (linear + first, size - first)]
