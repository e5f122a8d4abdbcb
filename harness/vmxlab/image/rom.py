"""The boot files: a ROM for the reset vector, and an ELF for `qemu-system-x86_64 -kernel`.

A ROM holds the monitor and the payload from its start, and the reset-vector stub (guest/boot/reset.S) in its
last kilobyte. It is mapped so that it ends at 4 GiB; QEMU takes it by `-bios`, Bochs by `romimage`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmxlab.errors import ImageError
from vmxlab.image import layout
from vmxlab.image.monitor import RESET_STUB_BYTES, Monitor

ROM_GRANULE = 64 * layout.KIB
ROM_LIMIT = 2 * layout.MIB
"""Bochs takes no larger ROM; it wants a power of two."""

_ROM_TABLE = struct.Struct("<8s8I")
_ROM_MAGIC = b"VMXLABRM"
_FOUR_GIB = 1 << 32

_ELF_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<8I")
_PT_LOAD = 1
_READ_WRITE = 6


def pack_rom(monitor: Monitor, payload: bytes = b"") -> bytes:
    """A ROM with the monitor and a payload (`frames.pack_payload`). Raises ImageError where it can't fit."""
    payload += bytes(-len(payload) % 4)
    stub = monitor.reset_stub
    if len(stub) != RESET_STUB_BYTES or not stub.startswith(_ROM_MAGIC):
        raise ImageError(
            f"the reset-vector stub is damaged: {len(stub)} bytes that start with {stub[:8]!r}",
            advice="build it again with 'make guest'",
        )
    needed = len(monitor.code) + len(payload) + len(stub)
    size = ROM_GRANULE
    while size < needed:
        size *= 2
    if size > ROM_LIMIT:
        raise ImageError(
            f"the image needs {needed} bytes; a ROM has at most {ROM_LIMIT}",
            advice="put fewer cases into one image",
        )
    base = _FOUR_GIB - size
    table = _ROM_TABLE.pack(
        _ROM_MAGIC,
        base,
        len(monitor.code),
        layout.MONITOR_BASE,
        monitor.entry,
        base + len(monitor.code),
        len(payload),
        layout.PAYLOAD_BASE,
        0,
    )
    body = monitor.code + payload
    return body + bytes(size - len(body) - len(stub)) + table + stub[_ROM_TABLE.size :]


def pack_elf(monitor: Monitor, payload: bytes = b"", *, claim_memory: bool = False) -> bytes:
    """The monitor's ELF with the payload as one more loaded segment.

    With `claim_memory` all memory that the image uses from 1 MiB on stands in the segments, so that a boot
    loader that knows what is free refuses a machine where it is not. Raises ImageError for an ELF file that
    has no room for that.
    """
    headers, contents = [], b""
    offset = len(monitor.elf) + -len(monitor.elf) % 16
    if payload:
        memory = layout.PAYLOAD_BYTES if claim_memory else len(payload)
        headers.append(_segment(offset, layout.PAYLOAD_BASE, len(payload), memory))
        contents = payload
    if claim_memory:
        end = layout.MONITOR_BASE + len(monitor.code)
        for start, stop in ((end, layout.PAYLOAD_BASE), (layout.CASE_BASE, layout.CASE_LIMIT)):
            headers.append(_segment(offset, start, 0, stop - start))
    if not headers:
        return monitor.elf
    return _with_segments(monitor.elf, headers).ljust(offset, b"\0") + contents


def _segment(offset: int, address: int, file_bytes: int, memory_bytes: int) -> bytes:
    return _PROGRAM_HEADER.pack(_PT_LOAD, offset, address, address, file_bytes, memory_bytes, _READ_WRITE, 1)


def _with_segments(elf: bytes, more: Sequence[bytes]) -> bytes:
    """The file with more program headers behind the ones it has.

    They must stay where they are: GRUB reads no others than those in the first 8 KiB.
    """
    header = list(_ELF_HEADER.unpack_from(elf))
    phoff, phentsize, phnum = header[5], header[9], header[10]
    end = phoff + phentsize * phnum
    extra = b"".join(more)
    room = elf[end : end + len(extra)]
    if phentsize != _PROGRAM_HEADER.size or any(room):
        raise ImageError(
            "the monitor's ELF file has no room for another program header",
            advice="build it again with 'make guest'",
        )
    header[10] = phnum + len(more)
    return _ELF_HEADER.pack(*header) + elf[_ELF_HEADER.size : end] + extra + elf[end + len(extra) :]
