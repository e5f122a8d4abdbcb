"""The built monitor: its bytes and the addresses of what the harness has to know in it.

In a checkout it lies in build/guest, made by `make guest`; an installed package carries it in
vmxlab/monitor. The files are monitor.elf (guest/Makefile), monitor.elf.64 (the same with what a debugger
needs), reset.bin (the reset-vector stub), and the parts of the carrier, carrier.bin and carrier-init.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vmxlab.errors import ImageError
from vmxlab.image import layout

_PACKAGE = Path(__file__).resolve().parent.parent
_PLACES = (_PACKAGE.parent.parent / "build" / "guest", _PACKAGE / "monitor")
_ADVICE = "build it with 'make guest' in the checkout"

RESET_STUB_BYTES = 1024
"""guest/Makefile makes the stub this long: its last 16 bytes are the reset vector."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """A monitor as the linker left it. Addresses are L1-physical."""

    elf: bytes
    """The whole file: ELF32, multiboot and PVH."""
    code: bytes
    """What is loaded at layout.MONITOR_BASE; a multiple of 4 bytes."""
    reset_stub: bytes
    """The last kilobyte of a boot ROM."""
    entry: int
    """The 32-bit entry."""
    exit_entry: int
    """HOST_RIP."""
    exit_stack_top: int
    page_table_root: int
    gdt: int
    gdt_bytes: int
    idt: int
    idt_bytes: int
    tss: int


@dataclass(frozen=True, slots=True)
class CarrierParts:
    """What the engine kvm-in-bochs boots around Debian's kernel (guest/carrier)."""

    reset_stub: bytes
    """The last kilobyte of the carrier's boot ROM."""
    init: bytes
    """Its first process: a static ELF64 program."""


@dataclass(frozen=True, slots=True)
class MonitorSymbols:
    """For a debugger: the monitor as an ELF64 with DWARF, and the folder of its sources, in a checkout."""

    file: Path
    sources: Path | None


def monitor_symbols() -> MonitorSymbols:
    """The symbols of the monitor that `load_monitor` gives. Raises ImageError where there are none."""
    for place in _PLACES:
        if (place / "monitor.elf").is_file():
            file = place / "monitor.elf.64"
            if not file.is_file():
                raise ImageError(f"the monitor's symbols are not there: no {file}", advice=_ADVICE)
            sources = _PACKAGE.parent.parent / "guest"
            return MonitorSymbols(file, sources if sources.is_dir() else None)
    raise _not_built()


def load_carrier_parts() -> CarrierParts:
    """The carrier's parts that belong to this package. Raises ImageError where they have not been built."""
    for place in _PLACES:
        stub, init = place / "carrier.bin", place / "carrier-init"
        if stub.is_file() and init.is_file():
            return CarrierParts(stub.read_bytes(), init.read_bytes())
    raise ImageError(
        f"the carrier's parts are not built: no carrier.bin and carrier-init in "
        f"{' or '.join(map(str, _PLACES))}",
        advice=_ADVICE,
    )


def load_monitor() -> Monitor:
    """The monitor that belongs to this package. Raises ImageError where it has not been built."""
    for place in _PLACES:
        elf, stub = place / "monitor.elf", place / "reset.bin"
        if elf.is_file() and stub.is_file():
            key = (elf.stat().st_mtime_ns, stub.stat().st_mtime_ns)
            return _load(elf, stub, key)
    raise _not_built()


def _not_built() -> ImageError:
    return ImageError(
        f"the monitor is not built: no monitor.elf and reset.bin in {' or '.join(map(str, _PLACES))}",
        advice=_ADVICE,
    )


@lru_cache(maxsize=2)
def _load(elf_path: Path, stub_path: Path, _key: tuple[int, int]) -> Monitor:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    try:
        with elf_path.open("rb") as file:
            elf = ELFFile(file)
            table = elf.get_section_by_name(".symtab")
            symbols = (
                {s.name: (s["st_value"], s["st_size"]) for s in table.iter_symbols()}
                if isinstance(table, SymbolTableSection)
                else {}
            )
            segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
            entry = elf["e_entry"]
            code = segments[0].data()
            start, size = segments[0]["p_paddr"], segments[0]["p_filesz"]
            whole = len(code) == size and 0 <= entry - layout.MONITOR_BASE < size
            if len(segments) != 1 or start != layout.MONITOR_BASE or not whole:
                raise ImageError(f"{elf_path} is not laid out as a monitor", advice=_ADVICE)
    except (ELFError, OSError, IndexError) as error:
        raise ImageError(f"{elf_path} can't be read as a monitor: {error}", advice=_ADVICE) from error

    stub = stub_path.read_bytes()
    if len(stub) != RESET_STUB_BYTES:
        raise ImageError(
            f"{stub_path} has {len(stub)} bytes; a reset-vector stub has {RESET_STUB_BYTES}", advice=_ADVICE
        )

    def symbol(name: str) -> tuple[int, int]:
        if name not in symbols:
            raise ImageError(f"{elf_path} has no symbol {name}", advice=_ADVICE)
        address, size = symbols[name]
        return int(address), int(size)

    return Monitor(
        elf=elf_path.read_bytes(),
        code=code + bytes(-len(code) % 4),
        reset_stub=stub,
        entry=int(entry),
        exit_entry=symbol("vmx_exit_entry")[0],
        exit_stack_top=symbol("monitor_exit_stack_top")[0],
        page_table_root=symbol("monitor_pml4")[0],
        gdt=symbol("monitor_gdt")[0],
        gdt_bytes=symbol("monitor_gdt")[1],
        idt=symbol("monitor_idt")[0],
        idt_bytes=symbol("monitor_idt")[1],
        tss=symbol("monitor_tss")[0],
    )
