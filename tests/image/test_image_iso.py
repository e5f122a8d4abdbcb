"""ISO images: the same bytes for the same ELF, and what is said where they can't be made.

That they boot, tests/cli/test_cli_image.py sees.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from vmxlab.errors import ImageError
from vmxlab.image.iso import pack_iso

GRUB = Path("/usr/lib/grub")

pytestmark = pytest.mark.skipif(
    not (shutil.which("grub-mkimage") and shutil.which("xorriso")),
    reason="GRUB and xorriso make it: make test installs them, or tools/setup.sh run iso",
)


@pytest.fixture
def bios_only(tmp_path: Path) -> Path:
    """GRUB as it is where only grub-pc-bin is installed."""
    (tmp_path / "i386-pc").symlink_to(GRUB / "i386-pc")
    return tmp_path


def test_same_elf_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack_iso(b"one", title="a")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert pack_iso(b"one", title="a") == first
    assert pack_iso(b"two", title="a") != first
    assert b'menuentry "a"' in first.data
    assert time.strftime("%Y%m%d").encode() not in first.data


@pytest.mark.slow
def test_date_in_it_is_the_one_that_a_reproducible_build_names(
    monkeypatch: pytest.MonkeyPatch, bios_only: Path
) -> None:
    usual = pack_iso(b"one", grub=bios_only)
    assert usual.data[0x832D : 0x832D + 8] == b"20000101"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86400 * 365))
    assert pack_iso(b"one", grub=bios_only).data[0x832D : 0x832D + 8] == b"19710101"


def test_without_grub_for_uefi_it_is_for_bios_alone(bios_only: Path) -> None:
    assert pack_iso(b"one", grub=bios_only).firmware == ("BIOS",)
    both = pack_iso(b"one")
    if (GRUB / "x86_64-efi").is_dir() and shutil.which("mformat"):
        assert both.firmware == ("BIOS", "UEFI")


def test_without_grub_for_bios_the_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"can't be made: .*i386-pc is not here") as caught:
        pack_iso(b"one", grub=tmp_path)
    assert "grub-pc-bin" in caught.value.advice


def test_program_that_fails_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "i386-pc").mkdir()
    with pytest.raises(ImageError, match="grub-mkimage failed with status 1") as caught:
        pack_iso(b"one", grub=tmp_path)
    assert "moddep.lst" in caught.value.message
