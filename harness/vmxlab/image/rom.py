"""The boot files: a ROM for the reset vector, and an ELF for `qemu-system-x86_64 -kernel`.

A ROM holds the monitor and the payload from its start, and the reset-vector stub (guest/boot/reset.S) in its
last kilobyte. It is mapped so that it ends at 4 GiB; QEMU takes it by `-bios`, Bochs by `romimage`.
"""

from __future__ import annotations

import struct

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


def pack_elf(monitor: Monitor, payload: bytes = b"") -> bytes:
    """The monitor's ELF with the payload as one more loaded segment."""
    if not payload:
        return monitor.elf
    header = list(_ELF_HEADER.unpack_from(monitor.elf))
    phoff, phentsize, phnum = header[5], header[9], header[10]
    old = monitor.elf[phoff : phoff + phentsize * phnum]
    new_phoff = len(monitor.elf) + -len(monitor.elf) % 16
    payload_offset = new_phoff + len(old) + _PROGRAM_HEADER.size
    extra = _PROGRAM_HEADER.pack(
        _PT_LOAD,
        payload_offset,
        layout.PAYLOAD_BASE,
        layout.PAYLOAD_BASE,
        len(payload),
        len(payload),
        _READ_WRITE,
        1,
    )
    header[5], header[10] = new_phoff, phnum + 1
    body = _ELF_HEADER.pack(*header) + monitor.elf[_ELF_HEADER.size :]
    return body.ljust(new_phoff, b"\0") + old + extra + payload
