"""The image as an engine sees it: a ROM that ends at 4 GiB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmxlab import errors

_GRANULE_BYTES = 64 << 10
# Bochs refuses a larger ROM ("ROM image too large").
_LIMIT_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class RomImage:
    """A ROM file: a multiple of 64 KiB, at most 2 MiB, its last 64 KiB hold the reset vector.

    It is mapped so that it ends at 4 GiB, where the processor starts (SDM Vol. 3A, 10.1.4 "First Instruction
    Executed").
    """

    path: Path
    size_bytes: int

    @property
    def address(self) -> int:
        """Physical address of its first byte."""
        return (1 << 32) - self.size_bytes

    @classmethod
    def check(cls, path: Path) -> RomImage:
        """Take a file for a ROM. Raises ImageError, which says what is wrong with it."""
        path = path.absolute()
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
        except OSError as error:
            raise errors.ImageError(
                f"the image {path} can't be read: {error.strerror}", advice="write it first: vmxlab image"
            ) from error
        if size == 0 or size % _GRANULE_BYTES or size > _LIMIT_BYTES:
            raise errors.ImageError(
                f"the image {path} has {size} bytes: a boot ROM is a multiple of 64 KiB and at most 2 MiB",
                advice="it may be cut short, or not be an image at all; write it again: vmxlab image",
            )
        return cls(path, size)
