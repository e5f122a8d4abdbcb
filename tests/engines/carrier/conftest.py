"""A Debian of our own: a mirror with small packages, and an apt-get and dpkg-deb that know it. No network.

The mirror is a folder. `lists` in it is what apt knows, `calls` what was called; a file `fail-VERB` makes
that verb print its text and fail.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmxlab.engines.carrier import apt
from vmxlab.engines.carrier.image import (
    MEMORY_BASE,
    CarrierImage,
    carrier_image,
)
from vmxlab.image.monitor import CarrierParts

PARTS = CarrierParts(b"VMXLABCR" + bytes(16) + b"code" + bytes(996), b"our init")
RELEASE = "6.1.0-1-cloud-amd64"
LINUX = f"linux-image-{RELEASE}"
_MODULES = ("virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-intel")

_APT_GET = """\
#!{python} -IS
import json, os, shutil, sys, time
mirror = {mirror!r}
arguments = sys.argv[1:]
verb = next(a for a in arguments if a in ("install", "update", "download"))
private = any(a.startswith("-oDir::State::lists=") for a in arguments)
print(verb, "private" if private else "host", file=open(mirror + "/calls", "a"))
for name in (f"fail-{{verb}}", f"fail-{{verb}}-{{'private' if private else 'host'}}"):
    if os.path.exists(f"{{mirror}}/{{name}}"):
        sys.exit(print(open(f"{{mirror}}/{{name}}").read()) or 100)
lists = json.load(open(mirror + "/lists"))
if verb == "install":
    for file, (size, digest) in lists.items():
        print(f"'http://mirror/{{file}}' {{file}} {{size}} SHA256:{{digest}}")
elif verb == "download":
    if os.path.exists(mirror + "/hang"):
        time.sleep(60)
    for wanted in arguments[arguments.index("download") + 1:]:
        name, version = wanted.split("=")
        shutil.copy(f"{{mirror}}/pool/{{name}}_{{version.replace(':', '%3a')}}_amd64.deb", ".")
"""

_DPKG_DEB = """\
#!/bin/sh
test "$1" = -x && exec tar -x -f "$2" -C "$3"
"""


@dataclass(frozen=True)
class Mirror:
    """The folder that plays Debian."""

    folder: Path

    def publish(self, name: str, version: str, files: dict[str, bytes], *, damaged: bool = False) -> None:
        """Add a package, or a new version of it in place of the old one."""
        lists = json.loads((self.folder / "lists").read_text())
        file = f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as packed:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size, member.mode = len(content), 0o755
                packed.addfile(member, io.BytesIO(content))
        data = b"damaged" if damaged else stream.getvalue()
        (self.folder / "pool" / file).write_bytes(data)
        kept = {old: state for old, state in lists.items() if not old.startswith(f"{name}_")}
        kept[file] = (len(data), hashlib.sha256(data).hexdigest())
        (self.folder / "lists").write_text(json.dumps(kept))

    def update_host(self) -> None:
        """What `apt-get update` by root does: the host's lists change."""
        (self.folder / "host-lists" / "Packages").write_text(str(time.monotonic_ns()))

    def fail(self, verb: str, text: str) -> None:
        (self.folder / f"fail-{verb}").write_text(text)

    def heal(self) -> None:
        for path in self.folder.glob("fail-*"):
            path.unlink()

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def forget_calls(self) -> None:
        (self.folder / "calls").unlink(missing_ok=True)


def bzimage(base: int = MEMORY_BASE) -> bytes:
    """A kernel with 4 bytes of code, its .bss up to `base` + 5000H, and its PVH entry at `base`."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", base)
    at = 64 + 2 * 56
    headers = struct.pack("<IIQQQQQQ", 1, 7, at, base, base, 4, 0x5000, 4)
    headers += struct.pack("<IIQQQQQQ", 4, 4, at + 4, 0, 0, len(note), len(note), 4)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    packer = zlib.compressobj(wbits=31)
    payload = packer.compress(elf + headers + b"\xf4\xf4\xf4\xf4" + note) + packer.flush()
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x208] = b"HdrS\x0f\x02"
    struct.pack_into("<H", setup, 0x20E, 0x80)
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    setup[0x280 : 0x280 + len(RELEASE)] = RELEASE.encode()
    return bytes(setup) + payload


def linux_files(base: int = MEMORY_BASE, module: bytes = b"") -> dict[str, bytes]:
    files = {f"lib/modules/{RELEASE}/kernel/{name}.ko": module for name in _MODULES}
    return {f"boot/vmlinuz-{RELEASE}": bzimage(base), **files}


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> dict[str, bytes]:
    """A program that says it is QEMU, and what it needs; linked here."""
    folder = tmp_path_factory.mktemp("binaries")

    def build(name: str, needs: list[str], *kind: str) -> None:
        command = ["ld", "-m", "elf_x86_64", *kind, "--no-as-needed", "-o", folder / name, folder / "o"]
        subprocess.run([*command, *(folder / other for other in needs)], check=True)

    (folder / "s").write_text('.data\n.asciz "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"\n')
    subprocess.run(["as", "--64", "-o", folder / "o", folder / "s"], check=True)
    build("libc.so.6", [], "-shared", "-soname", "libc.so.6")
    build("ld-linux-x86-64.so.2", [], "-shared", "-soname", "ld-linux-x86-64.so.2")
    build("libodd.so.3", ["libc.so.6"], "-shared", "-soname", "libodd.so.3")
    build("libz.so.1", ["libodd.so.3"], "-shared", "-soname", "libz.so.1")
    build("qemu", ["libz.so.1"], "-dynamic-linker", "/lib64/ld-linux-x86-64.so.2", "-e", "0")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binaries) -> Iterator[Mirror]:
    folder = tmp_path / "mirror"
    (folder / "pool").mkdir(parents=True)
    (folder / "host-lists").mkdir()
    (folder / "lists").write_text("{}")
    debian = Mirror(folder)
    libraries = "usr/lib/x86_64-linux-gnu"
    debian.publish(LINUX, "6.1.99-2", linux_files(module=binaries["o"]))
    debian.publish("linux-image-cloud-amd64", "6.1.99-2", {})
    debian.publish(
        "qemu-system-x86", "1:7.2+dfsg-7", {"usr/bin/qemu-system-x86_64-microvm": binaries["qemu"]}
    )
    names = ("libc.so.6", "ld-linux-x86-64.so.2")
    debian.publish("libc6", "2.36-9", {f"{libraries}/{name}": binaries[name] for name in names})
    debian.publish("zlib1g", "1:1.2.13", {f"{libraries}/libz.so.1": binaries["libz.so.1"]})
    # Its package is not named for it: all libraries are tried.
    debian.publish("libcurious", "3", {f"{libraries}/libodd.so.3": binaries["libodd.so.3"]})
    debian.publish("libother1", "1", {f"{libraries}/libother.so.1": b"not looked at"})
    debian.update_host()

    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, source in (
        ("apt-get", _APT_GET.format(mirror=str(folder), python=sys.executable)),
        ("dpkg-deb", _DPKG_DEB),
    ):
        (bin_folder / name).write_text(source)
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr(apt, "HOST_LISTS", folder / "host-lists")
    monkeypatch.setattr(apt, "HOST_SOURCES", folder / "no-sources")
    yield debian
    # Whatever a test did: nothing half-made stays.
    assert list(tmp_path.glob("cache/.new-*")) == []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build(cache: Path, parts: CarrierParts = PARTS) -> tuple[CarrierImage, list[str]]:
    """The carrier, and what was told."""
    told: list[str] = []
    return carrier_image(parts, cache=cache, tell=told.append), told
