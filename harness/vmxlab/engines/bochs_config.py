"""What Bochs is told: its configuration file, line by line, and the processor models that serve here.

Bochs user manual, "The configuration file bochsrc".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmxlab import errors
from vmxlab.engines.rom import RomImage

# Models of Bochs 2.7 whose CPUID shows both VMX and 64-bit mode, poorest first. Of the others only
# core_duo_t2400_yonah has VMX; the monitor needs 64-bit mode.
VMX_MODELS = (
    "bx_generic",
    "core2_penryn_t9600",
    "corei5_lynnfield_750",
    "corei5_arrandale_m520",
    "corei7_sandy_bridge_2600k",
    "corei7_ivy_bridge_3770k",
    "corei7_haswell_4770",
    "broadwell_ult",
    "corei7_skylake_x",
    "corei3_cnl",
    "corei7_icelake_u",
    "tigerlake",
)

# Instructions per second of emulated time; 1000000 is the least that Bochs takes. The speed of the processor
# hardly depends on it, but the UART's 115200 baud are counted in it: measured, 200 KB of serial output go at
# 146 KB/s with 1 million, 91 with 2, 70 with 4, 30 with 10 and 5 with 50.
IPS = 1_000_000

# Devices that nobody needs here. `unmapped` (port 0x8900 ends the machine) and `iodebug` stay.
_PLUGINS_OFF = ("speaker", "biosdev", "parallel", "gameport", "extfpuirq")


def settings(
    rom: RomImage,
    *,
    com1: str,
    model: str,
    memory_mb: int,
    processors: int = 1,
    log_name: str,
    ips: int = IPS,
    ignore_bad_msrs: bool = False,
    extra: Sequence[str] = (),
) -> list[str]:
    """The lines of the bochsrc for one machine; Bochs takes each as an argument, too.

    `com1` says where the serial line goes ("mode=file, dev=serial.txt"), `log_name` is a plain file name in
    the directory where Bochs runs. `ignore_bad_msrs`: an MSR that Bochs has not got reads as 0, without #GP.
    Raises ImageError for a path that a bochsrc can't carry.
    """
    return [
        "config_interface: textconfig",
        # A display library there must be. `term` draws on a pseudo-terminal of its own that nobody looks at;
        # `rfb` would do too, but listens on all addresses of the host.
        "display_library: term",
        f"memory: guest={memory_mb}, host={memory_mb}",
        f"romimage: file={quoted(rom.path)}, address={rom.address:#x}",
        # No VGA BIOS: the image brings no firmware that would call it. No VBE: its frame buffer costs 10 ms.
        "vga: extension=none, update_freq=1",
        "pci: enabled=0",
        f"cpu: model={model}, count={processors}, ips={ips}, reset_on_triple_fault=0, "
        f"ignore_bad_msrs={int(ignore_bad_msrs)}",
        # Emulated time follows instructions alone, and starts at one date: the same image runs the same way.
        "clock: sync=none, time0=946684800",
        f"com1: enabled=1, {com1}",
        "plugin_ctrl: " + ", ".join(f"{name}=0" for name in _PLUGINS_OFF),
        "sound: driver=dummy",
        f"log: {log_name}",
        "panic: action=fatal",
        "error: action=report",
        "info: action=report",
        "debug: action=ignore",
        *extra,
    ]


def quoted(path: Path | str) -> str:
    """A path as a bochsrc takes it. Raises ImageError for one that it can't carry."""
    path = str(path)
    # Bochs ends a string at the quote, a line at its end, and expands $NAME.
    bad = sorted(set(path) & set('"$\n\r'))
    if bad:
        raise errors.ImageError(
            f"Bochs can't be given the path {path!r}: it contains {', '.join(map(repr, bad))}",
            advice="copy the image to another place",
        )
    return f'"{path}"'
