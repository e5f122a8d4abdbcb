"""What of Debian's packages goes into the carrier: the kernel, KVM's modules, QEMU and its libraries.

QEMU is `qemu-system-x86_64-microvm`, Debian's build of the same source with fewer devices: it has the q35
machine, and needs 7 libraries where the full one needs more than 60.
"""

from __future__ import annotations

import lzma
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmxlab.engines.carrier import archive
from vmxlab.engines.carrier.apt import Package
from vmxlab.engines.carrier.kernel import Kernel, read_kernel
from vmxlab.engines.carrier.libraries import Closure, closure, find_library
from vmxlab.engines.carrier.modules import lean
from vmxlab.engines.carrier.packages import PackageCache, Resolution, package_for
from vmxlab.engines.carrier.tools import unavailable

QEMU_IN_PACKAGE = "usr/bin/qemu-system-x86_64-microvm"
QEMU_IN_CARRIER = "usr/bin/qemu-system-x86_64"

# In the order in which they are to be loaded.
_MODULES = ("virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-intel")
_LIBRARY_FOLDER = "lib/x86_64-linux-gnu"
_QEMU_VERSION = re.compile(rb"QEMU emulator version (\d+(?:\.\d+)+)")


@dataclass(frozen=True, slots=True)
class Contents:
    """All parts that come from packages, and which packages those were."""

    kernel: Kernel
    linux: str
    modules: dict[str, bytes]
    qemu: bytes
    qemu_version: str
    libraries: dict[str, bytes]
    loader: str
    """Where QEMU's binary wants the loader."""
    used: tuple[str, ...]


def collect(cache: PackageCache, answer: Resolution, work: Path) -> Contents:
    """Fetch and unpack what is needed. Raises ToolFailed where a package can't be had, EngineUnavailable."""
    work.mkdir()
    # What was needed last time is fetched in one go.
    known = [answer.package(name) for name in answer.used]
    cache.fetch(answer, known or [answer.kernel, answer.qemu], work)
    kernel, modules = _kernel_and_modules(cache, answer.kernel, work)

    tree = work / "qemu"
    cache.unpack(answer.qemu, tree, work)
    program = tree / QEMU_IN_PACKAGE
    if not program.is_file():
        raise _without(answer.qemu, QEMU_IN_PACKAGE)
    needed, used = _libraries(cache, answer, program, work)
    assert needed.loader is not None
    qemu = program.read_bytes()
    return Contents(
        kernel=kernel,
        linux=answer.kernel.upstream,
        modules=modules,
        qemu=qemu,
        qemu_version=_qemu_version(qemu, answer.qemu),
        libraries={name: path.read_bytes() for name, path in needed.found.items()},
        loader=needed.loader,
        used=(answer.kernel.name, answer.qemu.name, *used),
    )


def initramfs(contents: Contents, init: bytes) -> bytes:
    """The first root file system, as a cpio archive. It is not compressed: inflating it costs more there."""
    entries = [archive.Entry.directory(name) for name in ("dev", "proc", "sys", "tmp")]
    # Without it init would start with no standard streams.
    entries.append(archive.Entry.character_device("dev/console", 5, 1))
    entries.append(archive.Entry.file("init", init, executable=True))
    entries += [archive.Entry.file(f"modules/{name}.ko", data) for name, data in contents.modules.items()]
    entries.append(archive.Entry.file(QEMU_IN_CARRIER, contents.qemu, executable=True))
    loader = contents.loader.lstrip("/")
    for name, data in sorted(contents.libraries.items()):
        path = loader if name == Path(loader).name else f"{_LIBRARY_FOLDER}/{name}"
        entries.append(archive.Entry.file(path, data, executable=True))
    return archive.pack(archive.with_parents(entries))


def _kernel_and_modules(cache: PackageCache, package: Package, work: Path) -> tuple[Kernel, dict[str, bytes]]:
    tree = work / "kernel"
    cache.unpack(package, tree, work)
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if not images:
        raise _without(package, "boot/vmlinuz-*")
    kernel = read_kernel(images[0].read_bytes())
    modules = {}
    for name in _MODULES:
        short = Path(name).name
        modules[short] = lean(_module(tree, package, kernel.release, name), short)
    # All of the other modules are in there, some 80 MB.
    shutil.rmtree(tree)
    return kernel, modules


def _module(tree: Path, package: Package, release: str, name: str) -> bytes:
    """A module's file; Debian 13 has them packed with xz. /usr is merged there."""
    for top in ("lib/modules", "usr/lib/modules"):
        path = tree / top / release / "kernel" / f"{name}.ko"
        if path.is_file():
            return path.read_bytes()
        packed = path.with_suffix(".ko.xz")
        if packed.is_file():
            try:
                return lzma.decompress(packed.read_bytes())
            except lzma.LZMAError as error:
                raise unavailable(
                    f"the module {packed.name} of {package.file} can't be unpacked: {error}", advice=None
                ) from error
    raise _without(package, f"lib/modules/{release}/kernel/{name}.ko")


def _libraries(
    cache: PackageCache, answer: Resolution, program: Path, work: Path
) -> tuple[Closure, list[str]]:
    """The libraries of a program, fetched round by round; and the names of their packages.

    Those that were needed last time come first; they are there. Else a package is guessed by the library's
    name. Where that leads nowhere, all libraries that QEMU's package depends on are fetched.
    """
    trees: dict[str, Path] = {}

    def unpack(packages: Iterable[Package]) -> None:
        for package in packages:
            trees[package.name] = work / "libraries" / package.name
            cache.unpack(package, trees[package.name], work)

    def find(name: str) -> Path | None:
        return next((path for tree in trees.values() if (path := find_library(tree, name))), None)

    roots = (answer.kernel.name, answer.qemu.name)
    unpack(answer.package(name) for name in answer.used if name not in roots)
    while (needed := closure(program, find)).missing:
        left = [package for package in answer.packages if package.name not in trees]
        wanted = {p.name: p for name in needed.missing if (p := package_for(name, left))}
        if not wanted:
            wanted = {p.name: p for p in left if p.name.startswith("lib") and "_all." not in p.file}
        if not wanted:
            raise unavailable(
                f"{program.name} needs {', '.join(needed.missing)}, and no package that {answer.qemu.name} "
                f"depends on has it",
                advice="report it with the version of the package",
            )
        cache.fetch(answer, list(wanted.values()), work)
        unpack(wanted.values())
    used = [
        name
        for name, tree in trees.items()
        if any(path.is_relative_to(tree) for path in needed.found.values())
    ]
    return needed, used


def _qemu_version(binary: bytes, package: Package) -> str:
    """The version that QEMU prints; the package's version may say less (7.2 for 7.2.22)."""
    match = _QEMU_VERSION.search(binary)
    return match[1].decode() if match else package.upstream.partition("+")[0]


def _without(package: Package, path: str) -> Exception:
    return unavailable(
        f"the package {package.name} {package.version} has no file {path}",
        advice="the carrier is made of the packages of Debian 12 and newer; report it with this version",
    )
