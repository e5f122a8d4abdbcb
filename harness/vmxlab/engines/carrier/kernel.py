"""The kernel out of a Debian package's bzImage, as memory contents and an entry.

bzImage decompresses itself, which takes a minute or more where each instruction is emulated; done here it
takes a second. Its format is in the kernel's Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header"):
setup code with a header at 1F1H, behind it the protected-mode code, in which `payload_offset` and
`payload_length` say where the compressed ELF file is. The last 4 bytes of that payload are the size it has
when decompressed.

The entry is the one for Xen's PVH, which needs no firmware and no real mode: an ELF note with the owner "Xen"
and the type 18 (Linux's include/xen/interface/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmxlab.engines.carrier.tools import unavailable

if TYPE_CHECKING:
    from elftools.elf.segments import NoteSegment

_SECTOR = 512
_SETUP_SECTORS_AT = 0x1F1
_BOOT_FLAG_AT = 0x1FE
_MAGIC_AT = 0x202
_VERSION_AT = 0x206
_KERNEL_VERSION_AT = 0x20E
_PAYLOAD_AT = 0x248
_HEADER_END = 0x250
_FIRST_WITH_PAYLOAD = 0x0208

_LZ4_LEGACY = bytes.fromhex("02214c18")
_LZ4_BLOCK_BYTES = 8 << 20
_XZ = bytes.fromhex("fd377a585a00")
_GZIP = bytes.fromhex("1f8b")

_PVH_OWNER = "Xen"
_PVH_ENTRY = 18

_ADVICE = "this build of Debian's kernel is not one the carrier can use; report it with the package's version"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel ready to be laid into memory. Addresses are physical."""

    release: str
    """What `uname -r` says, "6.1.0-56-cloud-amd64"."""
    base: int
    """Address of the lowest segment."""
    entry: int
    """The PVH entry: 32-bit code."""
    end: int
    """The end of what it uses at its start, .bss and .brk included."""
    content: bytes = field(repr=False)
    """What lies at `base`."""


def read_kernel(bzimage: bytes) -> Kernel:
    """The kernel in a bzImage. Raises EngineUnavailable, which says what is strange about it."""
    release = _release(bzimage)
    base, content, end, entry = _load_elf(decompress(_payload(bzimage)))
    return Kernel(release, base, entry, end, content)


# --- bzImage ------------------------------------------------------------------------------------------------


def _payload(bzimage: bytes) -> bytes:
    _check_header(bzimage)
    # 0 stands for 4, for the sake of very old kernels.
    code_at = ((bzimage[_SETUP_SECTORS_AT] or 4) + 1) * _SECTOR
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD_AT)
    payload = bzimage[code_at + offset : code_at + offset + length]
    if len(payload) != length or length < 8:
        raise _strange(f"it is cut short: {len(bzimage)} bytes, the payload should have {length}")
    return payload


def _check_header(bzimage: bytes) -> None:
    if len(bzimage) < _HEADER_END or bzimage[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise _strange("it is no bzImage: there is no HdrS at offset 0x202")
    (protocol,) = struct.unpack_from("<H", bzimage, _VERSION_AT)
    if protocol < _FIRST_WITH_PAYLOAD:
        raise _strange(f"its boot protocol {protocol >> 8}.{protocol & 0xFF:02} is older than 2.08")


def _release(bzimage: bytes) -> str:
    """The first word of the version text, to which a pointer in the header leads."""
    _check_header(bzimage)
    (pointer,) = struct.unpack_from("<H", bzimage, _KERNEL_VERSION_AT)
    text = bzimage[pointer + _SECTOR :].partition(b"\0")[0] if pointer else b""
    words = text[:_SECTOR].decode("ascii", "replace").split()
    if not words:
        raise _strange("it does not say its version")
    return words[0]


def decompress(payload: bytes) -> bytes:
    """What was packed into a bzImage's payload: LZ4's legacy frames, xz or gzip.

    Raises EngineUnavailable for anything else, naming how it starts, and for damage.
    """
    import lzma
    import zlib

    size = int.from_bytes(payload[-4:], "little")
    try:
        if payload.startswith(_LZ4_LEGACY):
            content = _lz4_legacy(payload)
        elif payload.startswith(_XZ):
            content = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
        elif payload.startswith(_GZIP):
            # gzip's own trailer ends with the size: nothing is appended.
            content = zlib.decompressobj(wbits=31).decompress(payload)
        else:
            raise _strange(
                f"its compression is neither LZ4 nor xz nor gzip: it starts with {payload[:6].hex(' ')}"
            )
    except (lzma.LZMAError, zlib.error, RuntimeError, ValueError) as error:
        raise _strange(f"its payload is damaged: {error}") from error
    if len(content) != size:
        raise _strange(f"its payload is damaged: {len(content)} bytes come out of it, {size} should")
    return content


def _lz4_legacy(payload: bytes) -> bytes:
    """LZ4's legacy format: a magic, then blocks of 8 MiB (the last one less), each with its packed size."""
    import lz4.block

    parts: list[bytes] = []
    at, end = len(_LZ4_LEGACY), len(payload) - 4
    while at < end:
        (packed,) = struct.unpack_from("<I", payload, at)
        at += 4
        if packed > end - at:
            raise ValueError(f"a block of {packed} bytes, {end - at} are left")
        parts.append(lz4.block.decompress(payload[at : at + packed], uncompressed_size=_LZ4_BLOCK_BYTES))
        at += packed
    return b"".join(parts)


# --- the ELF file in it -------------------------------------------------------------------------------------


def _load_elf(content: bytes) -> tuple[int, bytes, int, int]:
    """(lowest address, what lies there, end with .bss, PVH entry)."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import NoteSegment

    entry = None
    pieces: list[tuple[int, bytes]] = []
    end = 0
    try:
        elf = ELFFile(io.BytesIO(content))
        for segment in elf.iter_segments():
            if segment["p_type"] == "PT_LOAD":
                data = segment.data()
                if len(data) != segment["p_filesz"]:
                    raise _strange("a segment of its ELF file is cut short")
                pieces.append((segment["p_paddr"], data))
                end = max(end, segment["p_paddr"] + segment["p_memsz"])
            elif isinstance(segment, NoteSegment) and entry is None:
                entry = _pvh_entry(segment)
    except (ELFError, ValueError, KeyError) as error:
        raise _strange(f"its payload is no ELF file: {error}") from error
    if not pieces:
        raise _strange("its ELF file loads nothing")
    if entry is None:
        raise _strange("it has no entry for PVH (ELF note Xen, type 18: CONFIG_PVH)")
    base = min(address for address, _ in pieces)
    memory = bytearray(max(address + len(data) for address, data in pieces) - base)
    for address, data in pieces:
        memory[address - base : address - base + len(data)] = data
    if not base <= entry < base + len(memory):
        raise _strange(f"its PVH entry {entry:#x} is outside of what it loads")
    return base, bytes(memory), end, entry


def _pvh_entry(segment: NoteSegment) -> int | None:
    notes: Any = segment.iter_notes()
    for note in notes:
        if note["n_name"] == _PVH_OWNER and note["n_type"] == _PVH_ENTRY:
            return int.from_bytes(note["n_descdata"], "little")
    return None


def _strange(why: str) -> Exception:
    return unavailable(f"the kernel can't be taken out of its package: {why}", advice=_ADVICE)
