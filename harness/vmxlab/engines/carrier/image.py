"""The carrier as Bochs starts it: a boot ROM and one memory image, built when needed and kept.

The memory image is what lies in the machine's RAM from MEMORY_BASE on: the kernel where its ELF file wants
it, behind its .bss a page with the start info, and the initramfs. The ROM ends with the reset stub
(guest/carrier/reset.S), which touches the image's pages and jumps to the kernel.

A build is named by all that it is made of: this builder, the parts of ours, the packages' versions. So a new
version of a package makes a new build, and an unchanged one starts without asking apt anything.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmxlab import errors
from vmxlab.engines.base import Availability
from vmxlab.engines.carrier.contents import Contents, collect, initramfs
from vmxlab.engines.carrier.packages import PackageCache, Resolution, not_to_be_had
from vmxlab.engines.carrier.start_info import COMMAND_LINE, MIB, pack_start_info
from vmxlab.engines.carrier.store import Damaged, Store, default_folder
from vmxlab.engines.carrier.tools import (
    ToolFailed,
    disk_errors,
    missing_tools,
    not_debian,
    unavailable,
)
from vmxlab.image.monitor import RESET_STUB_BYTES, CarrierParts

MEMORY_BASE = 0x100_0000
"""Where the memory image begins: Debian's kernel is linked to run at 16 MiB (CONFIG_PHYSICAL_START)."""

MEMORY_MB = 256
"""RAM of the machine in Bochs, as its memory map says."""

ROM_BYTES = 64 << 10

# Whoever changes what is built of the same packages and parts counts this up.
_BUILDER = 2

_MEMORY_FILE = "memory.img"
_ROM_FILE = "boot.rom"

_PAGE = 4096
# The kernel, QEMU with its guest's memory, and what else runs there.
_LEAST_FREE_MB = 96

# guest/carrier/reset.S: magic, then address and size of the memory image, the kernel's entry, its argument.
_STUB_TABLE = struct.Struct("<8s4I")
_STUB_MAGIC = b"VMXLABCR"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CarrierImage:
    """A carrier that was built, its files checked."""

    memory: Path
    """The memory image, to be loaded at MEMORY_BASE."""
    rom: Path
    """The boot ROM, ROM_BYTES long; it ends at 4 GiB."""
    linux: str
    """Upstream version of the kernel, "6.1.192"."""
    release: str
    """What `uname -r` says in it."""
    qemu: str
    """Version of QEMU, "7.2.22"."""
    packages: Mapping[str, str]
    """Versions of the packages that it was made of."""

    @property
    def version(self) -> str:
        """The versions in one word, "linux-6.1.192+qemu-7.2.22"."""
        return version_of(self.linux, self.qemu)


def version_of(linux: str, qemu: str) -> str:
    """What names a carrier in reports: the kernel is what implements VMX for the monitor."""
    return f"linux-{linux}+qemu-{qemu}"


def carrier_image(
    parts: CarrierParts, *, tell: Tell | None = None, cache: Path | None = None
) -> CarrierImage:
    """The carrier with these parts, from the cache or built. `tell` gets what a person should know meanwhile.

    The first build downloads about 41 MB and takes some seconds besides; a use from the cache takes 0.1 s.
    `cache`: a folder instead of the user's cache. Raises EngineUnavailable.
    """
    tell = tell or _silent
    folder = cache_folder(cache)
    with disk_errors(folder):
        store, packages = Store(folder), PackageCache(folder, tell)
        image = _ready(store, packages.current(), parts, _silent)
        if image is not None:
            return image
        with store.lock(tell):
            # Another process may have built it while we waited.
            image = _ready(store, packages.current(), parts, tell)
            return image or _build(store, packages, parts, tell)


def carrier_availability(parts: CarrierParts | None = None, *, cache: Path | None = None) -> Availability:
    """Whether a carrier is there or can be tried to be built. Builds nothing, asks no network, never raises.

    With `parts`, the version is that of the carrier which `carrier_image` would take from the cache.
    """
    try:
        folder = cache_folder(cache)
        built = _built(Store(folder), PackageCache(folder, _silent).current(), parts)
        if built is not None:
            return Availability(True, version=version_of(built["linux"], built["qemu"]))
        missing = missing_tools()
        if missing:
            raise not_debian(missing)
    except errors.EngineUnavailable as error:
        return Availability(False, problem=error.message, advice=error.advice)
    except OSError as error:
        return Availability(False, problem=f"the carrier's cache folder can't be read: {error}")
    return Availability(True)


def clean(cache: Path | None = None, *, tell: Tell | None = None) -> Path:
    """Remove everything that is cached, and return the folder. Raises EngineUnavailable."""
    folder = cache_folder(cache)
    if not folder.exists():
        return folder
    with disk_errors(folder):
        store = Store(folder)
        with store.lock(tell or _silent), store.workshop():
            store.clean()
            PackageCache(folder, _silent).clean()
    return folder


def cache_folder(cache: Path | None = None) -> Path:
    """Where carriers are kept: `cache`, or else the user's cache folder. Raises EngineUnavailable."""
    folder = cache if cache is not None else default_folder()
    if folder is None:
        raise unavailable(
            "there is no folder to keep the carrier in: the user has no home",
            advice="name one: XDG_CACHE_HOME=/somewhere",
        )
    return folder.absolute()


def manifest_of(image: CarrierImage) -> dict[str, Any]:
    """What the manifest of a build says: packages, files with sizes and hashes, addresses, command line."""
    manifest = Store(image.memory.parent.parent.parent).manifest(image.memory.parent.name)
    return manifest or {}


def _silent(_: str) -> None:
    pass


# --- what is built ------------------------------------------------------------------------------------------


def _key(answer: Resolution, parts: CarrierParts) -> str:
    """The name of a build: a hash of all that decides what is in it."""
    ingredients = {
        "builder": _BUILDER,
        "command_line": COMMAND_LINE,
        "memory": [MEMORY_BASE, MEMORY_MB],
        "parts": [hashlib.sha256(part).hexdigest() for part in (parts.reset_stub, parts.init)],
        "packages": answer.versions,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:32]


def _built(store: Store, answer: Resolution | None, parts: CarrierParts | None) -> dict[str, Any] | None:
    """The manifest of a build for these versions, not checked; with no parts, of any."""
    if answer is None or not answer.used:
        return None
    if parts is not None:
        manifests = [store.manifest(_key(answer, parts))]
    else:
        manifests = [store.manifest(key) for key in store.names()]
    for manifest in manifests:
        if manifest and manifest.get("packages") == answer.versions and {"linux", "qemu"} <= manifest.keys():
            return manifest
    return None


def _ready(store: Store, answer: Resolution | None, parts: CarrierParts, tell: Tell) -> CarrierImage | None:
    """The build that is there already and whole, or None."""
    if answer is None or not answer.used:
        return None
    key = _key(answer, parts)
    try:
        manifest = store.checked(key)
        return None if manifest is None else _image(store, key, manifest)
    except (Damaged, KeyError, TypeError) as damage:
        tell(f"the carrier in the cache is damaged and is built again: {damage}")
        return None


def _image(store: Store, key: str, manifest: Mapping[str, Any]) -> CarrierImage:
    return CarrierImage(
        memory=store.path(key) / _MEMORY_FILE,
        rom=store.path(key) / _ROM_FILE,
        linux=str(manifest["linux"]),
        release=str(manifest["release"]),
        qemu=str(manifest["qemu"]),
        packages=dict(manifest["packages"]),
    )


def _build(store: Store, packages: PackageCache, parts: CarrierParts, tell: Tell) -> CarrierImage:
    """Build a carrier, or find by asking apt anew that nothing has changed. Needs the lock."""
    _check_stub(parts.reset_stub)
    with store.workshop() as work:
        answer = packages.current()
        if answer is None:
            tell("asking apt for the versions of Debian's kernel and QEMU")
            answer = packages.resolve(work)
            image = _ready(store, answer, parts, tell)
            if image is not None:
                return image
        answer, contents = _collect(packages, answer, work, tell)
        made = work / "made"
        made.mkdir()
        facts = _write(made, contents, parts)
        answer = packages.note_used(answer, contents.used)
        key = _key(answer, parts)
        store.add(key, made, {**facts, "packages": answer.versions})
    store.drop_others(key)
    packages.drop_unused(answer)
    manifest = store.manifest(key)
    assert manifest is not None
    image = _image(store, key, manifest)
    tell(f"built the carrier: {image.version}")
    return image


def _collect(
    packages: PackageCache, answer: Resolution, work: Path, tell: Tell
) -> tuple[Resolution, Contents]:
    """All that goes in; with newer package lists where the packages of these are gone from the mirror."""
    tell(f"building the carrier: Linux {answer.kernel.version}, QEMU {answer.qemu.version}")
    try:
        return answer, collect(packages, answer, work / "first")
    except ToolFailed as error:
        failure = error
    try:
        answer = packages.refresh(work)
    except errors.EngineUnavailable:
        # No network: what could not be downloaded says more than what could not be listed.
        raise not_to_be_had("a package of the carrier", failure) from failure
    try:
        return answer, collect(packages, answer, work / "second")
    except ToolFailed as error:
        raise not_to_be_had("a package of the carrier", error) from error


def _write(made: Path, contents: Contents, parts: CarrierParts) -> dict[str, Any]:
    """Write the two files into a folder; what the manifest says about them."""
    kernel = contents.kernel
    if kernel.base != MEMORY_BASE:
        raise unavailable(
            f"the kernel {kernel.release} is linked to run at {kernel.base:#x}; the carrier is laid out for "
            f"{MEMORY_BASE:#x}",
            advice="report it with the version of the package",
        )
    root = initramfs(contents, parts.init)
    information = _page_up(kernel.end)
    root_at = information + _PAGE
    end = _page_up(root_at + len(root))
    if end + _LEAST_FREE_MB * MIB > MEMORY_MB * MIB:
        raise unavailable(
            f"kernel and programs end at {end:#x}: too little is left of {MEMORY_MB} MB of memory",
            advice="report it with the versions of the packages",
        )
    page = pack_start_info(information, initramfs=root_at, initramfs_bytes=len(root), memory_mb=MEMORY_MB)
    assert len(page) <= _PAGE
    with (made / _MEMORY_FILE).open("wb") as file:
        for address, content in ((kernel.base, kernel.content), (information, page), (root_at, root)):
            file.write(bytes(address - MEMORY_BASE - file.tell()))
            file.write(content)
        file.write(bytes(end - MEMORY_BASE - file.tell()))
    table = _STUB_TABLE.pack(_STUB_MAGIC, MEMORY_BASE, end - MEMORY_BASE, kernel.entry, information)
    (made / _ROM_FILE).write_bytes(pack_rom(parts.reset_stub, table))
    return {
        "linux": contents.linux,
        "release": kernel.release,
        "qemu": contents.qemu_version,
        "kernel_bytes": len(kernel.content),
        "initramfs_bytes": len(root),
        "entry": kernel.entry,
        "start_info": information,
        "command_line": COMMAND_LINE,
    }


def pack_rom(stub: bytes, table: bytes) -> bytes:
    """The boot ROM: zeros, and at its end the reset stub with this table at its start."""
    return bytes(ROM_BYTES - len(stub)) + table + stub[len(table) :]


def _check_stub(stub: bytes) -> None:
    if len(stub) != RESET_STUB_BYTES or not stub.startswith(_STUB_MAGIC):
        raise unavailable(
            f"the carrier's reset stub is damaged: {len(stub)} bytes that start with {stub[:8]!r}",
            advice="build it again with 'make guest'",
        )


def _page_up(address: int) -> int:
    return address + -address % _PAGE
