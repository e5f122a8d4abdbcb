"""The carrier's parts: archive, kernel, modules, libraries, start info, and what apt prints."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import stat
import struct
import subprocess
from functools import partial
from pathlib import Path

import lz4.block
import pytest
from elftools.elf.elffile import ELFFile

from vmxlab import errors
from vmxlab.engines.carrier import archive, kernel, libraries, modules, start_info
from vmxlab.engines.carrier.apt import Package, parse_uris
from vmxlab.engines.carrier.packages import package_for

# --- archive ------------------------------------------------------------------------------------------------


def unpack(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int], int]]:
    """(name, mode, data, device, inode) of each member, read with nothing of ours."""
    members, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        assert at % 4 == 0
        numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, _, _, _, time, size, _, _, major, minor, name_bytes, _ = numbers
        assert time == 0
        name = data[at + 110 : at + 110 + name_bytes - 1].decode()
        at += (110 + name_bytes + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return members
        members.append((name, mode, data[at : at + size], (major, minor), inode))
        at += (size + 3) // 4 * 4


def test_an_archive_holds_what_was_put_in():
    packed = archive.pack(
        [
            archive.Entry.directory("dev"),
            archive.Entry.character_device("dev/console", 5, 1),
            archive.Entry.file("init", b"12345", executable=True),
            archive.Entry.file("empty", b""),
        ]
    )
    assert unpack(packed) == [
        ("dev", stat.S_IFDIR | 0o755, b"", (0, 0), 1),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1), 2),
        ("init", stat.S_IFREG | 0o755, b"12345", (0, 0), 3),
        ("empty", stat.S_IFREG | 0o644, b"", (0, 0), 4),
    ]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_lists_the_archive(tmp_path):
    (tmp_path / "a").write_bytes(archive.pack([archive.Entry.file("x", b"abc")]))
    listed = subprocess.run(["cpio", "-t"], stdin=(tmp_path / "a").open(), capture_output=True, text=True)
    assert (listed.stdout, listed.returncode) == ("x\n", 0)


def test_directories_are_put_before_the_first_file_in_them():
    entries = archive.with_parents(
        [archive.Entry.file("a/b/x", b""), archive.Entry.file("a/y", b""), archive.Entry.directory("a")]
    )
    assert [entry.name for entry in entries] == ["a", "a/b", "a/b/x", "a/y"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([archive.Entry.file("a/x", b"")], "no directory 'a'"),
        ([archive.Entry.file("x", b""), archive.Entry.file("x", b"")], "twice"),
    ],
)
def test_an_archive_that_could_not_be_unpacked_is_not_made(entries, message):
    with pytest.raises(ValueError, match=message):
        archive.pack(entries)


@pytest.mark.parametrize("name", ["", "/init", "a\0b"])
def test_a_name_that_is_no_relative_path_is_refused(name):
    with pytest.raises(ValueError, match="relative path"):
        archive.Entry.file(name, b"")


# --- kernel -------------------------------------------------------------------------------------------------

BASE = 0x1000000
CODE = b"kernel code"


def elf_kernel(*, base: int = BASE, entry: int | None = BASE + 4, loads: bool = True) -> bytes:
    """An ELF64 file with two loaded segments, one with .bss, and the PVH note."""
    note = b"" if entry is None else struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    headers: list[tuple[int, int, bytes, int]] = []
    if loads:
        headers += [(1, base, CODE, len(CODE)), (1, base + 0x1000, b"data", 0x3000)]
    headers.append((4, 0, note, len(note)))
    offset = 64 + 56 * len(headers)
    table, body = b"", b""
    for kind, address, content, memory in headers:
        at = offset + len(body)
        table += struct.pack("<IIQQQQQQ", kind, 7, at, address, address, len(content), memory, 4)
        body += content + bytes(-len(content) % 4)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    count = len(headers)
    return (
        ident
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, count, 64, 0, 0)
        + table
        + body
    )


def lz4_legacy(content: bytes) -> bytes:
    packed = lz4.block.compress(content, store_size=False)
    size = struct.pack("<I", len(content))
    return bytes.fromhex("02214c18") + struct.pack("<I", len(packed)) + packed + size


def xz(content: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2}]
    return lzma.compress(content, check=lzma.CHECK_CRC32, filters=filters) + struct.pack("<I", len(content))


def bzimage(payload: bytes, *, version: str = "6.1.0-1-cloud-amd64 (a@b) #1", protocol: int = 0x20F) -> bytes:
    """A bzImage with two setup sectors behind the first."""
    setup = bytearray(512 * 3)
    setup[0x1F1] = 2
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x300 - 0x200)
    struct.pack_into("<II", setup, 0x248, 16, len(payload))
    setup[0x300 : 0x300 + len(version)] = version.encode()
    return bytes(setup) + bytes(16) + payload + b"after"


@pytest.mark.parametrize("compress", [lz4_legacy, xz, gzip.compress], ids=["lz4", "xz", "gzip"])
def test_a_kernel_comes_out_of_its_bzimage(compress):
    found = kernel.read_kernel(bzimage(compress(elf_kernel())))
    assert found.release == "6.1.0-1-cloud-amd64"
    assert (found.base, found.entry, found.end) == (BASE, BASE + 4, BASE + 0x4000)
    assert found.content == CODE + bytes(0x1000 - len(CODE)) + b"data"


def test_lz4_blocks_of_8_mib_are_put_together():
    content = b"a" * (8 << 20) + b"the second block"
    blocks = [content[: 8 << 20], content[8 << 20 :]]
    packed = [lz4.block.compress(block, store_size=False) for block in blocks]
    payload = bytes.fromhex("02214c18") + b"".join(struct.pack("<I", len(p)) + p for p in packed)
    assert kernel.decompress(payload + struct.pack("<I", len(content))) == content


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "no HdrS"),
        (bytes(4096), "no HdrS"),
        (bzimage(xz(elf_kernel()), protocol=0x207), "2.07 is older than 2.08"),
        (bzimage(xz(elf_kernel()))[:-40], "cut short"),
        (bzimage(bytes.fromhex("28b52ffd0000") + bytes(40)), "starts with 28 b5 2f fd 00 00"),
        (bzimage(xz(elf_kernel())[:-4] + bytes(4)), "bytes come out of it, 0 should"),
        (bzimage(lz4_legacy(elf_kernel()).replace(b"\0\0\0", b"\xff\xff\xff")), "payload is damaged"),
        (bzimage(xz(b"no ELF file at all")), "no ELF file"),
        (bzimage(xz(elf_kernel(entry=None))), "no entry for PVH"),
        (bzimage(xz(elf_kernel(loads=False))), "loads nothing"),
        (bzimage(xz(elf_kernel(entry=0x5000))), "0x5000 is outside"),
        (bzimage(xz(elf_kernel()), version=""), "does not say its version"),
    ],
)
def test_a_strange_kernel_is_an_error_that_says_why(image, message):
    with pytest.raises(errors.EngineUnavailable, match=message) as caught:
        kernel.read_kernel(image)
    assert caught.value.engine == "kvm-in-bochs"


# --- modules ------------------------------------------------------------------------------------------------

_MODULE_SOURCE = """
.text
f:  call __fentry__
    call g
    .byte 0xb8
    .long __fentry__
    call __fentry__
    ret
.data
    .quad __fentry__
.section __mcount_loc, "a"
    .quad f
.section .BTF, "a"
    .quad 1
.section .modinfo, "a"
    .asciz "license=GPL"
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("module")
    (folder / "m.s").write_text(_MODULE_SOURCE)
    subprocess.run(["as", "--64", "-o", folder / "m.ko", folder / "m.s"], check=True)
    return (folder / "m.ko").read_bytes()


def signed(module: bytes, signature: bytes) -> bytes:
    info = struct.pack(">5B3xI", 0, 0, 2, 0, 0, len(signature))
    return module + signature + info + b"~Module signature appended~\n"


def sections(module: bytes) -> dict[str, bytes]:
    return {section.name: section.data() for section in ELFFile(io.BytesIO(module)).iter_sections()}


def test_the_signature_of_a_module_is_taken_off(module):
    assert modules.without_signature(signed(module, b"s" * 300), "m") == module
    assert modules.without_signature(module, "m") == module


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 5000])
def test_a_signature_longer_than_the_module_is_an_error(size):
    broken = b"m" * 50 + struct.pack(">5B3xI", 0, 0, 2, 0, 0, size) + b"~Module signature appended~\n"
    with pytest.raises(errors.EngineUnavailable, match=f"claims {size} bytes"):
        modules.without_signature(broken, "m")


def test_a_lean_module_lost_the_names_of_two_sections(module):
    lean = modules.lean(signed(module, b"signature"), "m")
    before, after = sections(module), sections(lean)
    assert set(before) - set(after) == {"__mcount_loc", ".BTF", ".rela__mcount_loc"}
    assert set(after) - set(before) == {"-_mcount_loc", "-BTF", ".rela-_mcount_loc"}
    assert len(lean) == len(module)
    unnamed = modules.without_names(module, modules.HIDDEN_SECTIONS, "m")
    *kept, _ = sections(unnamed).values()  # the last is the table of names
    assert kept == list(before.values())[:-1]
    # What else a lean one differs in is what the tracer's calls make: the next test.
    untraced = sections(modules.without_tracing(module, "m"))
    assert list(after.values())[:-1] == list(untraced.values())[:-1]
    assert sum(a != b for a, b in zip(module, unnamed, strict=True)) == 2


def relocations(module: bytes, section: str) -> list[tuple[int, str]]:
    """(offset, symbol) of those that are not R_X86_64_NONE."""
    elf = ELFFile(io.BytesIO(module))
    names = [symbol.name for symbol in elf.get_section_by_name(".symtab").iter_symbols()]
    found = elf.get_section_by_name(section).iter_relocations()
    return [(r["r_offset"], names[r["r_info_sym"]]) for r in found if r["r_info_type"]]


def test_calls_of_the_tracer_are_nops_in_a_lean_module_and_nothing_else_is_changed(module):
    lean = modules.without_tracing(module, "m")
    before, after = sections(module), sections(lean)
    assert {name for name in before if before[name] != after[name]} == {".text", ".rela.text"}
    nop, call = "0f1f440000", "e800000000"
    assert before[".text"].hex() == f"{call}{call}b800000000{call}c3"
    assert after[".text"].hex() == f"{nop}{call}b800000000{nop}c3"
    assert relocations(lean, ".rela.text") == [(6, "g"), (11, "__fentry__")]
    assert relocations(lean, ".rela.data") == relocations(module, ".rela.data") == [(0, "__fentry__")]


def test_what_is_no_module_is_an_error():
    for change in (modules.lean, modules.without_tracing, partial(modules.without_names, hidden=())):
        with pytest.raises(
            errors.EngineUnavailable, match="kernel module kvm can't be used: it is no ELF file"
        ):
            change(b"no ELF file", name="kvm")


# --- libraries ----------------------------------------------------------------------------------------------


def link(folder: Path, name: str, *, needs: tuple[str, ...] = (), program: bool = False) -> Path:
    """A shared library, or a program, that needs others in the same folder."""
    empty = folder / "empty.o"
    if not empty.exists():
        subprocess.run(["as", "--64", "-o", empty, "/dev/null"], check=True)
    kind = ["-dynamic-linker", "/lib64/ld-linux-x86-64.so.2", "-e", "0"] if program else ["-shared"]
    others = [folder / other for other in needs]
    command = ["ld", "-m", "elf_x86_64", *kind, "-soname", name, "--no-as-needed", "-o", folder / name]
    subprocess.run([*command, empty, *others, "--unresolved-symbols=ignore-all"], check=True)
    return folder / name


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("linked")
    for name in ("libdeep.so.1", "ld-linux-x86-64.so.2"):
        link(folder, name)
    link(folder, "liba.so.1", needs=("libdeep.so.1",))
    link(folder, "libb.so.1", needs=("libdeep.so.1", "liba.so.1"))
    link(folder, "program", needs=("libb.so.1",), program=True)
    return folder


def test_the_closure_has_libraries_of_libraries_once_and_the_loader(linked):
    def find(name: str) -> Path | None:
        return linked / name if (linked / name).exists() else None

    found = libraries.closure(linked / "program", find)
    assert list(found.found) == ["libb.so.1", "ld-linux-x86-64.so.2", "libdeep.so.1", "liba.so.1"]
    assert found.loader == "/lib64/ld-linux-x86-64.so.2"
    assert found.missing == ()


def test_libraries_that_are_nowhere_are_named(linked):
    found = libraries.closure(linked / "program", lambda _: None)
    assert found.missing == ("libb.so.1", "ld-linux-x86-64.so.2")


def test_a_program_for_another_machine_is_refused(tmp_path, linked):
    content = bytearray((linked / "program").read_bytes())
    content[18] = 183  # EM_AARCH64
    with pytest.raises(errors.EngineUnavailable, match="qemu is not for x86-64 but EM_AARCH64"):
        libraries.needs_of(bytes(content), "qemu")


def test_links_are_followed_within_the_tree(tmp_path):
    place = tmp_path / "usr/lib/x86_64-linux-gnu"
    place.mkdir(parents=True)
    (place / "libx.so.1.2").write_text("library")
    (place / "libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/liby.so").symlink_to("/usr/lib/x86_64-linux-gnu/libx.so.1")
    (place / "libround.so").symlink_to("libround.so")
    assert libraries.find_library(tmp_path, "libx.so.1") == place / "libx.so.1.2"
    assert libraries.find_library(tmp_path, "liby.so") == place / "libx.so.1.2"
    assert libraries.find_library(tmp_path, "libround.so") is None


# --- start info ---------------------------------------------------------------------------------------------


def test_the_start_info_leads_to_initramfs_memory_and_command_line():
    at = 0x3E00000
    page = start_info.pack_start_info(
        at, initramfs=0x3E01000, initramfs_bytes=77, memory_mb=256, command_line="quiet x=1"
    )
    head = struct.unpack_from("<4I4QII", page)
    assert head[:4] == (0x336EC578, 1, 0, 1)
    modules_at, text_at, rsdp, memory_at, ranges, zero = head[4:]
    assert (rsdp, ranges, zero) == (0, 2, 0)
    assert struct.unpack_from("<4Q", page, modules_at - at) == (0x3E01000, 77, 0, 0)
    assert struct.unpack_from("<QQII", page, memory_at - at) == (0, 0xA0000, 1, 0)
    assert struct.unpack_from("<QQII", page, memory_at - at + 24) == (0x100000, 0xFF00000, 1, 0)
    assert page[text_at - at :] == b"quiet x=1\0"


def test_the_command_line_fits_and_a_longer_one_is_refused():
    assert len(start_info.COMMAND_LINE) < 2048
    with pytest.raises(ValueError, match="2049 bytes; the kernel takes 2048"):
        start_info.pack_start_info(0, initramfs=0, initramfs_bytes=0, memory_mb=64, command_line="x" * 2048)


# --- what apt prints ----------------------------------------------------------------------------------------

_PRINTED = f"""\
Reading package lists...
'http://deb/q_7.2%2bdfsg_amd64.deb' qemu-system-x86_1%3a7.2+dfsg-7+b3_amd64.deb 9281168 SHA256:{"A" * 64}
'http://deb/l.deb' linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64.deb 26713492 MD5Sum:0123
'http://deb/list.xz' Packages.xz 12 SHA256:00
"""


def test_packages_are_read_from_what_apt_prints():
    qemu, linux = parse_uris(_PRINTED.splitlines())
    assert (qemu.name, qemu.version, qemu.upstream) == ("qemu-system-x86", "1:7.2+dfsg-7+b3", "7.2+dfsg")
    assert (qemu.size_bytes, qemu.sha256) == (9281168, "a" * 64)
    assert (linux.version, linux.upstream, linux.sha256) == ("6.1.192-2", "6.1.192", "")


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libglib-2.0.so.0", "libglib2.0-0"),
        ("libpcre2-8.so.0", "libpcre2-8-0"),
        ("libpixman-1.so.0", "libpixman-1-0"),
        ("libfdt.so.1", "libfdt1"),
        ("libgcc_s.so.1", "libgcc-s1"),
        ("libz.so.1", "zlib1g"),
        ("libm.so.6", "libc6"),
        ("ld-linux-x86-64.so.2", "libc6"),
        ("libaio.so.1", "libaio1t64"),
        ("libslirp.so.0", None),
    ],
)
def test_a_library_is_looked_for_in_the_package_of_its_name(library, package):
    names = "libc6 libc6-dev libfdt1 libgcc-s1 libglib2.0-0 libpcre2-8-0 libpixman-1-0 zlib1g libaio1t64"
    packages = [Package(name, "1", f"{name}_1_amd64.deb", 1, "") for name in names.split()]
    found = package_for(library, packages)
    assert (found and found.name) == package
