"""How to boot an image without this harness: the command lines, and Bochs's configuration file."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.bochs_config import settings
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.qemu import PROGRAM as QEMU
from vmxlab.engines.rom import RomImage
from vmxlab.image.layout import MEMORY_BYTES, MIB

_MEMORY_MB = MEMORY_BYTES // MIB
_BOCHS_PROGRAMS = ("bochs-bin", "bochs")

_COM1 = "mode=file, dev=/dev/stdout"
_REMARKS = """\
# The serial line goes to standard output. For a prompt to type at, put this in place of com1, and connect to
# it with `nc 127.0.0.1 5555` (Bochs waits for that):
# com1: enabled=1, mode=socket-server, dev=127.0.0.1:5555
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to boot: for whom, and the command line."""

    what: str
    command: Sequence[str]
    before: Sequence[str] = ()
    """A command whose output is piped into it."""

    def __str__(self) -> str:
        line = shlex.join(self.command)
        return f"{shlex.join(self.before)} | {line}" if self.before else line


def ways(rom: Path | None, elf: Path | None, bochsrc: Path | None, processors: int = 1) -> list[Way]:
    """How to boot the files that were written, on a machine with so many processors."""
    found = []
    if rom is not None:
        found.append(
            Way("QEMU/KVM, from the reset vector", qemu_command(("-bios", str(rom)), processors=processors))
        )
    if elf is not None:
        found.append(Way("QEMU/KVM, as a kernel", qemu_command(("-kernel", str(elf)), processors=processors)))
    if bochsrc is not None:
        # Debian's Bochs waits at its debugger's prompt for "c"; others don't read it. Without a terminal for
        # input, Ctrl-C ends it there.
        found.append(Way("Bochs", (_bochs_program(), "-q", "-f", str(bochsrc)), ("echo", "c")))
    return found


def qemu_command(
    boot: Sequence[str], *, accelerator: str = "kvm", cpu: str | None = None, processors: int = 1
) -> tuple[str, ...]:
    """QEMU with nothing but a processor with VMX, memory, and the serial line on standard output."""
    cpu = cpu or KvmEngine().cpu_argument(KvmEngine.default_model, ())
    machine = ("-M", "q35", "-m", str(_MEMORY_MB), "-accel", accelerator, "-cpu", cpu)
    smp = ("-smp", str(processors)) if processors > 1 else ()
    return (QEMU, "-nodefaults", "-display", "none", *machine, *smp, *boot, "-serial", "stdio")


def bochs_configuration(rom: Path, processors: int = 1) -> str:
    """A bochsrc for a person. Raises ImageError for a path that it can't carry."""
    lines = settings(
        RomImage.check(rom),
        com1=_COM1,
        model=BochsEngine.default_model,
        memory_mb=_MEMORY_MB,
        processors=processors,
        log_name=f"{rom.stem}.bochs.log",
    )
    return _REMARKS + "\n".join((*lines, ""))


def _bochs_program() -> str:
    """What the emulator itself is called here; Debian has a shell script in its way."""
    return next((name for name in _BOCHS_PROGRAMS if shutil.which(name)), _BOCHS_PROGRAMS[0])
