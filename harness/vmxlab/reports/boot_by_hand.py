"""How to boot an image without this harness: the command lines, and Bochs's configuration file."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmxlab.engines.base import EngineInfo
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.bochs_config import settings
from vmxlab.engines.choose import ENGINES
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.kvm_in_bochs import CarrierModel, KvmInBochsEngine
from vmxlab.engines.qemu import PROGRAM as QEMU
from vmxlab.engines.qemu import QemuKvmEngine
from vmxlab.engines.rom import RomImage
from vmxlab.image.layout import MEMORY_BYTES, MIB

_MEMORY_MB = MEMORY_BYTES // MIB
# Firmware keeps some of it, and the image wants all that a machine has without.
_MEMORY_WITH_FIRMWARE_MB = 2 * _MEMORY_MB
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


def ways(
    rom: Path | None,
    elf: Path | None,
    bochsrc: Path | None,
    processors: int = 1,
    iso: Path | None = None,
) -> list[Way]:
    """How to boot the files that were written, on a machine with so many processors."""
    found = []
    if rom is not None:
        found.append(
            Way("QEMU/KVM, from the reset vector", qemu_command(("-bios", str(rom)), processors=processors))
        )
    if elf is not None:
        found.append(kernel_way(elf, processors))
    if bochsrc is not None:
        found.append(bochs_way(bochsrc))
    if iso is not None:
        boot = ("-cdrom", str(iso))
        command = qemu_command(boot, processors=processors, memory_mb=_MEMORY_WITH_FIRMWARE_MB)
        found.append(Way("QEMU/KVM, as a PC with a CD", command))
        found.append(Way("a PC: write it to a USB stick", ("dd", f"if={iso}", "of=/dev/sdX", "bs=1M")))
    return found


def kernel_way(elf: Path, processors: int = 1, info: EngineInfo | None = None) -> Way:
    """QEMU/KVM and the ELF; with the processor that `info` ran on, if that was one of KVM."""
    command = qemu_command(("-kernel", str(elf)), cpu=_kvm_cpu(info), processors=processors)
    return Way("QEMU/KVM, as a kernel", command)


def bochs_way(bochsrc: Path) -> Way:
    """Bochs by its configuration file."""
    # Debian's Bochs waits at its debugger's prompt for "c"; others don't read it. Without a terminal for
    # input, Ctrl-C ends it there.
    return Way("Bochs", (_bochs_program(), "-q", "-f", str(bochsrc)), ("echo", "c"))


def engine_way(rom: RomImage, processors: int = 1, info: EngineInfo | None = None) -> Way:
    """QEMU/KVM with the machine that the engines of the harness give it.

    Its processor is the one that `info` ran on, where that was one of KVM.
    """
    model = _kvm_model(info)
    machine = KvmEngine().arguments(rom, model=model, memory_mb=_MEMORY_MB, processors=processors)
    # The serial line is a UART: the virtio port that the engines have stops where standard input ends.
    # A triple fault ends QEMU; without -no-reboot the image would start from the beginning.
    return Way("QEMU/KVM, as vmxlab runs it", (QEMU, *machine, "-serial", "stdio", "-no-reboot"))


def modules_of_kvm(info: EngineInfo) -> list[str]:
    """The commands that load KVM as it was when `info` ran on it with parameters; else none."""
    if info.name != KvmInBochsEngine.name:
        return []
    modules = zip(("kvm", "kvm_intel"), CarrierModel.of(info.model).parameters, strict=True)
    return [f"modprobe {module} {parameters}" for module, parameters in modules if parameters]


def _kvm_model(info: EngineInfo | None) -> str:
    """The model, with its switches of the processor, as the engine `kvm` takes it."""
    if info is None or not issubclass(ENGINES[info.name], QemuKvmEngine):
        return KvmEngine.default_model
    return str(CarrierModel.of(info.model))


def _kvm_cpu(info: EngineInfo | None) -> str:
    base, *features = _kvm_model(info).split(",")
    return KvmEngine().cpu_argument(base, features)


def qemu_command(
    boot: Sequence[str],
    *,
    accelerator: str = "kvm",
    cpu: str | None = None,
    processors: int = 1,
    memory_mb: int = _MEMORY_MB,
) -> tuple[str, ...]:
    """QEMU with nothing but a processor with VMX, memory, and the serial line on standard output."""
    machine = ("-M", "q35", "-m", str(memory_mb), "-accel", accelerator, "-cpu", cpu or _kvm_cpu(None))
    smp = ("-smp", str(processors)) if processors > 1 else ()
    return (QEMU, "-nodefaults", "-display", "none", *machine, *smp, *boot, "-serial", "stdio")


def bochs_configuration(rom: RomImage, processors: int = 1, model: str = BochsEngine.default_model) -> str:
    """A bochsrc for a person. Raises ImageError for a path that it can't carry."""
    lines = settings(
        rom,
        com1=_COM1,
        model=model,
        memory_mb=_MEMORY_MB,
        processors=processors,
        log_name=f"{rom.path.stem}.bochs.log",
    )
    return _REMARKS + "\n".join((*lines, ""))


def _bochs_program() -> str:
    """What the emulator itself is called here; Debian has a shell script in its way."""
    return next((name for name in _BOCHS_PROGRAMS if shutil.which(name)), _BOCHS_PROGRAMS[0])
