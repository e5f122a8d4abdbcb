"""Memory of a live machine: by machine addresses, and by those that L2 calls physical."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from vmxlab.cases.memory import L2_MEMORY_BYTES, machine_address
from vmxlab.errors import CaseError, OutOfRange
from vmxlab.image import layout, script
from vmxlab.structures.checks import PAGE_SIZE

if TYPE_CHECKING:
    from vmxlab.console.run import Run
    from vmxlab.structures import Ept

Send = Callable[[Sequence[bytes]], "Run"]

_READ_BYTES = 64 * 1024
_WRITE_BYTES = 256 * 1024
_PATTERN_BYTES = 512
"""From this length on a write looks for fills and sequences, which travel in fewer bytes."""

_ADDRESS_BITS = 64


class Memory(ABC):
    """Bytes by address: `memory[0x1000]`, `memory[0x1000:0x1010]`, and both assigned to; words by methods.

    Addresses and lengths are in bytes, words are little-endian. Raises L1Fault for memory that is not there.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    @abstractmethod
    def _pieces(self, address: int, length: int, *, write: bool) -> Iterator[tuple[int, int]]:
        """The range as (machine address, length). Raises OutOfRange or CaseError for what may not be."""

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from `address` on."""
        _check(address, length)
        pieces = list(_cut(self._pieces(address, length, write=False), _READ_BYTES))
        return b"".join(self._send([script.report_memory(at, size)]).memory[at] for at, size in pieces)

    def write(self, address: int, data: bytes) -> None:
        """Put `data` at `address`."""
        for part in self.parts(address, data):
            self._send(part)

    def parts(self, address: int, data: bytes) -> list[list[bytes]]:
        """The operations that put `data` at `address`, in as many scripts as it takes."""
        _check(address, len(data))
        parts = []
        for at, size in _cut(self._pieces(address, len(data), write=True), _WRITE_BYTES):
            content, data = data[:size], data[size:]
            parts.append(store(at, content))
        return parts

    def read_u8(self, address: int) -> int:
        """A byte."""
        return self._word(address, 1)

    def read_u16(self, address: int) -> int:
        """A word of 16 bits."""
        return self._word(address, 2)

    def read_u32(self, address: int) -> int:
        """A word of 32 bits."""
        return self._word(address, 4)

    def read_u64(self, address: int) -> int:
        """A word of 64 bits."""
        return self._word(address, 8)

    def write_u8(self, address: int, value: int) -> None:
        """A byte. OutOfRange for a wider value, as in the others."""
        self._write_word(address, value, 1)

    def write_u16(self, address: int, value: int) -> None:
        """A word of 16 bits."""
        self._write_word(address, value, 2)

    def write_u32(self, address: int, value: int) -> None:
        """A word of 32 bits."""
        self._write_word(address, value, 4)

    def write_u64(self, address: int, value: int) -> None:
        """A word of 64 bits."""
        self._write_word(address, value, 8)

    @overload
    def __getitem__(self, where: int) -> int: ...
    @overload
    def __getitem__(self, where: slice) -> bytes: ...
    def __getitem__(self, where: int | slice) -> int | bytes:
        """A byte by its address, or the bytes of a slice with both ends."""
        if isinstance(where, slice):
            return self.read(*_range(where))
        return self.read_u8(where)

    @overload
    def __setitem__(self, where: int, value: int) -> None: ...
    @overload
    def __setitem__(self, where: slice, value: bytes) -> None: ...
    def __setitem__(self, where: int | slice, value: int | bytes) -> None:
        """Write a byte, or exactly as many bytes as the slice has."""
        if isinstance(where, slice):
            if isinstance(value, int):
                raise CaseError("a slice of memory is given bytes", advice="bytes(8) are eight zeros")
            start, length = _range(where)
            if length != len(value):
                raise CaseError(f"{len(value)} bytes do not fit a slice of {length} bytes")
            self.write(start, bytes(value))
        elif isinstance(value, int):
            self.write_u8(where, value)
        else:
            raise CaseError(
                "one byte of memory is given a number", advice="memory[a:b] = bytes, or write(a, b)"
            )

    def _word(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), "little")

    def _write_word(self, address: int, value: int, size: int) -> None:
        if not 0 <= value < 1 << 8 * size:
            raise OutOfRange(f"value for memory at {address:#x}", value, f"{8 * size} bits")
        self.write(address, value.to_bytes(size, "little"))


class MachineMemory(Memory):
    """The machine's memory, by its physical addresses, which are L1's linear ones too.

    All of it can be read. What lies below `vmxlab.image.layout.CASE_BASE` is the monitor's own: a write there
    is refused.
    """

    def _pieces(self, address: int, length: int, *, write: bool) -> Iterator[tuple[int, int]]:
        if write and address < layout.CASE_BASE:
            raise _of_the_monitor(f"machine address of a write ({length:#x} bytes)", address)
        yield address, length


class GuestMemory(Memory):
    """Memory by L2-physical addresses, through the EPT as Python has it, whatever rights it gives.

    Without EPT these are L2's linear addresses, which its page tables map to its 128 KiB.
    """

    def __init__(self, send: Send, ept: Callable[[], Ept | None]) -> None:
        super().__init__(send)
        self._ept = ept

    def _pieces(self, address: int, length: int, *, write: bool) -> Iterator[tuple[int, int]]:
        ept = self._ept()
        if ept is None:
            if address + length > L2_MEMORY_BYTES:
                raise OutOfRange(
                    f"L2 address ({length:#x} bytes)",
                    address,
                    f"L2 has {L2_MEMORY_BYTES:#x} bytes, without EPT",
                )
            yield machine_address(address), length
            return
        end = address + length
        while address < end:
            translation = ept.translate(address)
            if translation is None:
                raise CaseError(
                    f"EPT does not map L2-physical address {address:#x}",
                    advice="vm.ept.map(...) does; vm.ept.tree()",
                )
            size = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
            if write and translation.hpa < layout.CASE_BASE:
                what = f"machine address behind L2-physical address {address:#x}"
                raise _of_the_monitor(what, translation.hpa)
            yield translation.hpa, size
            address += size


def _of_the_monitor(what: str, address: int) -> OutOfRange:
    return OutOfRange(
        what,
        address,
        f"the monitor and its buffers lie below {layout.CASE_BASE:#x}",
        advice=f"L2's memory is at {machine_address(0):#x}; from {layout.FREE_PAGES:#x} on all is free",
    )


def store(address: int, content: bytes) -> list[bytes]:
    """The operations that put bytes into memory, in few of them where there is a pattern."""
    if len(content) >= _PATTERN_BYTES:
        return script.page(address, content)
    return [script.data(address, content)] if content else []


def _cut(pieces: Iterator[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Adjoining pieces joined, long ones cut."""
    joined: list[tuple[int, int]] = []
    for address, length in pieces:
        if joined and sum(joined[-1]) == address:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((address, length))
    for address, length in joined:
        for offset in range(0, length, most):
            yield address + offset, min(most, length - offset)


def _check(address: int, length: int) -> None:
    if address < 0 or length < 0 or address + length > 1 << _ADDRESS_BITS:
        raise OutOfRange("address", address, f"{length:#x} bytes from there must be in {_ADDRESS_BITS} bits")


def _range(where: slice) -> tuple[int, int]:
    if where.start is None or where.stop is None or where.step is not None:
        raise CaseError("a slice of memory has both ends and no step", advice="memory[0x1000:0x1010]")
    if where.stop < where.start:
        raise CaseError(f"a slice of memory ends at {where.stop:#x}, before its start {where.start:#x}")
    return where.start, where.stop - where.start
