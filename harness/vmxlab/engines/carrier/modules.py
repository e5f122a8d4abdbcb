"""Kernel modules, made cheap to load where each instruction is emulated.

Loading Debian's kvm.ko and kvm-intel.ko as they are costs about 6 s in Bochs, none of it KVM's own work:

- The kernel verifies the signature that is appended to a module. Without one it loads the module just the
  same, and marks itself as tainted (Documentation/admin-guide/module-signing.rst: only `module.sig_enforce`
  or lockdown demands one).
- It visits every function that `__mcount_loc` lists, so that it could be traced (Documentation/trace), and
  overwrites the call with which it begins by a NOP.
- It checks the module's type information, `.BTF`, for BPF programs that nobody loads here.

The kernel finds both sections by name. So the names are changed, in the table of section names. The table
shares strings: the name `__mcount_loc` is the end of `.rela__mcount_loc`, which changes along with it;
relocations are found by section type, not by name.

The NOPs are written here then: else each function of KVM would call one that does nothing. With these calls
a VM exit of L2 costs 2 % more instructions. Everything else in KVM stays as Debian built it.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmxlab.engines.carrier.tools import unavailable

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

HIDDEN_SECTIONS = ("__mcount_loc", ".BTF")

# What begins a function that can be traced: CALL rel32, with a relocation to this symbol; and what the kernel
# makes of it, a NOP as long.
_TRACER = "__fentry__"
_CALL = b"\xe8"
_NOP = b"\x0f\x1f\x44\x00\x00"
# ELF-64: offset, index of the symbol and type (0: nothing to relocate), addend.
_RELOCATION = struct.Struct("<QQq")

_SIGNATURE_MARK = b"~Module signature appended~\n"
# struct module_signature (include/linux/module_signature.h): kinds and lengths of a byte each, 3 bytes of
# padding, and the length of the signature, big endian. The signature itself stands before it.
_SIGNATURE_INFO = struct.Struct(">5B3xI")


def without_signature(module: bytes, name: str) -> bytes:
    """The module without the signature at its end; as it is where it has none.

    Raises EngineUnavailable where the signature's lengths make no sense. `name` is for that message.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    end = len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
    if end < 0:
        raise _damaged(name, "its signature is cut short")
    _, _, _, signer_bytes, key_bytes, signature_bytes = _SIGNATURE_INFO.unpack_from(module, end)
    end -= signer_bytes + key_bytes + signature_bytes
    if end <= 0:
        raise _damaged(name, f"its signature claims {signature_bytes} bytes")
    return module[:end]


def without_names(module: bytes, hidden: tuple[str, ...], name: str) -> bytes:
    """The module with these sections' names changed, so that nobody finds them. Those it lacks are no error.

    Raises EngineUnavailable for what is no ELF file.
    """
    result = bytearray(module)
    with _elf(module, name) as elf:
        names = elf.get_section(elf["e_shstrndx"])["sh_offset"]
        for section in elf.iter_sections():
            if section.name in hidden:
                result[names + section["sh_name"]] = ord("-")
    return bytes(result)


def without_tracing(module: bytes, name: str) -> bytes:
    """The module with a NOP for each call of the tracer, as the kernel has it while nothing is traced.

    Raises EngineUnavailable for what is no ELF file.
    """
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.relocation import RelocationSection
    from elftools.elf.sections import SymbolTableSection

    result = bytearray(module)
    with _elf(module, name) as elf:
        symbols = elf.get_section_by_name(".symtab")
        if not isinstance(symbols, SymbolTableSection):
            return module
        tracers = {number for number, symbol in enumerate(symbols.iter_symbols()) if symbol.name == _TRACER}
        for section in elf.iter_sections():
            if not isinstance(section, RelocationSection):
                continue
            code = elf.get_section(section["sh_info"])
            if not code["sh_flags"] & SH_FLAGS.SHF_EXECINSTR:
                continue
            at, size = section["sh_offset"], section["sh_size"]
            for number, (offset, info, _) in enumerate(_RELOCATION.iter_unpack(module[at : at + size])):
                call = code["sh_offset"] + offset - len(_CALL)
                if info >> 32 in tracers and module[call : call + len(_CALL)] == _CALL:
                    result[call : call + len(_NOP)] = _NOP
                    _RELOCATION.pack_into(result, at + number * _RELOCATION.size, offset, 0, 0)
    return bytes(result)


def lean(module: bytes, name: str) -> bytes:
    """A kernel module as the carrier loads it: no signature, and nothing for tracing and BPF."""
    return without_names(without_tracing(without_signature(module, name), name), HIDDEN_SECTIONS, name)


@contextlib.contextmanager
def _elf(module: bytes, name: str) -> Iterator[ELFFile]:
    """The module to be looked at; what is wrong with it as an EngineUnavailable."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        yield ELFFile(io.BytesIO(module))
    except (ELFError, ValueError, IndexError, KeyError, struct.error) as error:
        raise _damaged(name, f"it is no ELF file: {error}") from error


def _damaged(name: str, why: str) -> Exception:
    return unavailable(
        f"the kernel module {name} can't be used: {why}",
        advice="remove what is cached and try again: vmxlab carrier --clean",
    )
