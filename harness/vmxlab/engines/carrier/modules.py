"""Kernel modules, made cheap to load where each instruction is emulated.

Loading Debian's kvm.ko and kvm-intel.ko as they are costs about 6 s in Bochs, none of it KVM's own work:

- The kernel verifies the signature that is appended to a module. Without one it loads the module just the
  same, and marks itself as tainted (Documentation/admin-guide/module-signing.rst: only `module.sig_enforce`
  or lockdown demands one).
- It visits every function that `__mcount_loc` lists, so that it could be traced (Documentation/trace).
- It checks the module's type information, `.BTF`, for BPF programs that nobody loads here.

The kernel finds both sections by name. So the names are changed, in the table of section names, and nothing
else: each instruction and each datum of KVM stays as Debian built it. The table shares strings: the name
`__mcount_loc` is the end of `.rela__mcount_loc`, which changes along with it; relocations are found by
section type, not by name.
"""

from __future__ import annotations

import io
import struct

from vmxlab.engines.carrier.tools import unavailable

HIDDEN_SECTIONS = ("__mcount_loc", ".BTF")

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
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    result = bytearray(module)
    try:
        elf = ELFFile(io.BytesIO(module))
        names = elf.get_section(elf["e_shstrndx"])["sh_offset"]
        for section in elf.iter_sections():
            if section.name in hidden:
                result[names + section["sh_name"]] = ord("-")
    except (ELFError, ValueError, IndexError, KeyError) as error:
        raise _damaged(name, f"it is no ELF file: {error}") from error
    return bytes(result)


def lean(module: bytes, name: str) -> bytes:
    """A kernel module as the carrier loads it: no signature, and nothing for tracing and BPF."""
    return without_names(without_signature(module, name), HIDDEN_SECTIONS, name)


def _damaged(name: str, why: str) -> Exception:
    return unavailable(
        f"the kernel module {name} can't be used: {why}",
        advice="remove what is cached and try again: vmxlab carrier --clean",
    )
