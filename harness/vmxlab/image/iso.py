"""The boot file for a PC: an ISO image with GRUB, for a CD or, written as it is, for a USB stick.

GRUB starts on BIOS and on UEFI firmware, and boots the monitor's ELF by multiboot. Its messages, and then the
monitor's, go to COM1. The programs that make it come from Debian's packages; the same ELF gives the same
bytes with the same versions of them.

GNU GRUB Manual 2.06, "Making a GRUB bootable CD-ROM", "serial", "multiboot"; xorrisofs(1), "Bootable ISO
images".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmxlab.errors import ImageError

PACKAGES = "grub-common grub-pc-bin xorriso"
UEFI_PACKAGES = "grub-efi-amd64-bin mtools"

_GRUB = Path("/usr/lib/grub")
_BIOS_GRUB, _UEFI_GRUB = "i386-pc", "x86_64-efi"
_EPOCH = 946684800
"""2000-01-01: the date of everything in it, unless SOURCE_DATE_EPOCH says another one."""

_MODULES = (
    *("part_msdos", "part_gpt", "iso9660", "search", "search_fs_file"),
    *("normal", "echo", "serial", "terminal", "multiboot", "lsmmap"),
)
_BIOS_MODULES = ("biosdisk",)
_UEFI_MODULES = ("fat",)
_FLOPPY_KIB = 2880
"""A file system of this size holds GRUB for UEFI four times over."""

_FIRST_COMMANDS = """\
search --file --set=root /boot/vmxlab.elf
set prefix=($root)/boot/grub
normal ($root)/boot/grub/grub.cfg
"""
_COMMANDS = """\
# COM1 at 115200 baud, 8 bits, no parity: what the monitor has it at, too.
serial --unit=0 --speed=115200 --word=8 --parity=no --stop=1
terminal_input serial console
terminal_output serial console
set timeout=0
menuentry "{title}" {{
    if multiboot /boot/vmxlab.elf; then
        boot
    else
        echo "The image needs the memory from 1 MiB to 64 MiB; this machine has:"
        lsmmap
    fi
}}
"""


@dataclass(frozen=True, slots=True)
class Iso:
    """An ISO image, and which firmware boots it: "BIOS", "UEFI"."""

    data: bytes
    firmware: tuple[str, ...]


def pack_iso(elf: bytes, *, title: str = "vmxlab", grub: Path = _GRUB) -> Iso:
    """An ISO image that boots the ELF (`rom.pack_elf`, with its memory claimed).

    It boots on UEFI as well where the packages for that are there. `grub` is where GRUB's platforms lie.
    Raises ImageError where a program is missing, naming the packages, or fails.
    """
    _require(grub)
    with tempfile.TemporaryDirectory(prefix="vmxlab-iso-") as name:
        folder = Path(name)
        tree = folder / "tree"
        (tree / "boot" / "grub").mkdir(parents=True)
        (tree / "boot" / "vmxlab.elf").write_bytes(elf)
        (tree / "boot" / "grub" / "grub.cfg").write_text(_COMMANDS.format(title=title))
        (folder / "first.cfg").write_text(_FIRST_COMMANDS)
        _grub_image(folder, grub / _BIOS_GRUB, "i386-pc-eltorito", tree / "boot/grub/bios.img", _BIOS_MODULES)
        partition = _uefi_partition(folder, grub) if _has_uefi(grub) else None
        data = _xorriso(folder, tree, grub / _BIOS_GRUB / "boot_hybrid.img", partition)
    return Iso(data, ("BIOS",) if partition is None else ("BIOS", "UEFI"))


def _require(grub: Path) -> None:
    missing = [program for program in ("grub-mkimage", "xorriso") if shutil.which(program) is None]
    if not (grub / _BIOS_GRUB).is_dir():
        missing.append(str(grub / _BIOS_GRUB))
    if missing:
        raise ImageError(
            f"an ISO image can't be made: {', '.join(missing)} is not here",
            advice=f"on Debian or Ubuntu: apt-get install {PACKAGES}; for UEFI as well: {UEFI_PACKAGES}",
        )


def _has_uefi(grub: Path) -> bool:
    return (grub / _UEFI_GRUB).is_dir() and all(shutil.which(name) for name in ("mformat", "mmd", "mcopy"))


def _grub_image(folder: Path, platform: Path, kind: str, target: Path, modules: tuple[str, ...]) -> None:
    first = ("-c", str(folder / "first.cfg"), "-p", "/boot/grub")
    command = ("grub-mkimage", "-d", str(platform), "-O", kind, *first, "-o", str(target))
    _run(folder, (*command, *modules, *_MODULES))


def _uefi_partition(folder: Path, grub: Path) -> Path:
    """The EFI system partition: GRUB where firmware looks for it on a medium that it does not know."""
    program, partition = folder / "BOOTX64.EFI", folder / "efi.img"
    _grub_image(folder, grub / _UEFI_GRUB, "x86_64-efi", program, _UEFI_MODULES)
    # -N: its serial number would be the time.
    _run(folder, ("mformat", "-C", "-i", str(partition), "-f", str(_FLOPPY_KIB), "-N", "0", "::"))
    _run(folder, ("mmd", "-i", str(partition), "::/EFI", "::/EFI/BOOT"))
    _run(folder, ("mcopy", "-i", str(partition), str(program), "::/EFI/BOOT/BOOTX64.EFI"))
    return partition


def _xorriso(folder: Path, tree: Path, master_boot_record: Path, partition: Path | None) -> bytes:
    date = time.strftime("%Y%m%d%H%M%S00", time.gmtime(int(_environment()["SOURCE_DATE_EPOCH"])))
    target = folder / "image.iso"
    command = ["xorriso", "-as", "mkisofs", "-r", "-V", "VMXLAB", "-o", str(target)]
    command += [f"--modification-date={date}", "--set_all_file_dates", date]
    command += ["-b", "boot/grub/bios.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    command += ["--grub2-boot-info", "--grub2-mbr", str(master_boot_record)]
    if partition is not None:
        command += ["-append_partition", "2", "0xef", str(partition), "-appended_part_as_gpt"]
        command += ["-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot"]
    _run(folder, (*command, str(tree)))
    return target.read_bytes()


def _environment() -> Mapping[str, str]:
    return {"SOURCE_DATE_EPOCH": str(_EPOCH), **os.environ, "LC_ALL": "C", "TZ": "UTC"}


def _run(folder: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise ImageError(
            f"an ISO image can't be made: {command[0]} failed with status {done.returncode}:\n{said}",
            advice=f"the packages are {PACKAGES}; for UEFI {UEFI_PACKAGES}",
        )
