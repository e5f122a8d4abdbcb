"""Frames: how a script travels, in an image's payload and over the serial line.

A frame is a header and operations that make the script out of the one before it: copies from there, and
literal bytes. Cases differ little from each other, so a frame is mostly copies, and a thousand cases fit
into a ROM. guest/monitor/payload.c reads them.

    frame    bytes of the operations u32, bytes of the script u32, CRC-32 of the operations u32, CRC-32 of the
             frame whose script is copied from u32 (0: of none), operations
    operation varint (length << 1 | is copy); a literal is followed by its bytes, a copy by a zigzag varint:
             its distance in the old script from where the last operation left off
    payload  magic u32, version u32, cases u32, bytes of all frames u32, their CRC-32 u32, flags u32, frames
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vmxlab.errors import ImageError
from vmxlab.image import layout
from vmxlab.image.protocol import PAYLOAD_MAGIC, PAYLOAD_WAITS, PROTOCOL_VERSION

FRAME_HEADER = struct.Struct("<IIII")
PAYLOAD_HEADER = struct.Struct("<IIIIII")

# A copy costs two to four bytes: shorter runs are cheaper as literals.
_CHUNK = 32

Units = Sequence[bytes]
"""A script in pieces that are likely to stand in the next script too: its operations, or parts of them."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, and what the next one needs to be a difference to it."""

    units: Units
    data: bytes
    """Header and operations, as they travel."""
    crc32: int


def encode_frame(units: Units, previous: Frame | None = None) -> Frame:
    """The frame of a script; with `previous`, as a difference to it."""
    length = sum(map(len, units))
    if length > layout.SCRIPT_BUFFER_BYTES:
        raise ImageError(
            f"a case needs a script of {length} bytes; the monitor takes {layout.SCRIPT_BUFFER_BYTES}",
            advice="fewer or smaller pages in one case",
        )
    operations = b"".join(_operations(units, previous.units if previous else ()))
    crc = zlib.crc32(operations)
    base = previous.crc32 if previous else 0
    return Frame(units, FRAME_HEADER.pack(len(operations), length, crc, base) + operations, crc)


def decode_frame(frame: bytes, previous: bytes = b"") -> bytes:
    """The script of a frame, given the script it is a difference to.

    Raises ImageError where the frame is cut or damaged.
    """
    try:
        count, length, crc, base = FRAME_HEADER.unpack_from(frame)
        operations = frame[FRAME_HEADER.size :]
        if len(operations) != count:
            raise ImageError(f"a frame of {count} bytes is cut short: {len(operations)} are there")
        if zlib.crc32(operations) != crc:
            raise ImageError("a frame is damaged: its checksum does not fit")
        script = _apply(operations, previous if base else b"")
    except (struct.error, IndexError) as error:
        raise ImageError(f"a frame is cut short: {error}") from error
    if len(script) != length:
        raise ImageError(f"a frame makes a script of {len(script)} bytes and says {length}")
    return script


def pack_payload(scripts: Iterable[Units], *, wait: bool = False) -> bytes:
    """All scripts of an image, each a difference to the one before.

    With `wait` they don't run when it boots: the prompt has them.
    """
    frames: list[bytes] = []
    previous: Frame | None = None
    for units in scripts:
        previous = encode_frame(units, previous)
        frames.append(previous.data)
    body = b"".join(frames)
    if PAYLOAD_HEADER.size + len(body) > layout.PAYLOAD_BYTES:
        raise ImageError(
            f"the cases need {len(body)} bytes; an image has room for {layout.PAYLOAD_BYTES}",
            advice="put fewer cases into one image",
        )
    flags = PAYLOAD_WAITS if wait else 0
    checksum = zlib.crc32(body)
    header = (PAYLOAD_MAGIC, PROTOCOL_VERSION, len(frames), len(body), checksum, flags)
    return PAYLOAD_HEADER.pack(*header) + body


def _chunks(units: Units) -> Iterator[bytes]:
    for unit in units:
        for start in range(0, len(unit), _CHUNK):
            yield unit[start : start + _CHUNK]


def _operations(units: Units, previous: Units) -> Iterator[bytes]:
    where: dict[bytes, int] = {}
    offset = 0
    for chunk in _chunks(previous):
        where.setdefault(chunk, offset)
        offset += len(chunk)
    old = b"".join(previous)
    source = 0  # where the last operation left off in the old script
    literal = bytearray()
    copy_from, copy_bytes = 0, 0

    def flush() -> Iterator[bytes]:
        nonlocal source, copy_bytes
        if literal:
            yield _varint(len(literal) << 1) + literal
            source += len(literal)
            literal.clear()
        if copy_bytes:
            yield _varint(copy_bytes << 1 | 1) + _varint(_zigzag(copy_from - source))
            source = copy_from + copy_bytes
            copy_bytes = 0

    for chunk in _chunks(units):
        following = copy_from + copy_bytes if copy_bytes else source + len(literal)
        if old[following : following + len(chunk)] == chunk:
            found: int | None = following
        else:
            found = where.get(chunk)
        if found is not None and copy_bytes and found == copy_from + copy_bytes:
            copy_bytes += len(chunk)
        elif found is not None and len(chunk) > 4:
            if copy_bytes:
                yield from flush()
            copy_from, copy_bytes = found, len(chunk)
        else:
            if copy_bytes:
                yield from flush()
            literal += chunk
    yield from flush()


def _apply(operations: bytes, old: bytes) -> bytes:
    script = bytearray()
    position = source = 0
    while position < len(operations):
        operation, position = _read_varint(operations, position)
        length = operation >> 1
        if operation & 1:
            zigzag, position = _read_varint(operations, position)
            source += (zigzag >> 1) ^ -(zigzag & 1)
            if source < 0 or source + length > len(old):
                raise ImageError("a frame copies from outside the script before it")
            script += old[source : source + length]
        else:
            if position + length > len(operations):
                raise ImageError("a frame is cut short")
            script += operations[position : position + length]
            position += length
        source += length
    return bytes(script)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else (-value << 1) - 1
